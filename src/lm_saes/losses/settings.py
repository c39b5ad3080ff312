"""The weights and shapes of the loss terms at one step; each term is in its own file."""

from __future__ import annotations

from dataclasses import dataclass

from lm_saes.losses.sparsity import SparsityLoss


@dataclass(frozen=True)
class LossSettings:
    """Arguments of the loss, as `compute_loss` names them."""

    sparsity_loss: SparsityLoss | None = None
    """The one that `sparsity_loss_type` names, with its own settings."""
    l1_coefficient: float = 1.0
    lp_coefficient: float = 0.0
    auxk_coefficient: float = 0.0
    k_aux: int = 512
