"""Rotary position embedding: pairs of coordinates of queries and keys, turned by angles that grow with the position.

Coordinate pair i at position p is turned by `p * inverse_frequency[i]`, `inverse_frequency[i] = base^(-2i/dim)`; so a
score depends on the distance between two positions only (Su et al. 2021). Conventions differ in which coordinates make
a pair: adjacent ones (GPT-J) or those half of `dim` apart (GPT-NeoX, Llama).

Letters: S positions, P pairs, E width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NTKByParts:
    """Slower turning for longer contexts, by parts of the spectrum (Llama 3.1; Peng et al. 2023, section 3.2).

    Pairs that make more than `high_freq_factor` turns in `old_context_len` tokens stay as they are, those that make
    fewer than `low_freq_factor` are slowed down by `factor`, and those between are slowed down in part.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    old_context_len: int

    def slowed(self, inverse_frequency_P: Tensor) -> Tensor:
        """The inverse frequencies to use in place of the given ones."""
        turns_P = self.old_context_len / (2 * math.pi / inverse_frequency_P)
        span = max(self.high_freq_factor - self.low_freq_factor, torch.finfo(torch.float32).tiny)
        kept_P = ((turns_P - self.low_freq_factor) / span).clamp(0, 1)
        return (1 - kept_P) * inverse_frequency_P / self.factor + kept_P * inverse_frequency_P


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned."""

    dim: int
    """How many coordinates are turned, from the first; the others pass."""
    base: float = 10000.0
    adjacent_pairs: bool = True
    """Pairs are coordinates (2i, 2i + 1); otherwise (i, i + dim/2)."""
    scale: int = 1
    """How often each coordinate is repeated beforehand, so that a narrow head is turned at many frequencies."""
    by_parts: NTKByParts | None = None

    def inverse_frequencies(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """Radians per position of each pair, `[P]`."""
        exponent_P = torch.arange(0, self.dim, 2, dtype=dtype, device=device) / self.dim
        inverse_P = 1.0 / (self.base**exponent_P)
        return inverse_P if self.by_parts is None else self.by_parts.slowed(inverse_P)

    def turn(self, x_SE: Tensor) -> Tensor:
        """Turn `x [..., S, E]`, positions counted from 0: `[..., S, E * scale]`.

        Angles are computed in float32 as models do, in float64 for a float64 `x`.
        """
        wide = torch.promote_types(x_SE.dtype, torch.float32)
        positions_S = torch.arange(x_SE.shape[-2], dtype=wide, device=x_SE.device)
        angles_SP = positions_S[:, None] * self.inverse_frequencies(wide, x_SE.device)
        cos_SP, sin_SP = angles_SP.cos(), angles_SP.sin()
        if self.scale > 1:
            x_SE = x_SE.repeat_interleave(self.scale, dim=-1)
        turned, passed = x_SE[..., : self.dim], x_SE[..., self.dim :]
        if self.adjacent_pairs:
            a_SP, b_SP = turned[..., 0::2], turned[..., 1::2]
        else:
            a_SP, b_SP = turned.chunk(2, dim=-1)
        pair = (a_SP * cos_SP - b_SP * sin_SP, b_SP * cos_SP + a_SP * sin_SP)
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.adjacent_pairs else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(x_SE.dtype), passed], dim=-1) if passed.shape[-1] else turned.to(x_SE.dtype)
