"""How a mixture of transforms spends its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.metrics.base import Measured, Metric


@runtime_checkable
class Ranked(Protocol):
    """The settings of a dictionary whose latents are transforms."""

    @property
    def ranks(self) -> Mapping[int, int]:
        """How many transforms there are of each rank, in the order of latents."""
        ...


class RanksInUse(Metric):
    """Of each rank r, `l0_rank{r}`: active transforms per valid token; `l0_rank{r}_ratio`: their share of all of that
    rank. `total_rank_sum`: ranks of a token's active transforms, added up."""

    @property
    def of_latents(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(f"rank{rank}" for rank in self._ranks)

    @classmethod
    def applies(cls, dictionary: Measured) -> bool:
        return isinstance(dictionary.cfg, Ranked)

    @torch.no_grad()
    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:
        self.add("tokens", record.n_tokens_here)
        here = [n // self.dictionary.axes.latents.size for n in self._ranks.values()]
        for rank, counts in zip(self._ranks, record.counts.split(here), strict=True):
            self.add(f"rank{rank}", counts.sum(dtype=torch.float64))

    def report(self) -> dict[str, float]:
        totals = self.collected()
        l0 = {rank: float(totals[f"rank{rank}"] / totals["tokens"]) for rank in self._ranks}
        values = {f"molt_metrics/l0_rank{rank}": active for rank, active in l0.items()}
        values |= {f"molt_metrics/l0_rank{rank}_ratio": active / self._ranks[rank] for rank, active in l0.items()}
        return values | {"molt_metrics/total_rank_sum": sum(rank * active for rank, active in l0.items())}

    @property
    def _ranks(self) -> Mapping[int, int]:
        cfg = self.dictionary.cfg
        return cfg.ranks if isinstance(cfg, Ranked) else {}
