"""ReLU."""

from __future__ import annotations

from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.selection.wants import Above


class ReLU(ActivationFunction):
    """Keeps `s > 0`."""

    name = "relu"

    def wants(self) -> Above:
        return Above()
