"""How well activations are reconstructed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.metrics.base import Metric
from lm_saes.metrics.explained_variance import ExplainedVariance


class Reconstruction(Metric):
    """Explained variance and norms of the error.

    `explained_variance = 1 - sum ||y_hat - y||^2 / sum ||y - mean y||^2` over the valid tokens of the window, per site,
    then averaged over sites; `explained_variance_legacy` is the mean over tokens of `1 - ||y_hat - y||^2 / ||y - m||^2`
    with `m` the batch's mean, the mean of ratios that older tools report. `l2_norm_error` is the mean of
    `||y_hat - y||`, `l2_norm_error_ratio` that over the mean of `||y||`. All in normalised units.
    """

    @torch.no_grad()
    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:
        y_GND = record.label if record.mask is None else record.label * record.mask[:, None]
        error_GN = record.squared_error.detach()
        error_GN = error_GN if record.mask is None else error_GN * record.mask
        square_GN = torch.linalg.vecdot(y_GND, y_GND)
        explained = ExplainedVariance.of(record.n_tokens_here, y_GND, square_GN, error_GN)
        for name, value in explained.sums():
            self.add(name, value)
        self.add("error_norm", error_GN.sqrt().sum())
        self.add("label_norm", square_GN.sqrt().sum())
        mean_GD = record.axes.tokens.total(explained.label) / record.n_tokens
        about_mean_GN = (
            square_GN - 2 * torch.einsum("gnd,gd->gn", y_GND, mean_GD) + mean_GD.square().sum(1, keepdim=True)
        )
        ratio_GN = error_GN / about_mean_GN.clamp(min=torch.finfo(error_GN.dtype).tiny)
        self.add("legacy", (1 - ratio_GN if record.mask is None else (1 - ratio_GN) * record.mask).sum(1).mean())

    def report(self) -> dict[str, float]:
        t = self.collected()
        explained_G = ExplainedVariance.from_sums(t).by_site()
        sites = len(explained_G)
        return {
            "metrics/explained_variance": float(explained_G.mean()),
            "metrics/explained_variance_legacy": float(t["legacy"] / t["tokens"]),
            "metrics/l2_norm_error": float(t["error_norm"] / (t["tokens"] * sites)),
            "metrics/l2_norm_error_ratio": float(t["error_norm"] / t["label_norm"]),
        }
