"""Reconstruction and sparsity of each site: a cross-layer transcoder's layers, a crosscoder's heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.metrics.base import Measured, Metric
from lm_saes.metrics.explained_variance import ExplainedVariance


class SiteMetric(Metric):
    """Per site: explained variance, active latents per valid token, `||y_hat - y||^2` (normalised units)."""

    of_latents = frozenset({"active"})
    dimension: ClassVar[str]
    """What the dictionary calls its sites."""

    @classmethod
    def applies(cls, dictionary: Measured) -> bool:
        return cls.dimension in dictionary.latent_dimensions

    @torch.no_grad()
    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:
        error_SN, label_SND = record.squared_error, record.label
        if record.mask is not None:
            error_SN, label_SND = error_SN * record.mask, label_SND * record.mask[:, None]
        square_SN = torch.linalg.vecdot(label_SND, label_SND)
        for name, value in ExplainedVariance.of(record.n_tokens_here, label_SND, square_SN, error_SN).sums():
            self.add(name, value)
        self.add("active", record.counts.view(record.code_sites, -1).sum(1, dtype=torch.float64))

    def report(self) -> dict[str, float]:
        t = self.collected()
        explained_S, l0_S, l_rec_S = (
            ExplainedVariance.from_sums(t).by_site(),
            t["active"] / t["tokens"],
            t["error"] / t["tokens"],
        )
        values: dict[str, float] = {}
        for site, numbers in enumerate(torch.stack([explained_S, l0_S, l_rec_S], 1).tolist()):
            values |= self.named(site, *numbers)
        return values

    @abstractmethod
    def named(self, site: int, explained: float, l0: float, l_rec: float) -> dict[str, float]:
        """The values of a site under their names in logs."""


class Layers(SiteMetric):
    """`metrics/{explained_variance,l0}_layer{l}` of a cross-layer transcoder."""

    dimension = "layers"

    def named(self, site: int, explained: float, l0: float, l_rec: float) -> dict[str, float]:
        return {f"metrics/explained_variance_layer{site}": explained, f"metrics/l0_layer{site}": l0}


class Heads(SiteMetric):
    """`crosscoder_metrics/<hook point>/{explained_variance,l0,l_rec}` of a crosscoder."""

    dimension = "heads"

    def named(self, site: int, explained: float, l0: float, l_rec: float) -> dict[str, float]:
        prefix = f"crosscoder_metrics/{self.dictionary.cfg.hook_points_written[site]}"
        return {f"{prefix}/explained_variance": explained, f"{prefix}/l0": l0, f"{prefix}/l_rec": l_rec}
