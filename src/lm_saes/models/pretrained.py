"""What language models loaded by `transformers` have in common, whatever runs them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.errors import ConfigError, DataError
from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.hook_points import Edit, MLPParts
from lm_saes.models.transformers_files import available_device, load_model, load_tokenizer, weights_identity

_UTF8_LONGEST = 4
"""Bytes of the longest character, so the most tokens that one character can take."""


class _Stop(Exception):
    """All activations that were asked for are there: the rest of the forward pass is not needed."""


class PretrainedLanguageModel(LanguageModel):
    """A causal language model loaded by `transformers`, from the hub, a directory or a GGUF file.

    A backend says how to find hook points and how to run the model with edits at them.
    """

    def __init__(self, cfg: LanguageModelConfig) -> None:
        self.cfg = cfg
        self.device = available_device(cfg)
        self.dtype = cfg.dtype if cfg.dtype is not None else machine.automatic_dtype(self.device)
        self._tokenizer = load_tokenizer(cfg)
        self._model = load_model(cfg, self.dtype).to(self.device)
        config = self._model.config.get_text_config()
        # Only text generation needs it; with it, GPT-2 inspects every batch for padding and warns of a missing mask.
        config.pad_token_id = None
        self.d_model = config.hidden_size
        self.n_layers = config.num_hidden_layers
        self.vocab_size = config.vocab_size
        self.max_length = min(cfg.max_length, getattr(config, "max_position_embeddings", cfg.max_length))
        self._set_special_tokens()
        self._widths: dict[str, int] = {}
        self._one_pass_at_a_time = Lock()  # hooks belong to a pass: another thread's pass must not meet them

    @property
    def module(self) -> Any:
        """The model itself, as `transformers` made it."""
        return self._model

    # -- what a backend gives ------------------------------------------------------------------------------------------

    @abstractmethod
    def _find(self, hook_point: str) -> Any:
        """The place of a hook point; raises a `ConfigError` with near names if the model lacks it."""

    @abstractmethod
    def _hooked(self, edits: Mapping[str, Edit]) -> AbstractContextManager[Any]:
        """Within the context each `edits[hook_point](activation)` is called when the model passes there.

        A tensor that it returns takes the activation's place.
        """

    @abstractmethod
    def _forward(self, tokens: Tensor) -> Tensor:
        """Logits of a whole forward pass."""

    @abstractmethod
    def _mlp_parts(self, layer: int) -> MLPParts:
        """The modules of a layer's MLP, and the hook points before and after it."""

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _set_special_tokens(self) -> None:
        cfg = self.cfg
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(cfg, name)
            if value is not None and value >= self.vocab_size:
                raise ConfigError(
                    f"{name}={value} is not a token of {cfg.model_name!r}; set it to 0 to {self.vocab_size - 1}"
                )
        self.eos_token_id = _first(cfg.eos_token_id, self._known(self._tokenizer.eos_token_id))
        bos = _first(cfg.bos_token_id, self._known(self._tokenizer.bos_token_id), self.eos_token_id)
        if bos is None:
            raise ConfigError(
                f"bos_token_id=None: the tokenizer of {cfg.model_name!r} has neither BOS nor EOS; set bos_token_id"
            )
        self.bos_token_id = bos
        pad = _first(cfg.pad_token_id, self._known(self._tokenizer.pad_token_id), self.eos_token_id)
        self.pad_token_id = 0 if pad is None else pad

    def _known(self, token: int | None) -> int | None:
        """`token` unless it lies beyond the model's vocabulary, as padding added to a tokenizer later may."""
        return token if token is not None and token < self.vocab_size else None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def decode_tokens(self, tokens: list[int]) -> list[str]:
        def text_of(part: list[int]) -> str:
            return self._tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        # A token is decoded together with the tokens of the piece before it, because decoders strip leading spaces.
        pieces: list[str] = []
        before, start = 0, 0
        for end in range(1, len(tokens) + 1):
            text = text_of(tokens[before:end])
            may_go_on = end < len(tokens) and end - start < _UTF8_LONGEST
            if text.endswith("\ufffd") and may_go_on:
                pieces.append("")
                continue
            pieces.append(text[len(text_of(tokens[before:start])) :])
            before, start = start, end
        return pieces

    # -- passes --------------------------------------------------------------------------------------------------------

    def check_hook_points(self, hook_points: Iterable[str]) -> None:
        for hook_point in hook_points:
            self._find(hook_point)

    def width(self, hook_point: str) -> int:
        if hook_point not in self._widths:
            token = torch.tensor([[self.bos_token_id]])
            self._widths[hook_point] = self.activations(token, [hook_point])[hook_point].shape[-1]
        return self._widths[hook_point]

    @torch.no_grad()
    def activations(
        self, tokens: Tensor, hook_points: Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        self._check_input(tokens, attention_mask)
        names = list(dict.fromkeys(hook_points))
        if not names:
            raise ConfigError("hook_points is empty; name at least one hook point")
        self.check_hook_points(names)
        found: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor) -> None:
            if name not in found:
                if activation.shape[:-1] != tokens.shape:
                    raise ConfigError(
                        f"hook point {name!r}: activations of shape {tuple(activation.shape)} for tokens of shape "
                        f"{tuple(tokens.shape)}; name a module that gives [batch, seq, d]"
                    )
                # A copy, because later modules may work in place and two hook points may be one tensor.
                found[name] = activation.clone(memory_format=torch.contiguous_format)
                if len(found) == len(names):
                    raise _Stop

        edits: dict[str, Edit] = {name: lambda activation, name=name: keep(name, activation) for name in names}
        with self._one_pass_at_a_time, self._hooked(edits):
            try:
                self._forward(tokens.to(self.device))
            except _Stop:
                return {name: found[name] for name in names}
        missing = ", ".join(name for name in names if name not in found)
        raise ConfigError(f"hook point {missing}: the module does not run in a forward pass; name one that does")

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        self._check_input(tokens, attention_mask)
        self.check_hook_points(replace or {})
        with self._one_pass_at_a_time, self._hooked(replace or {}):
            return self._forward(tokens.to(self.device))

    def mlp(self, layer: int, hook_point_in: str, hook_point_out: str) -> Callable[[Tensor], Tensor]:
        if not 0 <= layer < self.n_layers:
            raise ConfigError(f"layer {layer}: {self.cfg.model_name!r} has the layers 0 to {self.n_layers - 1}")
        parts = self._mlp_parts(layer)
        for name, value, allowed, where in (
            ("hook_point_in", hook_point_in, parts.inputs, "in front of"),
            ("hook_point_out", hook_point_out, parts.outputs, "behind"),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{name}={value!r} does not stand {where} the MLP of layer {layer}; use {' or '.join(allowed)}, "
                    "or another layer"
                )

        @torch.no_grad()
        def run(x_ND: Tensor) -> Tensor:
            passed: dict[str, Tensor] = {}

            def enter(activation: Tensor) -> Tensor:
                passed[hook_point_in] = activation
                return x_ND[None]

            def leave(activation: Tensor) -> None:
                passed[hook_point_out] = activation.clone()

            with self._one_pass_at_a_time, self._hooked({hook_point_in: enter, hook_point_out: leave}):
                # What flows in does not matter: x takes its place at hook_point_in.
                flow = torch.zeros(1, len(x_ND), self.d_model, device=self.device, dtype=self.dtype)
                for module in parts.modules:
                    flow = module(flow)
            if list(passed) != [hook_point_in, hook_point_out]:
                raise ConfigError(
                    f"layer {layer}: its MLP does not lead from {hook_point_in!r} to {hook_point_out!r}; name others"
                )
            return passed[hook_point_out][0].to(x_ND)

        return run

    def _check_input(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Check the input; the mask goes no further, because right padding needs none where attention is causal.

        Without a mask `scaled_dot_product_attention` takes its fastest, causal path.
        """
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
            raise DataError(
                f"tokens: shape {tuple(tokens.shape)} of {tokens.dtype}; must be int64 [batch, seq], not empty"
            )
        if tokens.shape[1] > self.max_length:
            raise DataError(
                f"tokens: {tokens.shape[1]} tokens a context exceed the {self.max_length} that max_length and the "
                "model allow; use shorter contexts"
            )
        if tokens.device.type == "cpu" and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise DataError(
                f"tokens: ids {int(tokens.min())} to {int(tokens.max())}; {self.cfg.model_name!r} has 0 to "
                f"{self.vocab_size - 1}; tokenize with the model's own tokenizer"
            )
        if attention_mask is None:
            return
        if attention_mask.shape != tokens.shape:
            raise DataError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; must be that of tokens, {tuple(tokens.shape)}"
            )
        mask = attention_mask.bool()
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise DataError("attention_mask: each row must be ones, then zeros; pad contexts on the right")

    def provenance(self) -> dict[str, str]:
        import transformers

        return {
            "model_name": self.cfg.model_name,
            **self._weights_identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._backend_identity,
            "transformers": transformers.__version__,
        }

    @property
    @abstractmethod
    def _backend_identity(self) -> dict[str, str]:
        """The backend's name, and its version where it has one."""

    @cached_property
    def _weights_identity(self) -> dict[str, str]:
        return weights_identity(self.cfg, self._model)


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)
