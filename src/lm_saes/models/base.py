"""Language models as sources of activations: the settings and the interface that every backend has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lm_saes.config import BaseConfig, DType


class LanguageModelConfig(BaseConfig):
    """Which language model to run, and how."""

    model_name: str
    """Name on the Hugging Face hub, or a local directory, of the model and its tokenizer."""
    model_from_pretrained_path: str | None = None
    """Where to load the model and tokenizer from, if elsewhere than `model_name`; `model_name` is then only a label."""
    backend: Literal["auto", "huggingface", "transformer_lens"] = "auto"
    """What runs the model; `auto` is `huggingface`. `transformer_lens` is slower and needs the package of that name."""
    device: str = "cpu"
    """Device that runs the model: `cpu`, `cuda`, `cuda:1`, `mps`."""
    dtype: DType | None = None
    """Type of the model's weights and activations. None chooses: bfloat16 where the machine multiplies it faster (CUDA
    devices that have it, CPUs with AMX or AVX-512 bfloat16 instructions), else float32."""
    use_flash_attn: bool = False
    """Use the flash-attn package (CUDA and half precision only); without it PyTorch's own fused attention is used."""
    cache_dir: str | None = None
    """Directory for downloads from the hub; None is the hub client's own."""
    local_files_only: bool = False
    """Never download: take everything from `cache_dir` or the given directory."""
    max_length: int = Field(default=2048, ge=1)
    """Longest context in tokens, the prepended one included; a model whose own limit is smaller keeps that limit."""
    prepend_bos: bool = True
    """Start every context with the beginning-of-sequence token."""
    bos_token_id: int | None = Field(default=None, ge=0)
    """Beginning-of-sequence token; None takes the tokenizer's, else its end-of-sequence token."""
    eos_token_id: int | None = Field(default=None, ge=0)
    """End-of-sequence token; None takes the tokenizer's, if it has one."""
    pad_token_id: int | None = Field(default=None, ge=0)
    """Token that fills contexts on the right; None takes the tokenizer's, else the end-of-sequence token, else 0."""
    gguf_file: str | None = None
    """Name of a GGUF file in the model's directory or repository to take weights and tokenizer from. It is unpacked
    into `dtype` at every load, which is slow; needs the packages gguf and accelerate."""


class LanguageModel(ABC):
    """A causal language model whose activations can be read and replaced at named hook points.

    Hook points are named as in TransformerLens (`blocks.6.hook_resid_post`); a backend may know further names. Contexts
    are padded on the right. As attention is causal, padding changes nothing before it; what stands on it means nothing.
    """

    cfg: LanguageModelConfig
    device: torch.device
    dtype: torch.dtype
    d_model: int
    n_layers: int
    vocab_size: int
    max_length: int
    bos_token_id: int
    pad_token_id: int
    eos_token_id: int | None

    @abstractmethod
    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; nothing is prepended, appended or cut."""

    @abstractmethod
    def decode_tokens(self, tokens: list[int]) -> list[str]:
        """The text that each token of one context stands for; joined, they are the text of the context.

        A character that takes several tokens is given to the last of them, and the others to it are empty.
        """

    @abstractmethod
    def check_hook_points(self, hook_points: Iterable[str]) -> None:
        """Raise a `ConfigError` that lists near names if the model lacks one of `hook_points`."""

    @abstractmethod
    def width(self, hook_point: str) -> int:
        """Size of the last dimension of the activations at `hook_point`."""

    @abstractmethod
    def activations(
        self, tokens: Tensor, hook_points: Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations `[batch, seq, d]` at each of `hook_points` for `tokens` `[batch, seq]`.

        Each is a tensor of its own, in the model's dtype, without grad. The forward pass ends at the last hook point.

        Args:
            tokens: int64 ids; any device.
            hook_points: at least one name.
            attention_mask: same shape; ones, then zeros on the right where there is padding.

        Raises:
            ConfigError: a hook point does not exist.
            DataError: tokens or mask of a wrong shape, ids that the model lacks, padding elsewhere than on the right.
        """

    @abstractmethod
    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Logits `[batch, seq, vocab]` of a whole forward pass, without grad.

        `replace[hook_point](activation)` is what the rest of the model sees at that hook point. Arguments and errors as
        in `activations`; a replacement of another shape is a `ConfigError`.
        """

    def mlp(self, layer: int, hook_point_in: str, hook_point_out: str) -> Callable[[Tensor], Tensor]:
        """The MLP of a layer as a function from activations at one hook point to activations at another, `[n, d]` each.

        It is what a forward pass computes between the two, no more and no less: from `blocks.6.ln2.hook_normalized`,
        which stands before the norm's weight and bias, these are applied first; from the norm's output they are not;
        from `blocks.6.hook_resid_mid` the whole norm is. To `blocks.6.hook_mlp_out` a post-norm is applied, if the
        model has one.

        Raises:
            ConfigError: there is no such layer, or `hook_point_in` does not stand in front of its MLP, or
                `hook_point_out` not behind it; the message lists those that do.
        """
        raise NotImplementedError(f"{type(self).__name__} does not give its MLPs as functions")

    @abstractmethod
    def provenance(self) -> dict[str, str]:
        """What identifies the model: its name, commit or sha256 of its weights, dtype and the library's version."""
