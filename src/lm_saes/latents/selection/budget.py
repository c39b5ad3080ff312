"""The search for the largest entries of a whole batch, within a budget for each pool of rows.

Letters: N rows, B rows of one block, F latents (of a row), E entries, P pools, X places of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import ALONE, Axes, Axis
from lm_saes.latents.codes import Pattern
from lm_saes.latents.kernels.plain import top_columns
from lm_saes.latents.selection.search import Chosen, Rows, Search
from lm_saes.latents.selection.wants import BestOfBatch, by_row


class SearchByBudget(Search[BestOfBatch]):
    """A batch's budget, mask and floor: candidates are what exceeds the floor, which is lowered where they are too few.

    Where waiting for the device costs time, candidates are the budget's number of best entries of every block, whatever
    their values: then no size depends on values.
    """

    def __init__(self, want: BestOfBatch, rows: Rows, axes: Axes, device: torch.device) -> None:
        super().__init__(want, rows, axes)
        self.n_pools = want.known_P.numel()
        self.fixed = machine.waits_cost(device)
        self.even_sites = self.fixed and self.n_pools > 1
        self._floor_P: Tensor | None = None
        if not self.fixed and bool((want.known_P > 0).all()):
            self._floor_P = want.known_P.view(-1) * want.margin
        self._misses = 0
        self._sorted: tuple[Pattern, list[Tensor | slice]] | None = None
        self.limit: Tensor | None = None
        """How many entries each pool keeps, where only the device knows it, and they are fewer than the budget."""
        mask_N, n_rows = rows.mask_N, rows.n
        if mask_N is not None and self.fixed:
            self.limit = want.k * axes.tokens.total(mask_N.sum()) // self.n_pools
        elif mask_N is not None:
            n_rows = int(mask_N.sum())
        self.budget = want.k * axes.tokens.count(n_rows) // self.n_pools
        """How many entries of each pool are kept."""

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        if self.rows.mask_N is not None:
            s_BF = torch.where(self.rows.mask_N[rows, None], s_BF, -math.inf)
        if self.fixed:
            return self._best_places(s_BF)
        if self._floor_P is None:  # nothing known yet: what twice this block's share of the budget would exceed
            pools_PX = self._pools(s_BF)
            share = min(pools_PX.shape[1], 2 * self.want.k * len(s_BF) // self.n_pools)
            own_P = pools_PX.topk(share, sorted=False).values.amin(1).clamp(min=0)
            self._floor_P = self.axes.batch.smallest(own_P)
        return s_BF > by_row(self._floor_P, s_BF)

    def found_enough(self, s_E: Tensor, pattern: Pattern) -> bool:
        if self.fixed:
            return True
        offered = [self.axes.batch.count(len(s_E[pool])) for pool in self._places_by_pool(pattern)]
        if min(offered) >= self.budget or self._floor_P is None or not bool((self._floor_P > 0).any()):
            return True
        self._misses += 1
        self._floor_P = self._floor_P / 4 if self._misses == 1 else torch.zeros_like(self._floor_P)
        return False

    def choose(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        if self.fixed:
            return self._choose_fixed(s_E, pattern)
        pools, best_E = self._places_by_pool(pattern), torch.zeros_like(s_E, dtype=torch.bool)
        for pool in pools:
            best_E[pool] = self.axes.batch.top(s_E[pool][None], self.budget)[0]
        best_E &= s_E > self.want.least
        self._observe([(s_E[pool], best_E[pool]) for pool in pools])
        places = best_E.nonzero().squeeze(1)
        return Chosen(pattern.take(places), torch.ones_like(places, dtype=torch.bool), places)

    def active(self, s_NF: Tensor) -> Tensor:
        mask_N = self.rows.mask_N
        pools_PX = self._pools(s_NF if mask_N is None else torch.where(mask_N[:, None], s_NF, -math.inf))
        best_PX = self.axes.batch.top(pools_PX, self.budget, self.limit) & (pools_PX > self.want.least)
        self._observe(list(zip(pools_PX, best_PX, strict=True)))
        return best_PX.view(self.n_pools, -1, s_NF.shape[1]).transpose(0, 1).reshape(s_NF.shape)

    def _choose_fixed(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        rows_E, places, mask_N = pattern.rows, None, self.rows.mask_N
        s_E = s_E.clamp(min=torch.finfo(s_E.dtype).min)
        if mask_N is not None:
            valid_E = mask_N.index_select(0, rows_E // (pattern.n_rows // len(mask_N)))
            s_E = torch.where(valid_E, s_E, torch.finfo(s_E.dtype).min)
        if len(s_E) > self.n_pools * self.budget:
            best_E = torch.stack(self._best_of_pools(s_E, rows_E, ALONE, None)).any(0)
            places = torch.nonzero_static(best_E, size=self.n_pools * self.budget, fill_value=0).squeeze(1)
            s_E, rows_E = s_E.index_select(0, places), rows_E.index_select(0, places)
        best_PE = self._best_of_pools(s_E, rows_E, self.axes.batch, self.limit)
        active_PE = [best_E & (s_E > self.want.least) for best_E in best_PE]
        self._observe([(s_E, active_E) for active_E in active_PE])
        return Chosen(pattern if places is None else pattern.take(places), torch.stack(active_PE).any(0), places)

    def _best_places(self, s_BF: Tensor) -> Tensor:
        """As many entries of each pool as its budget, the largest: places in the flattened block, ascending."""
        pools_PX, n_latents = self._pools(s_BF), s_BF.shape[1]
        best_PX = top_columns(pools_PX, min(self.budget, pools_PX.shape[1]))
        pool_P1 = torch.arange(self.n_pools, device=s_BF.device)[:, None]
        rows_PX = best_PX // n_latents * self.n_pools + pool_P1
        return (rows_PX * n_latents + best_PX % n_latents).flatten().sort().values

    def _best_of_pools(self, s_E: Tensor, rows_E: Tensor, axis: Axis, limit: Tensor | None) -> list[Tensor]:
        """Which entries are among the largest of each pool over an axis, bool `[E]` each."""
        best = []
        for pool in range(self.n_pools):
            here_E = rows_E % self.n_pools == pool
            best.append(axis.top(torch.where(here_E, s_E, -math.inf)[None], self.budget, limit)[0] & here_E)
        return best

    def _places_by_pool(self, pattern: Pattern) -> list[Tensor | slice]:
        """Which of the pattern's entries belong to each pool."""
        if self.n_pools == 1:
            return [slice(None)]
        if self._sorted is None or self._sorted[0] is not pattern:
            pool_E = pattern.rows % self.n_pools
            self._sorted = pattern, [(pool_E == pool).nonzero().squeeze(1) for pool in range(self.n_pools)]
        return self._sorted[1]

    def _pools(self, s_NF: Tensor) -> Tensor:
        """The entries of each pool, `[P, X]`; pools take turns by row."""
        return s_NF.view(-1, self.n_pools, s_NF.shape[1]).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def _observe(self, pools: list[tuple[Tensor, Tensor]]) -> None:
        """Tell what the smallest kept entry of each pool is."""
        if self.want.observe is None:
            return
        smallest_P = [
            torch.where(active, s, math.inf).amin() if s.numel() else s.new_full((), math.inf) for s, active in pools
        ]
        self.want.observe(self.axes.batch.smallest(torch.stack(smallest_P).float()))
