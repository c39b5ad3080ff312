"""An activation function at work: among the processes of a run, on the faster of two paths."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import Axes
from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.selection.density import DensityMemory, sparse_pays
from lm_saes.latents.selection.scores import BatchScores
from lm_saes.latents.selection.search import Search
from lm_saes.latents.selection.strategies import begin
from lm_saes.latents.selection.wants import Rows


@dataclass(frozen=True, eq=False)
class Selector:
    """What encoders are given to select with."""

    activation: ActivationFunction
    axes: Axes = field(default_factory=Axes)
    """The processes whose latents and tokens compete."""
    density: DensityMemory = field(default_factory=DensityMemory)
    """How dense batches were, where waiting to know it of each would cost time."""

    def begin(self, scores: BatchScores, mask: Tensor | None) -> Search:
        """A search through a batch; `mask` says which tokens count."""
        return self._begin(scores.n_tokens, scores, mask)

    @torch.no_grad()
    def sparse_pays(self, scores: BatchScores, density_scale: float = 1.0) -> bool:
        """Whether so few entries of a batch are candidates that the sparse path is faster.

        Args:
            density_scale: how many times the usual share of latents may be active before it is not.
        """
        n_sites, n_latents, k = scores.n_sites, scores.n_latents, self.activation.wants().k
        if k is not None:
            of_site = k / n_sites if self.activation.joins_sites else k
            return sparse_pays(min(of_site, n_latents), n_latents * density_scale)
        s_BSF = scores.probe().s_BSF
        search = self._begin(len(s_BSF), scores, None)
        rows = slice(0, search.rows.n)
        active = search.candidates(s_BSF.view(rows.stop, -1), rows).count_nonzero()
        if self.activation.training and machine.waits_cost(active.device):
            return self.density.sparse_paid(active, s_BSF.numel() * density_scale)
        return sparse_pays(float(active), s_BSF.numel() * density_scale)

    def _begin(self, n_tokens: int, scores: BatchScores, mask: Tensor | None) -> Search:
        rows = Rows(n_tokens, scores.n_sites, self.activation.joins_sites, mask)
        return begin(self.activation.wants(), rows, self.axes, scores.device)
