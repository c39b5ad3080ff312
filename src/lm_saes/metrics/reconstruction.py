"""How well activations are reconstructed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.metrics.base import Metric


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
        sum_GD = y_GND.sum(1)
        self.add("tokens", record.n_tokens_here)
        self.add("error", error_GN.double().sum(1))
        self.add("label", sum_GD)
        self.add("label_square", square_GN.double().sum(1))
        self.add("error_norm", error_GN.sqrt().sum())
        self.add("label_norm", square_GN.sqrt().sum())
        mean_GD = record.axes.tokens.total(sum_GD) / record.n_tokens
        about_mean_GN = (
            square_GN - 2 * torch.einsum("gnd,gd->gn", y_GND, mean_GD) + mean_GD.square().sum(1, keepdim=True)
        )
        ratio_GN = error_GN / about_mean_GN.clamp(min=torch.finfo(error_GN.dtype).tiny)
        self.add("legacy", (1 - ratio_GN if record.mask is None else (1 - ratio_GN) * record.mask).sum(1).mean())

    def report(self) -> dict[str, float]:
        t = self.collected()
        explained_G = explained_variance(t)
        sites = len(explained_G)
        return {
            "metrics/explained_variance": float(explained_G.mean()),
            "metrics/explained_variance_legacy": float(t["legacy"] / t["tokens"]),
            "metrics/l2_norm_error": float(t["error_norm"] / (t["tokens"] * sites)),
            "metrics/l2_norm_error_ratio": float(t["error_norm"] / t["label_norm"]),
        }


def explained_variance(totals: Mapping[str, Tensor]) -> Tensor:
    """`1 - sum ||y_hat - y||^2 / sum ||y - mean y||^2` of each site, `[G]`, from sums over valid tokens."""
    variance_G = totals["label_square"] - totals["label"].square().sum(1) / totals["tokens"]
    return 1 - totals["error"] / variance_G.clamp(min=torch.finfo(torch.float64).tiny)
