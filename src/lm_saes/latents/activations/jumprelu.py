"""JumpReLU. Letters: N rows, R rows of all sites, B rows of one block, S sites, F latents (of a row)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.activations.thresholds import DenseJumpReLU, in_units_of_h

if TYPE_CHECKING:
    from lm_saes.dictionaries.config import BaseSAEConfig


class JumpReLU(ActivationFunction):
    """Keeps `s > theta` with a learnt `theta = exp(log_theta)` per latent (Rajamanoharan et al. 2024).

    The threshold's gradient is that of a rectangular window: with `g` the gradient at the output in the units of `s`,
    `dL/d theta = -(theta / window) g` over entries with `|s - theta| < window / 2` and `s > 0`, kept or not.
    """

    name = "jumprelu"
    config_fields = frozenset({"jumprelu_threshold_window"})

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__(cfg)
        self.window = cfg.jumprelu_threshold_window
        self.log_jumprelu_threshold = nn.Parameter(torch.zeros(cfg.threshold_shape, dtype=torch.float32))
        self.joins_sites = self.log_jumprelu_threshold.ndim > 1

    @property
    def log_threshold(self) -> Tensor:  # type: ignore[override]
        return self.log_jumprelu_threshold

    @property
    def theta(self) -> Tensor:
        """The thresholds of a row, `[F]` (or `[S * F]`), in the units of `s`."""
        return self.log_jumprelu_threshold.exp().view(-1)

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        return s_NF > self.theta.to(s_NF.dtype)

    def dense(self, h_RF: Tensor, scale_SF: Tensor | None, mask: Tensor | None, n_sites: int = 1) -> Tensor:
        return DenseJumpReLU.apply(h_RF, self.log_jumprelu_threshold, scale_SF, self.window, n_sites)  # type: ignore[return-value]

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return None

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        theta_F = self.theta.detach().to(s_BF.dtype)
        return s_BF > ((theta_F - self.window / 2).clamp(min=0) if self.training else theta_F)

    @torch.no_grad()
    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        theta_F, half = self.theta.to(like_F.dtype), self.window / 2
        above, low, high = (
            in_units_of_h(s_F, scale_F) for s_F in (theta_F, (theta_F - half).clamp(min=0), theta_F + half)
        )
        return above, low, high
