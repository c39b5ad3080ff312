"""BatchTopK and BatchLayerTopK: so many latents a token on average over a batch.

Letters: N rows, B rows of one block, F latents (of a row), E entries, P pools that each have a budget of their own, X
places of one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import ALONE, Axis
from lm_saes.latents.activations.base import ActivationFunction, Missed
from lm_saes.latents.codes import Pattern
from lm_saes.latents.kernels.plain import top_columns

if TYPE_CHECKING:
    from lm_saes.dictionaries.config import BaseSAEConfig


class BatchTopK(ActivationFunction):
    """Keeps the `k x valid rows` largest positive `s` of the whole batch (Bussmann et al. 2024).

    A cross-layer transcoder's layers select each for itself, `k x valid tokens`; a crosscoder's heads form one pool.
    Outside training it keeps what exceeds the running threshold: the first batch's smallest kept value, then a moving
    average with decay 0.99.

    Where waiting for the device costs time, training steps look at the budget's number of best entries of every block,
    whatever their values: then no size depends on values.
    """

    name = "batchtopk"
    config_fields = frozenset({"top_k"})
    decay = 0.99
    margin = 0.8
    """Candidates are what exceeds this share of the running threshold; a miss costs a second look, never exactness."""

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__(cfg)
        self.k = cfg.top_k
        self.n_pools = 1 if self.joins_sites else cfg.n_selection_pools
        self.batch_topk_threshold: Tensor
        shape = () if self.n_pools == 1 else (self.n_pools,)
        self.register_buffer("batch_topk_threshold", torch.zeros(shape, dtype=torch.float32))
        self._floor_P: Tensor | None = None
        self._mask_N: Tensor | None = None
        self._limit: Tensor | None = None
        self._budget = self._misses = 0

    @property
    def _fixed(self) -> bool:
        """Whether the code is to have room for a fixed number of entries."""
        return self.training and machine.waits_cost(self.batch_topk_threshold.device)

    @property
    def even_sites(self) -> bool:  # type: ignore[override]
        return self._fixed and self.n_pools > 1

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        if not self.training:
            return s_NF > self._of_rows(self.batch_topk_threshold, s_NF)
        valid = s_NF if mask_N is None else torch.where(mask_N[:, None], s_NF, -math.inf)
        self._set_budget(mask_N, len(s_NF))
        pools_PX = self._pools(valid)
        kept_PX = self.axes.batch.top(pools_PX, self._budget, self._limit) & (pools_PX > 0)
        self._observe([(s, kept) for s, kept in zip(pools_PX, kept_PX, strict=True)])
        return kept_PX.view(self.n_pools, -1, s_NF.shape[1]).transpose(0, 1).reshape(s_NF.shape)

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return min(self.k / (n_sites if self.joins_sites else 1), n_latents)

    def begin(self, mask_N: Tensor | None, n_rows: int) -> None:
        self._set_budget(mask_N, n_rows)
        threshold_P = self.batch_topk_threshold.view(-1)
        self._floor_P = threshold_P * self.margin if not self._fixed and bool((threshold_P > 0).all()) else None
        self._misses = 0

    def offer(self, mask_N: Tensor | None, n_rows: int) -> int:
        """Announce candidates that hold the batch's largest: how many entries that are."""
        self._floor_P = None
        self._set_budget(mask_N, n_rows)
        return self._budget

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        if not self.training:
            return s_BF > self._of_rows(self.batch_topk_threshold, s_BF)
        if self._mask_N is not None:
            s_BF = torch.where(self._mask_N[rows, None], s_BF, -math.inf)
        if self._fixed:
            return self._best_places(s_BF)
        if self._floor_P is None:  # nothing known yet: what twice this block's share of the budget would exceed
            pools_PX = self._pools(s_BF)
            share = min(pools_PX.shape[1], 2 * self.k * len(s_BF) // self.n_pools)
            own_P = pools_PX.topk(share, sorted=False).values.amin(1).clamp(min=0)
            self._floor_P = self.axes.batch.smallest(own_P)
        return s_BF > self._of_rows(self._floor_P, s_BF)

    def _best_places(self, s_BF: Tensor) -> Tensor:
        """As many entries of each pool as its budget, the largest: places in the flattened block, ascending."""
        pools_PX, n_latents = self._pools(s_BF), s_BF.shape[1]
        best_PX = top_columns(pools_PX, min(self._budget, pools_PX.shape[1]))
        pool_P1 = torch.arange(self.n_pools, device=s_BF.device)[:, None]
        rows_PX = best_PX // n_latents * self.n_pools + pool_P1
        return (rows_PX * n_latents + best_PX % n_latents).flatten().sort().values

    def settle(self, s_E: Tensor, pattern: Pattern) -> tuple[Tensor | None, Tensor]:
        if not self.training:
            return None, s_E > 0
        if self._fixed:
            return self._settle_fixed(s_E, pattern)
        pools = [slice(None)]
        if self.n_pools > 1:
            pool_E = pattern.rows % self.n_pools
            pools = [(pool_E == p).nonzero().squeeze(1) for p in range(self.n_pools)]
        offered = [self.axes.batch.count(len(s_E[pool])) for pool in pools]
        short = min(offered) < self._budget
        if short and self._floor_P is not None and bool((self._floor_P > 0).any()):
            self._misses += 1
            self._floor_P = self._floor_P / 4 if self._misses == 1 else torch.zeros_like(self._floor_P)
            raise Missed
        kept_E = torch.zeros_like(s_E, dtype=torch.bool)
        for pool in pools:
            kept_E[pool] = self.axes.batch.top(s_E[pool][None], self._budget)[0]
        self._observe([(s_E[pool], kept_E[pool]) for pool in pools])
        places = kept_E.nonzero().squeeze(1)
        return places, torch.ones_like(places, dtype=torch.bool)

    def _settle_fixed(self, s_E: Tensor, pattern: Pattern) -> tuple[Tensor | None, Tensor]:
        rows_E, places = pattern.rows, None
        s_E = s_E.clamp(min=torch.finfo(s_E.dtype).min)
        if self._mask_N is not None:
            valid_E = self._mask_N.index_select(0, rows_E // (pattern.n_rows // len(self._mask_N)))
            s_E = torch.where(valid_E, s_E, torch.finfo(s_E.dtype).min)
        if len(s_E) > self.n_pools * self._budget:
            chosen_E = torch.stack(self._best_of_pools(s_E, rows_E, ALONE, None)).any(0)
            places = torch.nonzero_static(chosen_E, size=self.n_pools * self._budget, fill_value=0).squeeze(1)
            s_E, rows_E = s_E.index_select(0, places), rows_E.index_select(0, places)
        kept_PE = [best_E & (s_E > 0) for best_E in self._best_of_pools(s_E, rows_E, self.axes.batch, self._limit)]
        self._observe([(s_E, kept_E) for kept_E in kept_PE])
        return places, torch.stack(kept_PE).any(0)

    def _best_of_pools(self, s_E: Tensor, rows_E: Tensor, axis: Axis, limit: Tensor | None) -> list[Tensor]:
        """Which entries are among the largest of each pool over an axis, bool `[E]` each."""
        best = []
        for pool in range(self.n_pools):
            here_E = rows_E % self.n_pools == pool
            best.append(axis.top(torch.where(here_E, s_E, -math.inf)[None], self._budget, limit)[0] & here_E)
        return best

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        self.batch_topk_threshold.mul_(factor)

    def _set_budget(self, mask_N: Tensor | None, n_rows: int) -> None:
        """How many entries of each pool are kept; `_limit` says it where only the device knows, and they are fewer."""
        self._mask_N, self._limit, tokens = mask_N, None, self.axes.tokens
        if mask_N is not None and self._fixed:
            self._limit = self.k * tokens.total(mask_N.sum()) // self.n_pools
        elif mask_N is not None:
            n_rows = int(mask_N.sum())
        self._budget = self.k * tokens.count(n_rows) // self.n_pools

    def _pools(self, s_NF: Tensor) -> Tensor:
        """The entries of each pool, `[P, X]`; pools take turns by row."""
        return s_NF.view(-1, self.n_pools, s_NF.shape[1]).transpose(0, 1).flatten(1)

    def _of_rows(self, value_P: Tensor, s_BF: Tensor) -> Tensor:
        """A value of each pool as one of each row (pools alternate), or the value itself if there is one pool."""
        value_P = value_P.to(s_BF.dtype)
        return value_P if self.n_pools == 1 else value_P.repeat(len(s_BF) // self.n_pools)[:, None]

    @torch.no_grad()
    def _observe(self, pools: list[tuple[Tensor, Tensor]]) -> None:
        smallest_P = torch.stack([torch.where(kept, s, math.inf).amin() if s.numel() else s.new_full((), math.inf)
                                  for s, kept in pools]).float()  # fmt: skip
        smallest_P = self.axes.batch.smallest(smallest_P)
        known_P = self.batch_topk_threshold.view(-1)
        moved_P = torch.where(known_P == 0, smallest_P, self.decay * known_P + (1 - self.decay) * smallest_P)
        known_P.copy_(torch.where(torch.isfinite(smallest_P), moved_P, known_P))


class BatchLayerTopK(BatchTopK):
    """Keeps the `k x valid tokens` largest positive `s` of the batch over all layers (heads) together."""

    name = "batchlayertopk"
    joins_sites = True
