"""JumpReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lm_saes.latents.activations.base import ActivationFunction, SelectionSettings
from lm_saes.latents.selection.wants import Above


class JumpReLU(ActivationFunction):
    """Keeps `s > theta` with a learnt `theta = exp(log_theta)` per latent (Rajamanoharan et al. 2024).

    The threshold's gradient is that of a rectangular window: with `g` the gradient at the output in the units of `s`,
    `dL/d theta = -(theta / window) g` over entries with `|s - theta| < window / 2` and `s > 0`, kept or not.
    """

    name = "jumprelu"
    config_fields = frozenset({"jumprelu_threshold_window"})

    def __init__(self, settings: SelectionSettings) -> None:
        super().__init__(settings)
        self.window = settings.jumprelu_threshold_window
        """In the units of `s`."""
        self.log_jumprelu_threshold = nn.Parameter(torch.zeros(settings.threshold_shape, dtype=torch.float32))
        self.joins_sites = self.log_jumprelu_threshold.ndim > 1

    @property
    def log_threshold(self) -> Tensor:  # type: ignore[override]
        return self.log_jumprelu_threshold

    def wants(self) -> Above:
        return Above(self.log_jumprelu_threshold, self.window, learns=self.training)
