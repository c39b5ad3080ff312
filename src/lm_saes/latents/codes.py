"""Codes: the latents of a batch between encode and decode, as the entries that are active.

A sparse code lists entries row by row; a dense code holds every entry, for batches so dense that dense products are
faster. Both have the same verbs, so that losses and metrics are written once. In both an entry is active if and only
if its value is positive: an entry with value 0 counts nowhere (but its gradient is well defined, which JumpReLU's
threshold needs).

A code may have several sites (a cross-layer transcoder's layers, a crosscoder's heads): its rows are then
(token, site), token-major, and what belongs to latents has one row per site.

Letters: N rows, S sites, F latents, D width, E entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import ALONE, Axis
from lm_saes.latents import kernels
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.gradients.rows import RowGradients, receiver
from lm_saes.latents.offsets import offsets_of_lengths, offsets_of_rows


@dataclass(frozen=True)
class Identity:
    """`u`, as a function of one entry."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class Tanh:
    """`tanh(c u)`, as a function of one entry."""

    c: float

    def __call__(self, u: Tensor) -> Tensor:
        return torch.tanh(self.c * u)


EntryFunction = Identity | Tanh


class Code(ABC):
    """What losses and metrics may ask of a batch's latents, sparse or dense."""

    n_rows: int
    n_latents: int
    n_sites: int = 1
    hidden: Hidden | None = None
    """The dense pre-activations that the code was selected from, where they were kept."""
    values: Tensor
    """The value of each entry: `[E]` if sparse, `[N, F]` if dense; differentiable."""

    @abstractmethod
    def at(self, v_F: Tensor) -> Tensor:
        """`v` (`[F]` or `[S, F]`) of each entry's latent, shaped like (or broadcasting to) `values`; differentiable."""

    @abstractmethod
    def of_row(self, v_N: Tensor) -> Tensor:
        """`v` of each entry's row, shaped like (or broadcasting to) `values`."""

    @abstractmethod
    def sum_rows(self, entries: Tensor) -> Tensor:
        """Sum of `entries` (shaped like `values`) over each row: `[N]`; differentiable."""

    @abstractmethod
    def sum_latents(self, entries: Tensor) -> Tensor:
        """Sum of `entries` (shaped like `values`) over each latent: `[F]`, or `[S, F]`; differentiable."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The latents as `[N, F]`."""

    @abstractmethod
    def decode(self, W_FD: Tensor) -> Tensor:
        """`f W`: `[N, D]`, with gradients to the values and to `W` (`[F, ...]`, or `[S, F, D]`: each site its own)."""

    @abstractmethod
    def of_sites(self, sites: range, axis: Axis = ALONE) -> Code:
        """The latents of some neighbouring sites as a code; along the axis, gradients of the others' are added."""

    def site(self, site: int) -> Code:
        """The latents of one site as a code of its own, one row per token."""
        return self.of_sites(range(site, site + 1))

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, latents and values of the active entries, ordered by row."""
        dense = self.dense().detach()
        rows, latents = (dense > 0).nonzero(as_tuple=True)
        return rows, latents, dense[rows, latents]

    @torch.no_grad()
    def counts(self, mask_N: Tensor | None = None) -> Tensor:
        """On how many rows (of those in the mask) each latent is active: `[F]`, or `[S, F]`."""
        return self._valid_sums((self.values > 0).to(torch.float32), mask_N)

    @torch.no_grad()
    def totals(self, mask_N: Tensor | None = None) -> Tensor:
        """Sum of each latent's values over the rows in the mask: `[F]`, or `[S, F]`."""
        return self._valid_sums(self.values, mask_N)

    def latent_sums(self, function: EntryFunction, v_F: Tensor, mask_N: Tensor | None) -> Tensor:
        """`sum of function(v f)` over the rows in the mask: `[F]` (`[S, F]`); differentiable in the values and `v`."""
        entries = function(self.values * self.at(v_F))
        return self._valid_sums(entries.to(torch.promote_types(entries.dtype, torch.float32)), mask_N)

    def _by_rows(self, W_FD: Tensor) -> Tensor:
        """What `decode` takes as one row for each latent of each site."""
        several = W_FD.shape[:-1].numel() > self.n_sites * self.n_latents  # rows of one latent
        return W_FD.flatten(1) if several else W_FD.flatten(0, -2)

    def _valid_sums(self, entries: Tensor, mask_N: Tensor | None) -> Tensor:
        return self.sum_latents(entries if mask_N is None else entries * self.of_row(mask_N.to(entries.dtype)))


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the entries of a sparse code are; the transpose is made once and shared by every gradient and count."""

    indices: Tensor
    """Latent of each entry, `[E]` int32, row by row; with several sites `site * F + latent`."""
    offsets: Tensor
    """Where each row begins, `[N + 1]` int32."""
    n_latents: int
    """How many latents the indices number: F, or S * F."""

    @property
    def n_rows(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def rows(self) -> Tensor:
        """Row of each entry, `[E]` int32."""
        rows = torch.arange(self.n_rows, dtype=torch.int32, device=self.offsets.device)
        lengths = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(rows, lengths, output_size=self.indices.numel())

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose: order of the entries by latent, their rows in that order, and each latent's offsets."""
        order, offsets = kernels.transpose(self.indices, self.n_latents)
        return order, self.rows[order], offsets

    def take(self, places: Tensor) -> Pattern:
        """Some of the entries, `places` (ascending) naming them."""
        offsets = offsets_of_rows(self.rows.index_select(0, places), self.n_rows)
        return Pattern(self.indices.index_select(0, places), offsets, self.n_latents)

    @cached_property
    def touched(self) -> tuple[Tensor, Tensor]:
        """The latents that have entries, ascending `[U]` int32, and their offsets among the entries by latent."""
        offsets = self.by_latent[2]
        latents = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
        return latents.to(torch.int32), torch.cat([offsets.index_select(0, latents), offsets[-1:]])

    def latent_sum(self, weights_E: Tensor, table_ND: Tensor) -> Tensor:
        """`out[f] = sum over entries e of latent f of weights[e] * table[rows[e]]`: `[F, D]`."""
        order, rows, offsets = self.by_latent
        return kernels.gather_sum(weights_E[order], rows, offsets, table_ND)

    def row_dot(self, left_ND: Tensor, table_FD: Tensor) -> Tensor:
        """`out[e] = <left[rows[e]], table[indices[e]]>`; on a CPU latent by latent: the table is read once."""
        if table_FD.device.type != "cpu":
            return kernels.row_dot(left_ND, table_FD, self.rows, self.indices, self.offsets)
        order, rows, offsets = self.by_latent
        products_E = kernels.row_dot(table_FD, left_ND, self.indices[order], rows, offsets)
        return torch.empty_like(products_E).index_copy_(0, order, products_E)

    def weight_gradient(self, weights_E: Tensor, table_ND: Tensor, taken_by: RowGradients | None) -> Tensor | None:
        """What `latent_sum` gives; None if somebody takes it, as the rows of the latents that have entries."""
        if taken_by is None:
            return self.latent_sum(weights_E, table_ND)
        order, rows, _ = self.by_latent
        latents, offsets = self.touched
        taken_by.add(self.n_latents, latents, kernels.gather_sum(weights_E[order], rows, offsets, table_ND))
        return None

    def latent_total(self, weights_E: Tensor) -> Tensor:
        """`out[f] = sum over entries e of latent f of weights[e]`: `[F]`."""
        return weights_E.new_zeros(self.n_latents).index_add_(0, self.indices, weights_E)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_E, W_FD, pattern, taken_by):  # type: ignore[override]
        ctx.pattern, ctx.taken_by = pattern, taken_by
        ctx.save_for_backward(values_E, W_FD)
        return kernels.gather_sum(values_E, pattern.indices, pattern.offsets, W_FD)

    @staticmethod
    def backward(ctx, dy_ND: Tensor):  # type: ignore[override]
        values_E, W_FD = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        dy_ND = dy_ND.contiguous()
        dvalues = dW = None
        if ctx.needs_input_grad[0]:
            dvalues = pattern.row_dot(dy_ND, W_FD)
        if ctx.needs_input_grad[1]:
            dW = pattern.weight_gradient(values_E, dy_ND, ctx.taken_by)
        return dvalues, dW, None, None


