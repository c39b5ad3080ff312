"""Mixtures of low-rank linear maps: what a sparse code makes of its inputs when each latent is a map, not a direction.

Only the maps of active entries are applied, and no `[D, D]` matrix is ever formed. Three ways, with the same result:
- few entries, low rank: each of the r directions of every map is read and written as an autoencoder's decoder is;
- few entries, high rank: latent by latent, each map is two small matrix products over the rows it is active on;
- many entries: two products with all the maps of one rank.
All sums run in a fixed order.

Letters: N rows (tokens), F latents, D width, E entries of the code, n maps of one rank r, m entries of one map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents import kernels
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.offsets import offsets_of_lengths
from lm_saes.latents.selection.selector import sparse_pays


@dataclass(frozen=True, eq=False)
class Transforms:
    """Linear maps `T_i = U_i V_i`, in groups of one rank; latents number them through all groups."""

    groups: Sequence[tuple[Tensor, Tensor]]
    """`U [n, D, r]`, best stored rank-major (`U.mT` contiguous), and `V [n, r, D]` of each group."""

    def norms(self) -> Tensor:
        """`||U_i V_i||_F`, `[F]`, as the root of `tr((U_i^T U_i)(V_i V_i^T))`; differentiable, with gradient 0 at 0."""
        return torch.cat([_norms(U_nDr, V_nrD) for U_nDr, V_nrD in self.groups])

    def select(self, latents: Tensor) -> Transforms:
        """Some of the maps, `latents` (int64, ascending) naming them; differentiable."""
        groups, first = [], 0
        for U_nDr, V_nrD in self.groups:
            here = latents[(latents >= first) & (latents < first + len(U_nDr))] - first
            groups.append((U_nDr.mT.index_select(0, here).mT, V_nrD.index_select(0, here)))
            first += len(U_nDr)
        return Transforms(groups)

    def mix(self, code: Code, x_ND: Tensor) -> Tensor:
        """`y_n = sum_i f_ni U_i V_i x_n`, `[N, D]`; gradients to the code's values, to the maps and to `x`."""
        y_ND, first = torch.zeros_like(x_ND), 0
        for U_nDr, V_nrD in self.groups:
            part = _part(code, first, len(U_nDr))
            if isinstance(part, DenseCode):
                y_ND = y_ND + _dense(part.values, x_ND, U_nDr, V_nrD)
            else:
                mix = _by_direction if V_nrD.shape[1] < machine.LOW_RANK else _by_latent
                y_ND = y_ND + mix(part, x_ND, U_nDr, V_nrD)
            first += len(U_nDr)
        return y_ND


def active_code(f_NF: Tensor) -> Code:
    """A code of the entries of `f` that are not 0, if they are few. Zeros then get no gradient."""
    active_NF = f_NF != 0
    lengths_N = active_NF.sum(1)
    if not sparse_pays(int(lengths_N.sum()), f_NF.numel() * machine.TRANSFORM_DENSITY_SCALE):
        return DenseCode(f_NF)
    flat_E = active_NF.view(-1).nonzero().squeeze(1)
    indices_E = (flat_E % f_NF.shape[1]).to(torch.int32)
    pattern = Pattern(indices_E, offsets_of_lengths(lengths_N), f_NF.shape[1])
    return SparseCode(f_NF.reshape(-1).index_select(0, flat_E), pattern)


def _norms(U_nDr: Tensor, V_nrD: Tensor) -> Tensor:
    with torch.autocast(U_nDr.device.type, enabled=False):
        dtype = U_nDr.dtype
        U_nDr, V_nrD = U_nDr.to(_summable(dtype)), V_nrD.to(_summable(dtype))
        square_n = (torch.bmm(U_nDr.mT, U_nDr) * torch.bmm(V_nrD, V_nrD.mT)).sum((1, 2))
        some_n = square_n > 0
        return torch.where(some_n, torch.where(some_n, square_n, 1.0).sqrt(), 0.0).to(dtype)


