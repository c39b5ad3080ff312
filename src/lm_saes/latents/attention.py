"""Causal attention whose values are scalars: many heads that each move one number, in groups that share a pattern.

Letters: B contexts, S positions, G query-key heads, E their width, F heads (G groups of F / G), D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lm_saes import machine
from lm_saes.errors import DataError

QKNorm = Literal["LN", "RMS"]


class HeadNorm(nn.Module):
    """Normalisation of each head's query or key: `x / sqrt(mean(x^2) + eps) * w` (RMS), of `x - mean(x)` for LN."""

    def __init__(self, n_heads: int, d_head: int, kind: QKNorm, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.w = nn.Parameter(torch.ones(n_heads, d_head, dtype=dtype))

    def forward(self, x_BGSE: Tensor) -> Tensor:
        wide = x_BGSE.to(torch.promote_types(x_BGSE.dtype, torch.float32))
        if self.kind == "LN":
            wide = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.w[:, None]).to(x_BGSE.dtype)


def contexts(x: Tensor, n_ctx: int, name: str = "x") -> Tensor:
    """`x`, if it is whole contexts `[batch, seq, d]` of at most `n_ctx` tokens.

    Raises:
        DataError: it is not.
    """
    if x.ndim != 3:
        raise DataError(
            f"{name}: shape {tuple(x.shape)}, wanted [batch, seq, d]; attention needs whole contexts, so use "
            "target='activations-2d'"
        )
    if x.shape[1] > n_ctx:
        raise DataError(f"{name}: contexts of {x.shape[1]} tokens exceed n_ctx={n_ctx}; use a smaller context_size")
    return x


def project(x_BSD: Tensor, W_GDE: Tensor, b_GE: Tensor) -> Tensor:
    """`x W + b` of each query-key head, `[B, G, S, E]`; one product if `W` is stored head- and latent-major."""
    W_XD = W_GDE.transpose(1, 2).reshape(-1, W_GDE.shape[1])
    return functional.linear(x_BSD, W_XD, b_GE.reshape(-1)).unflatten(-1, b_GE.shape).transpose(1, 2)


def attend(q_BGSE: Tensor, k_BGSE: Tensor, v_BSF: Tensor, scale: float) -> Tensor:
    """Each scalar value averaged over the positions up to here, weighed by its group's pattern: `[B, S, F]`.

    One call serves all heads: the scalars of a group are the vector that its query-key head moves. Scores are
    `q k / scale`.
    """
    v_BGSV = v_BSF.unflatten(-1, (q_BGSE.shape[1], -1)).transpose(1, 2)
    z_BGSV = functional.scaled_dot_product_attention(q_BGSE, k_BGSE, v_BGSV, is_causal=True, scale=1 / scale)
    return z_BGSV.transpose(1, 2).flatten(2)


def pattern(q_BGSE: Tensor, k_BGSE: Tensor, scale: float) -> Tensor:
    """The weights of that average, `[B, G, S, S]` (to, from)."""
    scores = q_BGSE @ k_BGSE.transpose(-1, -2) / scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def refuse_left_padding(tokens_BS: Tensor, mask_BS: Tensor | None) -> None:
    """Raise if a context begins with padding: one token repeated and masked, before tokens that count.

    A mask alone cannot tell: a single masked token in front is an ordinary BOS. (Looked at on the CPU only, as a GPU
    would have to be waited for.)
    """
    if mask_BS is None or machine.waits_cost(tokens_BS.device) or tokens_BS.shape[1] < 3:
        return
    out_BS = ~mask_BS.bool()
    padded_B = out_BS[:, 0] & out_BS[:, 1] & (tokens_BS[:, 0] == tokens_BS[:, 1]) & ~out_BS.all(1)
    if bool(padded_B.any()):
        row = int(padded_B.nonzero()[0])
        raise DataError(
            f"mask: context {row} begins with padding (token {int(tokens_BS[row, 0])}); pad on the right, where causal "
            "attention never sees it"
        )