class SparseCode(Code):
    """Entries row by row: `values [E]`, `indices [E]`, `offsets [N + 1]`; `even`: all sites have equally many."""

    def __init__(self, values: Tensor, pattern: Pattern, n_sites: int = 1, even: bool = False) -> None:
        self.values, self.pattern, self.n_sites, self.even = values, pattern, n_sites, even
        self.n_rows, self.n_latents = pattern.n_rows, pattern.n_latents // n_sites

    @cached_property
    def indices(self) -> Tensor:
        """Latent of each entry, `[E]` int32."""
        return self.pattern.indices if self.n_sites == 1 else self.pattern.indices % self.n_latents

    @property
    def offsets(self) -> Tensor:
        """Where each row begins, `[N + 1]` int32."""
        return self.pattern.offsets

    @property
    def rows(self) -> Tensor:
        """Row of each entry, `[E]` int32."""
        return self.pattern.rows

    def at(self, v_F: Tensor) -> Tensor:
        if v_F.ndim == 1:
            return v_F.index_select(0, self.indices)
        return v_F.reshape(-1).index_select(0, self.pattern.indices)

    def of_row(self, v_N: Tensor) -> Tensor:
        return v_N.index_select(0, self.rows)

    def sum_rows(self, entries: Tensor) -> Tensor:
        return entries.new_zeros(self.n_rows).index_add(0, self.rows, entries)

    def sum_latents(self, entries: Tensor) -> Tensor:
        sums = entries.new_zeros(self.pattern.n_latents).index_add(0, self.pattern.indices, entries)
        return sums if self.n_sites == 1 else sums.view(self.n_sites, self.n_latents)

    def dense(self) -> Tensor:
        flat = self.rows.long() * self.n_latents + self.indices
        return (
            self.values.new_zeros(self.n_rows * self.n_latents)
            .index_add(0, flat, self.values)
            .view(self.n_rows, self.n_latents)
        )

    def decode(self, W_FD: Tensor) -> Tensor:
        rows_FD = self._by_rows(W_FD)
        return _Decode.apply(self.values, rows_FD, self.pattern, receiver(W_FD, rows_FD))  # type: ignore[return-value]

    def of_sites(self, sites: range, axis: Axis = ALONE) -> SparseCode:
        if len(sites) == self.n_sites:
            return self
        if machine.waits_cost(self.rows.device):
            of_each = self._places_by_site[sites.start : sites.stop]
            here = of_each[0] if len(of_each) == 1 else torch.cat(of_each).sort().values
        else:
            sites_E = self.rows % self.n_sites
            here = ((sites_E >= sites.start) & (sites_E < sites.stop)).nonzero().squeeze(1)
        indices = self.pattern.indices.index_select(0, here) - sites.start * self.n_latents
        lengths = (self.offsets[1:] - self.offsets[:-1]).view(-1, self.n_sites)[:, sites.start : sites.stop]
        pattern = Pattern(indices, offsets_of_lengths(lengths.flatten()), len(sites) * self.n_latents)
        return SparseCode(axis.enter(self.values).index_select(0, here), pattern, len(sites), self.even)

    @cached_property
    def _places_by_site(self) -> tuple[Tensor, ...]:
        """Where each site's entries are, ascending; at most one wait for all sites together."""
        sites_E, order = torch.sort(self.rows % self.n_sites, stable=True)
        if self.even:
            sizes = [len(order) // self.n_sites] * self.n_sites
        else:
            offsets = offsets_of_rows(sites_E, self.n_sites)
            sizes = (offsets[1:] - offsets[:-1]).tolist()
        return order.split(sizes)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        active = self.values.detach() > 0
        return self.rows[active].long(), self.indices[active].long(), self.values.detach()[active]


class DenseCode(Code):
    """Every latent of every row: `values [N, F]`."""

    def __init__(self, values: Tensor, n_sites: int = 1) -> None:
        self.values, self.n_sites = values, n_sites
        self.n_rows, self.n_latents = values.shape

    def at(self, v_F: Tensor) -> Tensor:
        if v_F.ndim == 1:
            return v_F
        n_tokens = self.n_rows // self.n_sites
        return v_F.expand(n_tokens, *v_F.shape).reshape(self.n_rows, self.n_latents)

    def of_row(self, v_N: Tensor) -> Tensor:
        return v_N[:, None]

    def sum_rows(self, entries: Tensor) -> Tensor:
        return entries.sum(1)

    def sum_latents(self, entries: Tensor) -> Tensor:
        return entries.sum(0) if self.n_sites == 1 else entries.view(-1, self.n_sites, self.n_latents).sum(0)

    def dense(self) -> Tensor:
        return self.values.view_as(self.values)

    def decode(self, W_FD: Tensor) -> Tensor:
        if self.n_sites == 1:
            return self.values @ self._by_rows(W_FD)
        f_NSF = self.values.view(-1, self.n_sites, self.n_latents)
        return torch.einsum("nsf,sfd->nsd", f_NSF, W_FD).reshape(self.n_rows, -1)

    def of_sites(self, sites: range, axis: Axis = ALONE) -> DenseCode:
        if len(sites) == self.n_sites:
            return self
        f_NSF = axis.enter(self.values).view(-1, self.n_sites, self.n_latents)
        return DenseCode(f_NSF[:, sites.start : sites.stop].reshape(-1, self.n_latents), len(sites))
