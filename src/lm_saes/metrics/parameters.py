"""Norms of weights and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.metrics.base import Metric, StepFacts


class Weights(Metric):
    """Mean norms of encoder and decoder directions, norm of the decoder bias, mean threshold: as of the report."""

    of_tokens = False

    def step(self, facts: StepFacts) -> None:
        self.totals = {"seen": facts.one}

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        d = self.dictionary
        log_theta = d.activation_function.log_threshold
        means = {"metrics/encoder_norm": d.encoder_norm()} if d.has_encoder_norm else {}
        means["metrics/decoder_norm"] = d.decoder_norm()
        if log_theta is not None:
            means["metrics/mean_jumprelu_threshold"] = log_theta.exp()
        latents = d.axes.latents
        norms = {name: latents.total(value.double().mean()) / latents.size for name, value in means.items()}
        norms["metrics/decoder_bias_norm"] = d.decoder_bias_norm()
        return {name: float(value) for name, value in norms.items()}


class Gradients(Metric):
    """Global gradient norms before and after clipping: mean over the window, and the largest as `..._max`."""

    of_tokens = False

    def step(self, facts: StepFacts) -> None:
        self.add("steps", facts.one)
        for name in ("gradient_norm", "gradient_norm_before_clipping"):
            value: Tensor = getattr(facts, name)
            self.add(name, value)
            self.largest(name + "_max", value)

    def report(self) -> dict[str, float]:
        steps = float(self.totals["steps"])
        return {
            f"metrics/{name}": float(total) / (1 if name.endswith("_max") else steps)
            for name, total in self.totals.items()
            if name != "steps"
        }
