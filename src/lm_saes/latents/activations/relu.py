"""ReLU. Letters: N rows, B rows of one block, F latents (of a row)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.activations.thresholds import in_units_of_h


class ReLU(ActivationFunction):
    """Keeps `s > 0`."""

    name = "relu"

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        return s_NF > 0

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return None

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return s_BF > 0

    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, None, None]:
        return in_units_of_h(torch.zeros_like(like_F), scale_F), None, None
