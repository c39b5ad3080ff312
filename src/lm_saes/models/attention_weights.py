"""Weights of a language model's layers, in one shape for all models: what dictionaries may be initialised from.

Letters: H heads, K key-value heads (H, or fewer that groups of heads share), E width of a head, D width of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lm_saes.errors import ConfigError
from lm_saes.models.base import LanguageModel
from lm_saes.models.hook_points import LAYOUTS
from lm_saes.models.pretrained import PretrainedLanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One layer's attention, reading what the layer's input norm hands on: `q = x W_Q + b_Q`, all in float32."""

    W_Q: Tensor
    """`[H, D, E]`"""
    W_K: Tensor
    """`[K, D, E]`"""
    W_V: Tensor
    """`[K, D, E]`"""
    W_O: Tensor
    """`[H, E, D]`"""
    b_Q: Tensor
    """`[H, E]`"""
    b_K: Tensor
    """`[K, E]`"""
    b_V: Tensor
    """`[K, E]`"""
    b_O: Tensor
    """`[D]`"""
    settings: Mapping[str, Any]
    """What else makes its scores, as `LorsaConfig` names it."""
    norm_w_Q: Tensor | None = None
    """Weight of the norm of queries, `[E]`."""
    norm_w_K: Tensor | None = None
    """The same of keys."""
    window: int | None = None
    """How many tokens back a token attends; None: to all."""
    input_w: Tensor | None = None
    """Weight of the layer's input norm, `[D]`."""
    input_b: Tensor | None = None
    """Its bias."""
    reads: tuple[str, ...] = ()
    """The hook points of its input, first the path of the input norm's module."""
    reads_normalized: str = ""
    """The hook point of that norm before weight and bias."""

    def to(self, device: str | torch.device) -> AttentionWeights:
        """The same on another device."""
        return _mapped(self, lambda t: t.to(device))

    @property
    def n_heads(self) -> int:
        """How many heads there are."""
        return len(self.W_Q)

    def spread(self, n: int, name: str) -> Tensor:
        """Which head each of `n` others comes from if heads are repeated in order: `[n]`.

        Raises:
            ConfigError: `n` (the setting `name`) is not a multiple of the heads.
        """
        if n % self.n_heads:
            raise ConfigError(f"{name}={n}: must be a multiple of the {self.n_heads} heads of the model's attention")
        return torch.arange(n, device=self.W_Q.device) // (n // self.n_heads)

    def keys_of(self, heads: Tensor) -> Tensor:
        """The key-value heads that serve the given heads."""
        return heads // (self.n_heads // len(self.W_K))

    def reading(self, hook_point: str) -> AttentionWeights:
        """The same attention as a function of the activations at a hook point.

        Exact for the input norm's output (the path of its module, or TransformerLens' `blocks.i.ln1.hook_out`) and for
        what the norm makes before weight and bias (`blocks.i.ln1.hook_normalized`); any other hook point is taken to
        hold attention's own input, with a warning.
        """
        if hook_point == self.reads_normalized:
            return self._before_norm_weight()
        if hook_point not in self.reads:
            log.warning(
                "hook_point_in=%r: attention reads %r, or %r before the norm's weight; scores are the model's only if "
                "the activations are the same", hook_point, self.reads[0], self.reads_normalized,
            )  # fmt: skip
        return self

    def _before_norm_weight(self) -> AttentionWeights:
        w_D = torch.ones(self.W_Q.shape[1]) if self.input_w is None else self.input_w
        b_D = torch.zeros_like(w_D) if self.input_b is None else self.input_b
        return replace(
            self,
            **{f"W_{x}": w_D[:, None] * W for x, W in (("Q", self.W_Q), ("K", self.W_K), ("V", self.W_V))},
            b_Q=self.b_Q + b_D @ self.W_Q, b_K=self.b_K + b_D @ self.W_K, b_V=self.b_V + b_D @ self.W_V,
            input_w=None, input_b=None, reads=(self.reads_normalized,),
        )  # fmt: skip


def attention_weights(model: LanguageModel, layer: int) -> AttentionWeights:
    """The attention of one layer of a language model.

    Raises:
        ConfigError: the model has no such layer.
        NotImplementedError: the model's attention is not one that is known here.
    """
    if not isinstance(model, PretrainedLanguageModel):
        raise NotImplementedError(
            f"attention weights of a {type(model).__name__} cannot be read; use a model of the transformers library"
        )
    if not 0 <= layer < model.n_layers:
        raise ConfigError(f"model_layer={layer}: the model has layers 0 to {model.n_layers - 1}")
    config = model.module.config.get_text_config()
    known = _READERS.get(config.model_type)
    if known is None:
        raise NotImplementedError(
            f"attention weights of a {config.model_type!r} model cannot be read; those of {', '.join(_READERS)} can"
        )
    layout = LAYOUTS[config.model_type]
    block = f"{layout.blocks}.{layer}"
    attention = model.module.get_submodule(f"{block}.{known.attention}")
    norm = dict(model.module.get_submodule(f"{block}.{layout.ln1}").named_parameters())
    found = known.read(attention, config)
    return replace(
        _mapped(found, lambda t: t.detach().float()),
        input_w=norm["weight"].detach().float(),
        input_b=norm["bias"].detach().float() if "bias" in norm else None,
        reads=(f"{block}.{layout.ln1}", f"blocks.{layer}.ln1.hook_out", f"blocks.{layer}.attn.hook_in"),
        reads_normalized=f"blocks.{layer}.ln1.hook_normalized",
    )


