"""The settings of a low-rank sparse attention layer (`lorsa.py`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, model_validator

from lm_saes.dictionaries.single import SingleConfig
from lm_saes.errors import ConfigError
from lm_saes.latents.rotary import NTKByParts, Rotary

if TYPE_CHECKING:
    from lm_saes.models.attention_weights import AttentionWeights

_ROTARY = ("rotary_dim", "rotary_base", "rotary_adjacent_pairs", "rotary_scale", "use_NTK_by_parts_rope")
_BY_PARTS = ("NTK_by_parts_factor", "NTK_by_parts_low_freq_factor", "NTK_by_parts_high_freq_factor", "old_context_len")


class LorsaConfig(SingleConfig):
    """A low-rank sparse attention layer."""

    sae_type: Literal["lorsa"] = "lorsa"  # type: ignore[assignment]
    """Kind of dictionary."""
    hook_point_in: str = Field(min_length=1)
    """Hook point that is read: what the attention layer reads. To start from the model's own attention exactly, its
    input norm: `blocks.6.ln1.hook_normalized` (before the norm's weight and bias) or the path of the norm's module."""
    hook_point_out: str = Field(min_length=1)
    """Hook point that is reconstructed: what the attention layer writes."""
    n_qk_heads: int = Field(gt=0)
    """Query-key heads; each serves `d_sae / n_qk_heads` heads."""
    d_qk_head: int = Field(gt=0)
    """Width of a query or key."""
    positional_embedding_type: Literal["rotary", "none"] = "rotary"
    """How attention knows positions."""
    rotary_dim: int | None = Field(default=None, gt=0)
    """Coordinates of a query or key that are turned, from the first (needed for rotary embedding)."""
    rotary_base: float = Field(default=10000, gt=0)
    """Base of the geometric series of frequencies."""
    rotary_adjacent_pairs: bool = True
    """Turn adjacent coordinates together (GPT-J), rather than those half of `rotary_dim` apart (GPT-NeoX, Llama)."""
    rotary_scale: int = Field(default=1, gt=0)
    """Repeat each coordinate so often before it is turned."""
    use_NTK_by_parts_rope: bool = False
    """Slow the lower frequencies down (Llama 3.1)."""
    NTK_by_parts_factor: float = Field(default=1.0, gt=0)
    """By how much the lowest frequencies are slowed down."""
    NTK_by_parts_low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies of fewer turns in `old_context_len` are slowed down in full."""
    NTK_by_parts_high_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies of more turns in `old_context_len` stay as they are."""
    old_context_len: int = Field(default=2048, gt=0)
    """Tokens of a context before it was made longer."""
    n_ctx: int = Field(gt=0)
    """Longest context in tokens."""
    attn_scale: float | None = Field(default=None, gt=0)
    """What scores are divided by; None is the root of `d_qk_head`."""
    use_post_qk_ln: bool = False
    """Normalise queries and keys, before they are turned."""
    normalization_type: Literal["LN", "RMS"] | None = None
    """How: by mean and variance, or by the root of the mean square."""
    eps: float = Field(default=1e-6, ge=0)
    """What is added to that variance or mean square."""

    @model_validator(mode="after")
    def _check_attention(self, info: ValidationInfo) -> LorsaConfig:
        if self.hook_point_in == self.hook_point_out:
            raise ValueError(
                f"hook_point_out={self.hook_point_out!r} is hook_point_in; attention writes elsewhere than it reads"
            )
        if self.d_sae % self.n_qk_heads:
            raise ValueError(f"n_qk_heads={self.n_qk_heads}: must divide the {self.d_sae} latents (d_sae) evenly")
        if self.positional_embedding_type == "none":
            self.refuse_without_effect((*_ROTARY, *_BY_PARTS), "positional_embedding_type is 'none'", info)
        elif self.rotary_dim is None or self.rotary_dim % 2 or self.rotary_dim > self.d_qk_head * self.rotary_scale:
            most = "d_qk_head x rotary_scale" if self.rotary_scale > 1 else "d_qk_head"
            raise ValueError(
                f"rotary_dim={self.rotary_dim}: must be even and at most {self.d_qk_head * self.rotary_scale} ({most})"
            )
        elif not self.use_NTK_by_parts_rope:
            self.refuse_without_effect(_BY_PARTS, "use_NTK_by_parts_rope is off", info)
        if self.NTK_by_parts_high_freq_factor < self.NTK_by_parts_low_freq_factor:
            raise ValueError(
                f"NTK_by_parts_high_freq_factor={self.NTK_by_parts_high_freq_factor}: is below "
                f"NTK_by_parts_low_freq_factor={self.NTK_by_parts_low_freq_factor}"
            )
        if not self.use_post_qk_ln:
            self.refuse_without_effect(("normalization_type", "eps"), "use_post_qk_ln is off", info)
        elif self.normalization_type is None:
            raise ValueError("normalization_type=None: use_post_qk_ln needs one; use 'LN' or 'RMS'")
        return self

    @property
    def n_ov_heads(self) -> int:
        """Heads that move a number each: the latents."""
        return self.d_sae

    @property
    def score_scale(self) -> float:
        """What scores are divided by."""
        return self.d_qk_head**0.5 if self.attn_scale is None else self.attn_scale

    @property
    def rotary(self) -> Rotary | None:
        """The rotary embedding, if there is one."""
        if self.positional_embedding_type == "none" or self.rotary_dim is None:
            return None
        by_parts = NTKByParts(self.NTK_by_parts_factor, self.NTK_by_parts_low_freq_factor,
                              self.NTK_by_parts_high_freq_factor, self.old_context_len)  # fmt: skip
        return Rotary(self.rotary_dim, self.rotary_base, self.rotary_adjacent_pairs, self.rotary_scale,
                      by_parts if self.use_NTK_by_parts_rope else None)  # fmt: skip

    def check_attends_like(self, mhsa: AttentionWeights) -> None:
        """Raise `ConfigError` unless queries and keys make patterns here as they do in a layer's own attention."""
        for name, theirs in mhsa.settings.items():
            own = self.score_scale if name == "attn_scale" else getattr(self, name)
            close = (
                isinstance(theirs, float) and isinstance(own, int | float) and math.isclose(own, theirs, rel_tol=1e-6)
            )
            if own != theirs and not close:
                raise ConfigError(f"{name}={own!r}: the model's attention has {theirs!r}; set that to start from it")
        if mhsa.window is not None and mhsa.window < self.n_ctx:
            raise ConfigError(
                f"n_ctx={self.n_ctx}: the model's attention goes back {mhsa.window} tokens only; use that, and "
                "contexts as short"
            )
