"""A dictionary's activation function: its k, thresholds and gating by norms; `latents/selection` finds the latents."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lm_saes.axes.axis import Axes
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.latents.activations import ActivationFunction
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.selection.selector import DensityMemory, Selector


class Selecting(nn.Module, ABC):
    """Selection by an activation function on `s = h norm` (gated) or `s = h`."""

    cfg: BaseSAEConfig
    axes: Axes
    activation_function: ActivationFunction
    density: DensityMemory
    selection_norm: Tensor | None
    """Norms that gating uses instead of the decoder's, where folding has changed these unevenly."""

    @abstractmethod
    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        """Norm of each latent's decoder direction, `[F]` (`[S, F]` with several sites); differentiable."""

    def build_selection(self) -> None:
        """Make the activation function that the config names."""
        self.activation_function = ActivationFunction.registry[self.cfg.act_fn](self.cfg.selection_settings)
        self.density = DensityMemory()
        self.register_buffer("selection_norm", None)

    @property
    def selector(self) -> Selector:
        """What encoders select with."""
        return Selector(self.activation_function, self.axes, self.density)

    def selection_scale(self, norm: Tensor) -> Tensor | None:
        """What selection multiplies `h` by: the decoder norms with gating, else None (no gradient either way)."""
        if not self.cfg.sparsity_include_decoder_norm:
            return None
        return norm.detach() if self.selection_norm is None else self.selection_norm

    def keep_selection_norm(self) -> None:
        """Let gating go on with the present decoder norms, whatever happens to the weights."""
        if self.cfg.sparsity_include_decoder_norm:
            self.selection_norm = self.decoder_norm().detach().clone()

    def set_current_k(self, current_k: int) -> None:
        """Set the k that the top-k family uses now."""
        if not hasattr(self.activation_function, "k"):
            raise ConfigError(f"act_fn={self.cfg.act_fn!r} has no k to set")
        self.activation_function.k = current_k  # type: ignore[assignment]

    @property
    def current_k(self) -> int | None:
        """The k that the top-k family uses now; None for other activation functions."""
        return getattr(self.activation_function, "k", None)

    def theta(self, setting: str) -> Tensor:
        """The learnt thresholds.

        Raises:
            ConfigError: there are none, which `setting` needs.
        """
        log_theta = self.activation_function.log_threshold
        if log_theta is None:
            raise ConfigError(f"{setting}: needs learnt thresholds; use act_fn='jumprelu', not {self.cfg.act_fn!r}")
        return log_theta.exp().to(self.cfg.dtype)

    def shortfall(self, hidden: Hidden, norm_F: Tensor, mask_N: Tensor | None, site: int = 0) -> Tensor:
        """How far pre-activations stay below their thresholds, summed over latents and valid tokens (0-d).

        Gated `relu(theta - h norm)`, else `relu(theta - h) norm`.
        """
        theta = self.theta("lp_coefficient")
        theta_F = theta if theta.ndim == 1 else theta[site]
        if self.cfg.sparsity_include_decoder_norm:
            return hidden.shortfall_sums(theta_F, norm_F, mask_N).sum()
        return (hidden.shortfall_sums(theta_F, None, mask_N) * norm_F).sum()

    @torch.no_grad()
    def init_thresholds(self, log_value: float | None) -> None:
        """Set learnt thresholds, if there are any, to their starting value."""
        if self.activation_function.log_threshold is not None:
            if log_value is None:
                raise ConfigError(
                    f"init_log_jumprelu_threshold_value=None: act_fn={self.cfg.act_fn!r} needs a starting threshold"
                )
            self.activation_function.log_threshold.fill_(log_value)

    @torch.no_grad()
    def unit_norm_factors(self) -> Tensor:
        """By what decoders are divided, and encoders multiplied, for decoder norms of 1; thresholds follow.

        Raises:
            NotImplementedError: ungated top-k selection, where it would change which latents are selected.
        """
        gated = self.cfg.sparsity_include_decoder_norm
        if not gated and self.current_k is not None:
            raise NotImplementedError(
                f"act_fn={self.cfg.act_fn!r} without gating ranks latents by h, which unit norms would rescale: "
                "other latents would be selected"
            )
        norm = self.decoder_norm()
        norm = torch.where(norm > 0, norm, 1.0)
        if self.selection_norm is not None:
            self.selection_norm.div_(norm)
        if not gated and self.activation_function.log_threshold is not None:
            self.activation_function.log_threshold.add_(norm.log())
        return norm
