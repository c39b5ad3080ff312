"""Upper bounds of all pre-activations from one product in bfloat16.

With `w` a latent's weights times its scale, `x'` an input less the batch's mean, and `b(.)` rounding to bfloat16, of
relative error `u = 2^-8` at most, Cauchy-Schwarz gives

    |x' w - b(x') b(w)| <= ||x' - b(x')|| ||w|| + ||x'|| (1 + u) ||w - b(w)||

which are two more terms of the product, as are bias and mean (in three parts, whose rounding errors do not matter).

Letters: N tokens, B tokens of a block, D width, F latents, J latents at a time, E entries, P padded width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.latents import kernels
from lm_saes.latents.segments import offsets_of_rows

BLOCK_BYTES = 38 << 20
"""Size of one block of bounds."""
LATENTS_AT_ONCE = 512
"""So many latents' weights are scaled and rounded at a time."""
UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
SLACK = 1 + 2.0**-6
"""Covers what the bounds themselves lose by being computed in floating point."""
WIDTH_OF = 32
"""Products are fastest in widths that this divides."""


class Bounds:
    """Inputs and weights of one step, ready to bound `s = (x W + b) * scale` from above.

    Args:
        x_ND: all inputs of the step, float32.
        W_DF: encoder weights, float32; best stored latent-major.
        scale_F: what `x W + b` is multiplied by before it is compared.
    """

    def __init__(self, x_ND: Tensor, W_DF: Tensor, b_F: Tensor, scale_F: Tensor | None) -> None:
        self.x_ND, self.W_FD, self.b_F, self.scale_F = x_ND, W_DF.T.contiguous(), b_F, scale_F
        n_latents, width = self.W_FD.shape
        mean_D = x_ND.mean(0)
        padded = -(-(width + 5) // WIDTH_OF) * WIDTH_OF
        self._x_NP = x_ND.new_empty(len(x_ND), padded, dtype=torch.bfloat16)
        norm_N, lost_N = _round(x_ND - mean_D, self._x_NP[:, :width])
        lost_N += 2**-18 * torch.linalg.vector_norm(x_ND, dim=1)  # float32 sums, here and in the values themselves
        ones_N = torch.ones_like(norm_N)
        fill(self._x_NP[:, width:], [ones_N, ones_N, ones_N, lost_N * SLACK, norm_N * SLACK])
        self._W_FP = x_ND.new_empty(n_latents, padded, dtype=torch.bfloat16)
        shift_F, norm_F, lost_F = (torch.empty_like(b_F) for _ in range(3))
        for start in range(0, n_latents, LATENTS_AT_ONCE):
            some = slice(start, start + LATENTS_AT_ONCE)
            w_JD = self.W_FD[some] if scale_F is None else self.W_FD[some] * scale_F[some, None]
            torch.mv(w_JD, mean_D, out=shift_F[some])
            norm_F[some], lost_F[some] = _round(w_JD, self._W_FP[some, :width])
        shift_F += b_F if scale_F is None else b_F * scale_F
        fill(self._W_FP[:, width:], [*in_parts(shift_F, 3), norm_F * SLACK, lost_F * SLACK])

    def blocks(self, first: int) -> list[slice]:
        """The tokens, in blocks; the first may be smaller."""
        n_tokens, size = len(self.x_ND), max(1, BLOCK_BYTES // (2 * len(self.W_FD)))
        starts = [0, *range(min(first, n_tokens), n_tokens, size)]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], n_tokens], strict=True) if a < b]

    def of(self, tokens: slice) -> Tensor:
        """Bounds of some tokens, bfloat16 `[B, F]`: no `s` exceeds its bound by more than the rounding of the bound."""
        return torch.mm(self._x_NP[tokens], self._W_FP.T)

    def exact(self, tokens: slice, rows_E: Tensor, columns_E: Tensor) -> tuple[Tensor, Tensor]:
        """`x W` and `s` at some entries, by row, in float32."""
        offsets = offsets_of_rows(rows_E, len(self.x_ND[tokens]))
        products_E = kernels.row_dot(self.x_ND[tokens], self.W_FD, rows_E.int(), columns_E.int(), offsets)
        s_E = products_E + self.b_F.index_select(0, columns_E)
        return products_E, s_E if self.scale_F is None else s_E.mul_(self.scale_F.index_select(0, columns_E))


def loosened(bound: Tensor) -> Tensor:
    """What nothing exceeds that has at most this (rounded) bound, in float32."""
    bound = bound.float()
    return bound + 2 * UNIT * bound.abs()


def _round(v_XD: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to `out`, in bfloat16; the norm of each, and of what rounding took from it."""
    out.copy_(v_XD)
    return torch.linalg.vector_norm(v_XD, dim=1), torch.linalg.vector_norm(v_XD - out, dim=1)


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
