"""BatchTopK and BatchLayerTopK: the rule that so many latents a token are active on average over a batch.

Letters: B rows, F latents, P pools.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.latents.activations.base import ActivationFunction, SelectionSettings
from lm_saes.latents.selection.wants import BestOfBatch, Judged, by_row


class BatchTopK(ActivationFunction):
    """Keeps the `k x valid rows` largest positive `s` of the whole batch (Bussmann et al. 2024).

    A cross-layer transcoder's layers select each for itself, `k x valid tokens`; a crosscoder's heads form one pool.
    Outside training it keeps what exceeds the running threshold: the first batch's smallest kept value, then a moving
    average with decay 0.99.
    """

    name = "batchtopk"
    config_fields = frozenset({"top_k"})
    decay = 0.99

    def __init__(self, settings: SelectionSettings) -> None:
        super().__init__(settings)
        self.k = settings.top_k
        shape = () if self.joins_sites or settings.n_pools == 1 else (settings.n_pools,)
        self.batch_topk_threshold: Tensor
        self.register_buffer("batch_topk_threshold", torch.zeros(shape, dtype=torch.float32))

    def wants(self) -> BestOfBatch | Judged:
        if self.training:
            return BestOfBatch(self.k, self.batch_topk_threshold, observe=self._follow)
        return Judged(self._exceeds, self.k)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        self.batch_topk_threshold.mul_(factor)

    def _exceeds(self, s_BF: Tensor, rows: slice) -> Tensor:
        return s_BF > by_row(self.batch_topk_threshold, s_BF)

    @torch.no_grad()
    def _follow(self, smallest_P: Tensor) -> None:
        """Let the running threshold move towards a batch's smallest kept value."""
        known_P = self.batch_topk_threshold.view(-1)
        moved_P = torch.where(known_P == 0, smallest_P, self.decay * known_P + (1 - self.decay) * smallest_P)
        known_P.copy_(torch.where(torch.isfinite(smallest_P), moved_P, known_P))


class BatchLayerTopK(BatchTopK):
    """Keeps the `k x valid tokens` largest positive `s` of the batch over all layers (heads) together."""

    name = "batchlayertopk"
    joins_sites = True