def _summable(dtype: torch.dtype) -> torch.dtype:
    """A type that sums can be made in: half precision becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def _part(code: Code, first: int, n: int) -> SparseCode | DenseCode:
    """The latents from `first` on, n of them, as a code of their own."""
    if not isinstance(code, SparseCode):
        return DenseCode(code.dense()[:, first : first + n])
    here_E = (code.indices >= first) & (code.indices < first + n)
    entries = here_E.nonzero().squeeze(1)
    offsets = offsets_of_lengths(here_E).index_select(0, code.offsets)
    pattern = Pattern(code.indices.index_select(0, entries) - first, offsets, n)
    return SparseCode(code.values.index_select(0, entries), pattern)


def _dense(f_Nn: Tensor, x_ND: Tensor, U_nDr: Tensor, V_nrD: Tensor) -> Tensor:
    inner_NR = x_ND @ V_nrD.flatten(0, 1).mT
    weighed_NR = (inner_NR.view(*f_Nn.shape, V_nrD.shape[1]) * f_Nn[:, :, None]).flatten(1)
    return weighed_NR @ U_nDr.mT.flatten(0, 1)


def _by_direction(code: SparseCode, x_ND: Tensor, U_nDr: Tensor, V_nrD: Tensor) -> Tensor:
    y_ND = torch.zeros_like(x_ND)
    for U_nD, V_nD in zip(U_nDr.mT.unbind(1), V_nrD.unbind(1), strict=True):
        inner_E: Tensor = _Read.apply(x_ND, V_nD, code.pattern)  # type: ignore[assignment]
        y_ND = y_ND + SparseCode(code.values * inner_E, code.pattern).decode(U_nD)
    return y_ND


def _by_latent(code: SparseCode, x_ND: Tensor, U_nDr: Tensor, V_nrD: Tensor) -> Tensor:
    order, rows_E, offsets = code.pattern.by_latent
    return _Mix.apply(x_ND, code.values.index_select(0, order), U_nDr, V_nrD, rows_E, offsets.tolist())  # type: ignore[return-value]


class _Read(torch.autograd.Function):
    """`out[e] = <x[row of e], V[latent of e]>` for every entry."""

    @staticmethod
    def forward(ctx, x_ND, V_nD, pattern):  # type: ignore[override]
        ctx.pattern = pattern
        V_nD = V_nD.contiguous()
        ctx.save_for_backward(x_ND, V_nD)
        return kernels.row_dot(x_ND, V_nD, pattern.rows, pattern.indices, pattern.offsets)

    @staticmethod
    def backward(ctx, dout_E):  # type: ignore[override]
        x_ND, V_nD = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        dx = kernels.gather_sum(dout_E, pattern.indices, pattern.offsets, V_nD) if ctx.needs_input_grad[0] else None
        return dx, pattern.latent_sum(dout_E, x_ND), None


class _Mix(torch.autograd.Function):
    """`y_n = sum over the entries e of row n of f_e U_i V_i x_n`; entries lie latent by latent, within `bounds`."""

    @staticmethod
    def forward(ctx, x_ND, f_E, U_nDr, V_nrD, rows_E, bounds):  # type: ignore[override]
        y_ND = torch.zeros_like(x_ND, dtype=_summable(x_ND.dtype))
        inner_Er = x_ND.new_empty(len(f_E), V_nrD.shape[1])
        with torch.autocast(x_ND.device.type, enabled=False):
            for i, span in _active(bounds):
                rows_m, z_mr = rows_E[span], inner_Er[span]
                torch.mm(x_ND.index_select(0, rows_m), V_nrD[i].mT, out=z_mr)
                y_mD = (z_mr * f_E[span, None]) @ U_nDr[i].mT
                y_ND.index_add_(0, rows_m, y_mD.to(y_ND.dtype))
        ctx.bounds = bounds
        ctx.save_for_backward(x_ND, f_E, U_nDr, V_nrD, rows_E, inner_Er)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[override]
        x_ND, f_E, U_nDr, V_nrD, rows_E, inner_Er = ctx.saved_tensors
        df_E, dU_nrD, dV_nrD = torch.empty_like(f_E), torch.zeros_like(V_nrD), torch.zeros_like(V_nrD)
        dx_ND = torch.zeros_like(x_ND, dtype=_summable(x_ND.dtype)) if ctx.needs_input_grad[0] else None
        for i, span in _active(ctx.bounds):
            rows_m, f_m1, z_mr = rows_E[span], f_E[span, None], inner_Er[span]
            dy_mD = dy_ND.index_select(0, rows_m)
            dfz_mr = dy_mD @ U_nDr[i]
            dz_mr = dfz_mr * f_m1
            df_E[span] = (dfz_mr * z_mr).sum(1)
            torch.mm((z_mr * f_m1).mT, dy_mD, out=dU_nrD[i])
            torch.mm(dz_mr.mT, x_ND.index_select(0, rows_m), out=dV_nrD[i])
            if dx_ND is not None:
                dx_ND.index_add_(0, rows_m, (dz_mr @ V_nrD[i]).to(dx_ND.dtype))
        return None if dx_ND is None else dx_ND.to(x_ND.dtype), df_E, dU_nrD.mT, dV_nrD, None, None


def _active(bounds: list[int]) -> Iterator[tuple[int, slice]]:
    """The maps that have entries, and where these are."""
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            yield i, slice(start, stop)
