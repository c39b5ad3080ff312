"""Exact top-k selection at a fraction of a float32 product, on processors that multiply faster in bfloat16.

A bfloat16 product bounds every pre-activation from above; the entries with the largest bounds are computed again in
float32, and the k best of these are the k best of all if the worst of them reaches the bound of everything left out.
Rows for which this cannot be shown are looked at in float32 as a whole. What is selected, and its values, are those of
float32 arithmetic: only the search is done in less.

With `w` a latent's weights times its scale, `x'` an input less the batch's mean, and `b(.)` rounding to bfloat16, of
relative error `u = 2^-8` at most, Cauchy-Schwarz gives

    |x' w - b(x') b(w)| <= ||x' - b(x')|| ||w|| + ||x'|| (1 + u) ||w - b(w)||

which are two more terms of the product, as are bias and mean (in three parts, whose rounding errors do not matter).

Letters: N tokens, B tokens of a block, D width, F latents, C candidates of a token, k of them kept, P padded width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.latents import kernels
from lm_saes.latents.products import cpu_computes_in, product, product_dtype, rows_at_once

BLOCK_BYTES = 38 << 20
"""Size of one block of bounds."""
PROBE_ROWS = 128
"""So many tokens are tried first."""
WORTH_WHILE = 0.25
"""Screening goes on if it fails for no more than this share of them."""
LARGE = 1 << 28
"""Multiplications of a product that is worth screening."""
UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
SLACK = 1 + 2.0**-6
"""Covers what the bounds themselves lose by being computed in floating point."""
LATENTS_AT_ONCE = 512
"""So many latents' weights are scaled and rounded at a time."""
WIDTH_OF = 32
"""Products are fastest in widths that this divides."""


def screening_pays(x_ND: Tensor, n_latents: int, k: int) -> bool:
    """Whether to try: float32 on a processor with faster half precision, and enough to multiply."""
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == torch.float32
        and len(x_ND) * x_ND.shape[1] * n_latents >= LARGE
        and 16 * k <= n_latents
        and cpu_computes_in(torch.bfloat16)
    )


def top_products(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int
) -> tuple[Tensor, Tensor] | None:
    """The k largest `s = (x W + b) * scale` of each token: their columns and `x W` there, both `[N, k]`.

    None if bounds turn out too loose for these inputs. Everything float32, on a CPU.
    """
    screen, found = _Screen(x_ND, W_DF, b_F, scale_F), list[_Screened]()
    for tokens in screen.blocks():
        found.append(screen.top(tokens, k))
        if tokens.start == 0 and float(found[0].proven_B.float().mean()) < 1 - WORTH_WHILE:
            return None
    columns_Nk, products_Nk = torch.cat([f.columns_Bk for f in found]), torch.cat([f.products_Bk for f in found])
    rest_X = torch.cat([~f.proven_B for f in found]).nonzero().squeeze(1)
    if len(rest_X):
        columns_Nk[rest_X], products_Nk[rest_X] = top_in_full(x_ND[rest_X], W_DF, b_F, scale_F, k)
    return columns_Nk, products_Nk