@dataclass(frozen=True)
class _Known:
    attention: str
    """Path of the attention within a block."""
    read: Callable[[nn.Module, Any], AttentionWeights]


def _mapped(weights: AttentionWeights, change: Callable[[Tensor], Tensor]) -> AttentionWeights:
    return replace(weights, **{name: change(t) for name, t in vars(weights).items() if isinstance(t, Tensor)})


def _read_llama(attention: Any, config: Any) -> AttentionWeights:
    """Llama, Mistral, Qwen: separate projections, shared key-value heads, perhaps norms of queries and keys."""
    width, d_model = attention.head_dim, config.hidden_size
    n_heads, n_keys = config.num_attention_heads, config.num_key_value_heads

    def heads(projection: nn.Linear, n: int) -> tuple[Tensor, Tensor]:
        bias = projection.weight.new_zeros(n * width) if projection.bias is None else projection.bias
        return projection.weight.view(n, width, d_model).transpose(1, 2), bias.view(n, width)

    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = (
        heads(attention.q_proj, n_heads), heads(attention.k_proj, n_keys), heads(attention.v_proj, n_keys)
    )  # fmt: skip
    out = attention.o_proj
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    norm_settings = {"use_post_qk_ln": False}
    if q_norm is not None:
        norm_settings = {"use_post_qk_ln": True, "normalization_type": "RMS", "eps": q_norm.variance_epsilon}
    own_window = hasattr(attention, "sliding_window")  # layers may differ; else the config speaks for all
    return AttentionWeights(
        W_Q, W_K, W_V, out.weight.T.reshape(n_heads, width, d_model),
        b_Q, b_K, b_V, out.weight.new_zeros(d_model) if out.bias is None else out.bias,
        {"d_qk_head": width, "attn_scale": 1 / attention.scaling, **_rotary(config, width), **norm_settings},
        norm_w_Q=None if q_norm is None else q_norm.weight,
        norm_w_K=None if k_norm is None else k_norm.weight,
        window=attention.sliding_window if own_window else getattr(config, "sliding_window", None),
    )  # fmt: skip


def _read_gpt2(attention: Any, config: Any) -> AttentionWeights:
    """GPT-2: one projection `[D, 3 D]` for queries, keys and values; positions are in the residual stream."""
    n_heads, width, d_model = config.num_attention_heads, attention.head_dim, config.hidden_size
    W_Q, W_K, W_V = attention.c_attn.weight.view(d_model, 3, n_heads, width).permute(1, 2, 0, 3)
    b_Q, b_K, b_V = attention.c_attn.bias.view(3, n_heads, width)
    settings = {"d_qk_head": width, "attn_scale": 1 / attention.scaling, "positional_embedding_type": "none"}
    return AttentionWeights(
        W_Q, W_K, W_V, attention.c_proj.weight.view(n_heads, width, d_model), b_Q, b_K, b_V, attention.c_proj.bias,
        {**settings, "use_post_qk_ln": False},
    )  # fmt: skip


def _read_gpt_neox(attention: Any, config: Any) -> AttentionWeights:
    """GPT-NeoX, Pythia: one projection, each head's query, key and value side by side."""
    n_heads, width, d_model = config.num_attention_heads, attention.head_size, config.hidden_size
    joint, out = attention.query_key_value, attention.dense
    W_Q, W_K, W_V = joint.weight.view(n_heads, 3, width, d_model).permute(1, 0, 3, 2)
    bias = joint.weight.new_zeros(3 * d_model) if joint.bias is None else joint.bias
    b_Q, b_K, b_V = bias.view(n_heads, 3, width).transpose(0, 1)
    settings = {"d_qk_head": width, "attn_scale": 1 / attention.scaling, **_rotary(config, attention.rotary_ndims)}
    return AttentionWeights(
        W_Q, W_K, W_V, out.weight.T.reshape(n_heads, width, d_model),
        b_Q, b_K, b_V, out.weight.new_zeros(d_model) if out.bias is None else out.bias,
        {**settings, "use_post_qk_ln": False},
    )  # fmt: skip


def _rotary(config: Any, dim: int) -> dict[str, Any]:
    """The rotary embedding of a model whose pairs are half of `dim` apart."""
    rope = config.rope_parameters
    settings = {"positional_embedding_type": "rotary", "rotary_dim": dim, "rotary_base": float(rope["rope_theta"]),
                "rotary_adjacent_pairs": False, "rotary_scale": 1}  # fmt: skip
    match rope["rope_type"]:
        case "default":
            return {**settings, "use_NTK_by_parts_rope": False}
        case "llama3":
            by_parts = {"NTK_by_parts_factor": "factor", "NTK_by_parts_low_freq_factor": "low_freq_factor",
                        "NTK_by_parts_high_freq_factor": "high_freq_factor",
                        "old_context_len": "original_max_position_embeddings"}  # fmt: skip
            return {**settings, "use_NTK_by_parts_rope": True, **{own: rope[its] for own, its in by_parts.items()}}
        case other:
            raise NotImplementedError(f"rotary embedding of type {other!r} is not known; 'default' and 'llama3' are")


_LLAMA = _Known("self_attn", _read_llama)
_READERS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _Known("attn", _read_gpt2),
    "gpt_neox": _Known("attention", _read_gpt_neox),
}
