"""How well raw activations are reconstructed, over all batches of an evaluation.

Letters: G hook points that are reconstructed, N tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lm_saes.metrics.explained_variance import ExplainedVariance


class ReconstructionSums:
    """Float64 sums that the reconstruction metrics are made from: batches combine by addition.

    The variance is summed about the first token, which loses no digits where the mean is large against the spread.
    """

    def __init__(self) -> None:
        self._origin_G1D: Tensor | None = None
        self._explained: ExplainedVariance | None = None
        self._norms: dict[str, Tensor] = {}

    def add(self, y_hat_GND: Tensor, y_GND: Tensor) -> None:
        """Take in the valid tokens of a batch."""
        n = y_GND.shape[1]
        if n == 0:
            return
        y_GND = y_GND.double()
        error_GN = (y_hat_GND.double() - y_GND).square().sum(-1)
        if self._origin_G1D is None:
            self._origin_G1D = y_GND[:, :1].clone()
        shifted_GND = y_GND - self._origin_G1D
        tokens = error_GN.new_full((), n)
        explained = ExplainedVariance.of(tokens, shifted_GND, shifted_GND.square().sum(-1), error_GN)
        self._explained = explained if self._explained is None else self._explained + explained
        distance_GN = (y_GND - y_GND.mean(1, keepdim=True)).square().sum(-1)
        apart_GN = distance_GN > 0
        norms = {
            "label": y_GND.norm(dim=-1).sum(1),
            "error": error_GN.sqrt().sum(1),
            "legacy": torch.where(apart_GN, 1 - error_GN / distance_GN, 0.0).sum(1),
            "n_legacy": apart_GN.sum(1),
        }
        self._norms = {name: self._norms.get(name, 0) + value for name, value in norms.items()}

    def metrics(self) -> dict[str, float]:
        """The metrics so far, each averaged over the hook points; NaN where a denominator is zero.

        There must have been a token.
        """
        assert self._explained is not None
        norms, tokens = self._norms, self._explained.tokens
        by_site = {
            "metrics/explained_variance": self._explained.by_site().where(self._explained.variation != 0, math.nan),
            "metrics/explained_variance_legacy": _ratio(norms["legacy"], norms["n_legacy"]),
            "metrics/l2_norm_error": norms["error"] / tokens,
            "metrics/l2_norm_error_ratio": _ratio(norms["error"], norms["label"]),
        }
        return {name: float(value_G.mean()) for name, value_G in by_site.items()}


def _ratio(of: Tensor, to: Tensor) -> Tensor:
    return (of / to).where(to != 0, math.nan)