def top_in_full(x_ND: Tensor, W_DF: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """What `top_products` gives, from whole products in the type that autocast asks for, block by block."""
    dtype = product_dtype(x_ND)
    x_ND, W_DF = x_ND.to(dtype), W_DF.to(dtype)
    shift_F = b_F if scale_F is None else b_F * scale_F
    n_rows = max(1, rows_at_once(x_ND.device, b_F.element_size() * len(b_F)))
    product_BF = b_F.new_empty(min(len(x_ND), n_rows), len(b_F))
    found: list[tuple[Tensor, Tensor]] = []
    for x_BD in x_ND.split(n_rows):
        some_BF = product(x_BD, W_DF, out=product_BF[: len(x_BD)])
        columns_Bk = kernels.top_of_product(some_BF, scale_F, shift_F, k)
        found.append((columns_Bk, some_BF.gather(1, columns_Bk)))
    return torch.cat([c for c, _ in found]), torch.cat([p for _, p in found])


@dataclass(frozen=True, eq=False)
class _Screened:
    columns_Bk: Tensor
    products_Bk: Tensor
    proven_B: Tensor
    """Whether nothing else can be among the positive ones of the k largest."""


class _Screen:
    """The weights of one step, ready to screen blocks of tokens.

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
        _fill(self._x_NP[:, width:], [ones_N, ones_N, ones_N, lost_N * SLACK, norm_N * SLACK])
        self._W_FP = x_ND.new_empty(n_latents, padded, dtype=torch.bfloat16)
        shift_F, norm_F, lost_F = (torch.empty_like(b_F) for _ in range(3))
        for start in range(0, n_latents, LATENTS_AT_ONCE):
            some = slice(start, start + LATENTS_AT_ONCE)
            w_JD = self.W_FD[some] if scale_F is None else self.W_FD[some] * scale_F[some, None]
            torch.mv(w_JD, mean_D, out=shift_F[some])
            norm_F[some], lost_F[some] = _round(w_JD, self._W_FP[some, :width])
        shift_F += b_F if scale_F is None else b_F * scale_F
        _fill(self._W_FP[:, width:], [*_in_parts(shift_F, 3), norm_F * SLACK, lost_F * SLACK])

    def blocks(self) -> list[slice]:
        """The tokens, in blocks; the first, small one tells whether to go on."""
        n_tokens, size = len(self.x_ND), max(PROBE_ROWS, BLOCK_BYTES // (2 * len(self.W_FD)))
        starts = [0, *range(min(PROBE_ROWS, n_tokens), n_tokens, size)]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], n_tokens], strict=True) if a < b]

    def top(self, tokens: slice, k: int) -> _Screened:
        """The k largest `s` of each token."""
        bounds_BF = torch.mm(self._x_NP[tokens], self._W_FP.T)
        n_tokens, n_latents = bounds_BF.shape
        rows_E, columns_E, outside_B = _above_the_best(bounds_BF, min(k + 3 * k // 4, n_latents))
        counts_B = torch.bincount(rows_E, minlength=n_tokens)
        offsets = torch.zeros(n_tokens + 1, dtype=torch.int32)
        offsets[1:] = counts_B.cumsum(0)
        products_E = kernels.row_dot(self.x_ND[tokens], self.W_FD, rows_E.int(), columns_E.int(), offsets)
        s_E = products_E + self.b_F.index_select(0, columns_E)
        if self.scale_F is not None:
            s_E *= self.scale_F.index_select(0, columns_E)
        width = int(counts_B.max())
        places_E = torch.arange(len(s_E)) - (offsets[:-1].long() - torch.arange(n_tokens) * width).index_select(
            0, rows_E
        )
        s_BC = s_E.new_full((n_tokens * width,), -torch.inf).index_copy_(0, places_E, s_E).view(n_tokens, width)
        entry_BC = places_E.new_zeros(n_tokens * width).index_copy_(0, places_E, torch.arange(len(s_E)))
        best = s_BC.topk(min(k, width), dim=1, sorted=False)
        entries_Bk = entry_BC.view(n_tokens, width).gather(1, best.indices)
        least_B = best.values.amin(1).clamp(min=0)
        proven_B = least_B >= outside_B + 2 * UNIT * outside_B.abs()
        return _Screened(columns_E[entries_Bk], products_E[entries_Bk], proven_B)


def _above_the_best(bounds_BF: Tensor, n: int, groups_of: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """At least the n largest entries of each row (rows and columns, by row), and what the others do not exceed, `[B]`.

    Groups of columns (a group is what leaves the same remainder) are compared by their maxima; the entries that reach
    the n-th largest maximum lie in the groups of the n largest.
    """
    n_rows, n_latents = bounds_BF.shape
    n_groups = n_latents // groups_of
    if n_latents % groups_of or n_groups < 2 * n:
        best = bounds_BF.topk(n, dim=1, sorted=False)
        rows = torch.arange(n_rows).repeat_interleave(n)
        return rows, best.indices.view(-1), best.values.amin(1).float()
    maxima = bounds_BF.view(n_rows, groups_of, n_groups).amax(1).topk(n, dim=1, sorted=False)
    least_B = maxima.values.amin(1)
    within = torch.arange(0, n_latents, n_groups)
    columns_BX = (maxima.indices[:, :, None] + within).view(n_rows, -1)
    flat = (columns_BX + torch.arange(0, bounds_BF.numel(), n_latents)[:, None]).view(-1)
    values_BX = bounds_BF.view(-1).index_select(0, flat).view(n_rows, -1)
    chosen = (values_BX >= least_B[:, None]).view(-1).nonzero().squeeze(1)
    return chosen // columns_BX.shape[1], columns_BX.view(-1).index_select(0, chosen), least_B.float()


def _round(v_XD: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to `out`, in bfloat16; the norm of each, and of what rounding took from it."""
    out.copy_(v_XD)
    return torch.linalg.vector_norm(v_XD, dim=1), torch.linalg.vector_norm(v_XD - out, dim=1)


def _in_parts(v_F: Tensor, n: int) -> list[Tensor]:
    """A float32 vector as n bfloat16 ones that add up to it."""
    parts = []
    for _ in range(n):
        parts.append(v_F.to(torch.bfloat16))
        v_F = v_F - parts[-1]
    return parts


def _fill(out_XP: Tensor, columns: list[Tensor]) -> None:
    """Columns `[X]` side by side, then zeros."""
    out_XP[:, len(columns) :] = 0
    out_XP[:, : len(columns)] = torch.stack([column.to(torch.bfloat16) for column in columns], 1)
