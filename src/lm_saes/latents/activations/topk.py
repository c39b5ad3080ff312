"""TopK and LayerTopK: so many latents of each token.

Letters: N rows, B rows of one block, F latents (of a row), C candidates, E entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.codes import Pattern
from lm_saes.latents.kernels.plain import top_columns

if TYPE_CHECKING:
    from lm_saes.dictionaries.config import BaseSAEConfig


class TopK(ActivationFunction):
    """Keeps the k largest `s` of each token, of those the positive ones (Gao et al. 2024, section 2.3)."""

    name = "topk"
    config_fields = frozenset({"top_k"})

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__(cfg)
        self.k = cfg.top_k

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        columns = self._columns(s_NF)
        best = s_NF.gather(1, columns)
        kept = self.axes.latents.top(best, self.k) & (best > 0)
        return torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, columns, kept)

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return min(self.k / (n_sites if self.joins_sites else 1), n_latents)

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return self.offer(self._columns(s_BF))

    def offer(self, columns_BC: Tensor) -> Tensor:
        """Take these columns as every row's candidates: they hold its k largest."""
        self._width = columns_BC.shape[1]
        return columns_BC

    @property
    def even_sites(self) -> bool:  # type: ignore[override]
        return not self.joins_sites

    def settle(self, s_E: Tensor, pattern: Pattern) -> tuple[None, Tensor]:
        return None, self.axes.latents.top(s_E.view(-1, self._width), self.k).view(-1) & (s_E > 0)

    def _columns(self, s_BF: Tensor) -> Tensor:
        return top_columns(s_BF, min(self.k, s_BF.shape[1]))


class LayerTopK(TopK):
    """Keeps the k largest `s` of each token over all its layers (heads) together, of those the positive ones."""

    name = "layertopk"
    joins_sites = True
