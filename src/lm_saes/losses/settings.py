"""The weights and shapes of the loss terms at one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossSettings:
    """Arguments of the loss, as `compute_loss` names them."""

    sparsity_loss_type: str | None = None
    tanh_stretch_coefficient: float = 4.0
    frequency_scale: float = 0.01
    p: float = 1
    l1_coefficient: float = 1.0
    lp_coefficient: float = 0.0
    auxk_coefficient: float = 0.0
    k_aux: int = 512
