"""An activation function at work: among the processes of a run, on the faster of two paths, sparse or dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import Axes
from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.selection.budget import SearchByBudget
from lm_saes.latents.selection.scores import BatchScores
from lm_saes.latents.selection.search import Rows, Search, SearchByRule, SearchByThreshold, SearchByToken
from lm_saes.latents.selection.wants import Above, BestOfBatch, BestPerToken, Want


def sparse_pays(entries: float, places: float) -> bool:
    """Whether `entries` out of `places` possible ones are few enough for the sparse path."""
    return entries <= machine.SPARSE_BELOW * places


class DensityMemory:
    """Says whether the sparse path pays where waiting to know the density of a training batch would cost time.

    The answer is that of the last `refresh`, and no before the first: dense products wait for nothing.
    """

    def __init__(self) -> None:
        self._pays = False
        self._latest: tuple[Tensor, float] | None = None

    def sparse_paid(self, entries: Tensor, places: float) -> bool:
        """Whether entries were few enough when that was last looked at; `entries` (0-d) out of `places` are now."""
        self._latest = entries, places
        return self._pays

    def refresh(self) -> None:
        """Read what the latest batch was like; may wait."""
        if self._latest is not None:
            entries, places = self._latest
            self._pays, self._latest = sparse_pays(float(entries), places), None


@dataclass(frozen=True, eq=False)
class Selector:
    """What encoders are given to select with."""

    activation: ActivationFunction
    axes: Axes = field(default_factory=Axes)
    """The processes whose latents and tokens compete."""
    density: DensityMemory = field(default_factory=DensityMemory)
    """How dense batches were, where waiting to know it of each would cost time."""

    def begin(self, scores: BatchScores, mask: Tensor | None) -> Search:
        """A search through a batch for what is wanted; `mask` says which tokens count."""
        rows = Rows(scores.n_tokens, scores.n_sites, self.activation.joins_sites, mask)
        return self._search(self.activation.wants(), rows, scores.device)

    @torch.no_grad()
    def sparse_pays(self, search: Search, scores: BatchScores, density_scale: float = 1.0) -> bool:
        """Whether so few entries of a batch are candidates that the sparse path is faster.

        Args:
            density_scale: how many times the usual share of latents may be active before it is not.
        """
        n_sites, n_latents, k = scores.n_sites, scores.n_latents, search.want.k
        if k is not None:
            of_site = k / n_sites if search.rows.joined else k
            return sparse_pays(min(of_site, n_latents), n_latents * density_scale)
        s_BSF = scores.probe().s_BSF
        rows = Rows(len(s_BSF), n_sites, search.rows.joined)
        probe = self._search(search.want, rows, scores.device)
        active = probe.candidates(s_BSF.view(rows.n, -1), slice(0, rows.n)).count_nonzero()
        if self.activation.training and machine.waits_cost(active.device):
            return self.density.sparse_paid(active, s_BSF.numel() * density_scale)
        return sparse_pays(float(active), s_BSF.numel() * density_scale)

    def _search(self, want: Want, rows: Rows, device: torch.device) -> Search:
        match want:
            case BestPerToken():
                return SearchByToken(want, rows, self.axes)
            case BestOfBatch():
                return SearchByBudget(want, rows, self.axes, device)
            case Above():
                return SearchByThreshold(want, rows, self.axes)
        return SearchByRule(want, rows, self.axes)
