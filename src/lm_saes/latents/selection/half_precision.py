"""Selection from products in bfloat16, where autocast asks for them and the processor has instructions for them.

Scale and bias are columns of the product, which adds them up in float32: what comes out is `s` itself, rounded once.

Letters: N tokens, B tokens of a block, D width, F latents, J latents at a time, k of them wanted, P padded width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.products import product
from lm_saes.latents.selection.bits import above_in_blocks, largest
from lm_saes.latents.selection.bounds import fill, in_parts, in_turn
from lm_saes.latents.selection.scores import Scores

BIAS_PARTS = 3
"""So many numbers in half precision add up to one in float32."""


def top_in_half(scores: Scores, k: int) -> tuple[Tensor, Tensor]:
    """The k largest `s = (x W + b) * scale` of each token as products in bfloat16 have them, the positive ones of them
    at least: their columns, and what `s` makes of `x W` there (float32), both `[N, k]`."""
    columns_Nk = torch.empty(len(scores.x_ND), k, dtype=torch.int64)
    s_Nk = scores.x_ND.new_empty(len(scores.x_ND), k)
    for tokens, s_BF in _products(scores):
        columns_Bk = largest(s_BF, k)
        columns_Nk[tokens], s_Nk[tokens] = columns_Bk, s_BF.gather(1, columns_Bk).float()
    return columns_Nk, _linear(s_Nk, columns_Nk, scores)


def batch_in_half(scores: Scores, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Entries among which are the n largest positive `s` of the whole batch, and few others.

    Their rows and columns, by row, `x W` and `s` there, all `[E]`. None if some block of tokens has so many more than
    its share that they were not all taken.
    """
    n_tokens, n_latents = len(scores.x_ND), len(scores.b_F)
    wanted = machine.HALF_PRECISION_SHARES * n
    flat_E, bits_E, floor = above_in_blocks(
        (tokens.start, s_BF, n if len(s_BF) == n_tokens else int(wanted * len(s_BF) / n_tokens))
        for tokens, s_BF in _products(scores)
    )
    if floor > 1 and len(flat_E) < n:
        return None
    rows_E, s_E = flat_E // n_latents, bits_E.view(torch.bfloat16).float()
    columns_E = flat_E.sub_(rows_E * n_latents)
    return rows_E, columns_E, _linear(s_E, columns_E, scores), s_E


def _products(scores: Scores) -> Iterator[tuple[slice, Tensor]]:
    """`s` of some tokens after others, each written over the one before."""
    x_NP, W_FP = _with_ones(scores.x_ND), _scaled(scores)
    n_rows = max(1, machine.BOUNDS_BLOCK_BYTES // (2 * len(W_FP)))
    s_BF = x_NP.new_empty(min(len(x_NP), n_rows), len(W_FP))
    for tokens in in_turn(len(x_NP), n_rows):
        yield tokens, product(x_NP[tokens], W_FP.T, out=s_BF[: tokens.stop - tokens.start])


def _linear(s: Tensor, columns: Tensor, scores: Scores) -> Tensor:
    """`x W` from `s`; where the scale is 0, so that `s` is, less the bias alone."""
    if scores.scale_F is not None:
        scale = scores.scale_F[columns]
        s = torch.where(scale > 0, s / scale, 0.0)
    return s - scores.b_F[columns]


def _with_ones(x_ND: Tensor) -> Tensor:
    """Inputs in bfloat16, with a one for each part of the bias."""
    n_tokens, width = x_ND.shape
    x_NP = x_ND.new_empty(n_tokens, _padded(width), dtype=torch.bfloat16)
    x_NP[:, :width] = x_ND
    fill(x_NP[:, width:], [x_ND.new_ones(n_tokens)] * BIAS_PARTS)
    return x_NP


def _scaled(scores: Scores) -> Tensor:
    """Weights in bfloat16, latent-major, with their bias."""
    W_FD, b_F, scale_F = scores.W_DF.T, scores.b_F, scores.scale_F
    width = W_FD.shape[1]
    W_FP = W_FD.new_empty(len(b_F), _padded(width), dtype=torch.bfloat16)
    if scale_F is None:
        W_FP[:, :width] = W_FD
    else:
        for W_JP, W_JD, scale_J in zip(*(t.split(machine.ROUNDED_ROWS) for t in (W_FP, W_FD, scale_F)), strict=True):
            W_JP[:, :width] = W_JD * scale_J[:, None]
    fill(W_FP[:, width:], in_parts(b_F if scale_F is None else b_F * scale_F, BIAS_PARTS))
    return W_FP


def _padded(width: int) -> int:
    return -(-(width + BIAS_PARTS) // machine.PRODUCT_WIDTH) * machine.PRODUCT_WIDTH
