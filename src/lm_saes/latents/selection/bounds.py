"""Upper bounds of all pre-activations from one product in bfloat16.

With `w` a latent's weights times its scale, `x'` an input less the batch's mean, and `b(.)` rounding to bfloat16, of
relative error `u = 2^-8` at most, Cauchy-Schwarz gives

    |x' w - b(x') b(w)| <= ||x' - b(x')|| ||w|| + ||x'|| (1 + u) ||w - b(w)||

which are two more terms of the product, as are bias and mean (in three parts, whose rounding errors do not matter).

Letters: N tokens, B tokens of a block, D width, F latents, J rows at a time, E entries, P padded width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents import kernels
from lm_saes.latents.offsets import offsets_of_rows
from lm_saes.latents.selection.scores import Scores

UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
SLACK = 1 + 2.0**-6
"""Covers what the bounds themselves lose by being computed in floating point."""


class Bounds:
    """Inputs and weights of one step, ready to bound `s = (x W + b) * scale` from above.

    Args:
        scores: those of all inputs of the step, float32.
    """

    def __init__(self, scores: Scores) -> None:
        x_ND, b_F, scale_F = scores.x_ND, scores.b_F, scores.scale_F
        self.x_ND, self.W_FD, self.b_F, self.scale_F = x_ND, scores.W_DF.T.contiguous(), b_F, scale_F
        n_latents, width = self.W_FD.shape
        mean_D = x_ND.mean(0)
        padded = -(-(width + 5) // machine.PRODUCT_WIDTH) * machine.PRODUCT_WIDTH
        self._x_NP = x_ND.new_empty(len(x_ND), padded, dtype=torch.bfloat16)
        norm_N, lost_N = x_ND.new_empty(2, len(x_ND))
        scratch = x_ND.new_empty(2, machine.ROUNDED_ROWS, width)
        for some in in_turn(len(x_ND)):
            x_JD = torch.sub(x_ND[some], mean_D, out=scratch[0, : len(x_ND[some])])
            _round(x_JD, self._x_NP[some, :width], norm_N[some], lost_N[some], scratch[1])
        lost_N += 2**-18 * torch.linalg.vector_norm(x_ND, dim=1)  # float32 sums, here and in the values themselves
        ones_N = torch.ones_like(norm_N)
        fill(self._x_NP[:, width:], [ones_N, ones_N, ones_N, lost_N * SLACK, norm_N * SLACK])
        self._W_FP = x_ND.new_empty(n_latents, padded, dtype=torch.bfloat16)
        shift_F, norm_F, lost_F = b_F.new_empty(3, n_latents)
        for some in in_turn(n_latents):
            w_JD = scratch[0, : len(shift_F[some])]
            torch.mul(self.W_FD[some], 1.0 if scale_F is None else scale_F[some, None], out=w_JD)
            torch.mv(w_JD, mean_D, out=shift_F[some])
            _round(w_JD, self._W_FP[some, :width], norm_F[some], lost_F[some], scratch[1])
        shift_F += b_F if scale_F is None else b_F * scale_F
        fill(self._W_FP[:, width:], [*in_parts(shift_F, 3), norm_F * SLACK, lost_F * SLACK])

    def blocks(self) -> Iterator[slice]:
        """The tokens, in blocks."""
        return in_turn(len(self.x_ND), max(1, machine.BOUNDS_BLOCK_BYTES // (2 * len(self.W_FD))))

    def of(self, tokens: slice) -> Tensor:
        """Bounds of some tokens, bfloat16 `[B, F]`: no `s` exceeds its bound by more than the rounding of the bound."""
        return torch.mm(self._x_NP[tokens], self._W_FP.T)

    def exact(self, x_BD: Tensor, rows_E: Tensor, columns_E: Tensor) -> tuple[Tensor, Tensor]:
        """`x W` and `s` of some inputs at some entries, by row, in float32."""
        offsets = offsets_of_rows(rows_E, len(x_BD))
        products_E = kernels.row_dot(x_BD, self.W_FD, rows_E.int(), columns_E.int(), offsets)
        s_E = products_E + self.b_F.index_select(0, columns_E)
        return products_E, s_E if self.scale_F is None else s_E.mul_(self.scale_F.index_select(0, columns_E))


def loosened(bound: Tensor) -> Tensor:
    """What nothing exceeds that has at most this (rounded) bound, in float32."""
    bound = bound.float()
    return bound + 2 * UNIT * bound.abs()


def in_turn(n_rows: int, size: int = machine.ROUNDED_ROWS) -> Iterator[slice]:
    """Rows, at most so many at a time."""
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


def _round(v_JD: Tensor, out: Tensor, norm_J: Tensor, lost_J: Tensor, scratch: Tensor) -> None:
    """Write rows rounded to bfloat16, the norm of each, and of what rounding takes from it."""
    torch.linalg.vector_norm(v_JD, dim=1, out=norm_J)
    lost_JD = scratch[: len(v_JD)].copy_(out.copy_(v_JD)).sub_(v_JD)
    torch.linalg.vector_norm(lost_JD, dim=1, out=lost_J)


def in_parts(v_F: Tensor, n: int) -> list[Tensor]:
    """A float32 vector as n bfloat16 ones that add up to it."""
    parts = []
    for _ in range(n):
        parts.append(v_F.to(torch.bfloat16))
        v_F = v_F - parts[-1]
    return parts


def fill(out_XP: Tensor, columns: list[Tensor]) -> None:
    """Columns `[X]` side by side, then zeros."""
    out_XP[:, len(columns) :] = 0
    out_XP[:, : len(columns)] = torch.stack([column.to(torch.bfloat16) for column in columns], 1)
