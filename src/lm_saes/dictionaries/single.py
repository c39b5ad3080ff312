"""What kinds that read one hook point and write one share: an autoencoder, a mixture of transforms, an attention.

Letters: N tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.normalization import geometric_median
from lm_saes.dictionaries.rows import hook_rows, scale_to, valid_rows
from lm_saes.errors import ConfigError
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.encode.linear import LinearEncoder
from lm_saes.latents.record import Record


class SingleConfig(BaseSAEConfig):
    """Settings of a dictionary that reads one hook point and writes one."""

    hook_point_in: str = Field(min_length=1)
    """Hook point that is read."""
    hook_point_out: str = Field(min_length=1)
    """Hook point that is reconstructed."""

    @property
    def hook_points_read(self) -> list[str]:
        return [self.hook_point_in]

    @property
    def hook_points_written(self) -> list[str]:
        return [self.hook_point_out]


class SingleDictionary(AbstractSparseAutoEncoder):
    """A dictionary of one site, with a decoder bias `b_D [D]` unless that is switched off."""

    cfg: SingleConfig  # type: ignore[assignment]
    b_D: nn.Parameter | None

    def prepare_input(self, batch: Mapping[str, Any]) -> Tensor:
        return hook_rows(batch, self.cfg.hook_point_in, self.cfg.d_model)

    def prepare_label(self, batch: Mapping[str, Any]) -> Tensor:
        return hook_rows(batch, self.cfg.hook_point_out, self.cfg.d_model)

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.b_D is None else y + self.b_D

    def decoder_bias_norm(self) -> Tensor:
        return next(self.parameters()).new_zeros(()) if self.b_D is None else torch.linalg.vector_norm(self.b_D)

    def norm_factors(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The dataset-wise factors of input and label, to scale `weights` by."""
        hook_in, hook_out = self.cfg.hook_point_in, self.cfg.hook_point_out
        return self.compute_norm_factor(weights, hook_in), self.compute_norm_factor(weights, hook_out)

    def fold_beside_weights(self, factor_out: Tensor, growth: Tensor) -> None:
        """Fold the label's factor into the decoder bias, and what decoder norms grew by into gated selection."""
        if self.b_D is not None:
            self.b_D.div_(factor_out)
        if self.cfg.sparsity_include_decoder_norm:
            self.activation_function.rescale(growth)

    @torch.no_grad()
    def init_decoder_bias_with_geometric_median(self, batch: Mapping[str, Any]) -> None:
        """`b_D =` the geometric median of the valid (normalised) labels."""
        if self.b_D is None:
            raise ConfigError("bias_init_method: use_decoder_bias is off; there is no bias to set")
        self.b_D.copy_(geometric_median(valid_rows(self.prepare_label(batch), batch)))


class LinearlyEncoded(SingleDictionary):
    """One whose pre-activations are `x W_E + b_E`, `W_E [D, F]`, or what its `encoder` makes of them."""

    W_E: nn.Parameter
    b_E: nn.Parameter

    @property
    def encoder(self) -> LinearEncoder:
        """The encoder's weights."""
        return LinearEncoder(self.W_E, self.b_E)

    def hidden_pre(self, x: Tensor) -> Tensor:
        return self.encoder.pre_activations(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def pre_activation_loss(self, record: Record) -> Tensor:
        """Gated `sum_i relu(theta_i - h_i norm_i)`, else `sum_i relu(theta_i - h_i) norm_i`; mean over tokens."""
        hidden = Hidden.of(record.code, record.input[0], self.encoder)
        return record.row_mean_of_sum(self.axes.latents.leave(self.shortfall(hidden, record.norm[0], record.mask)))

    def encoder_norm(self, keepdim: bool = False) -> Tensor:
        return torch.linalg.vector_norm(self.W_E, dim=0, keepdim=keepdim)

    @torch.no_grad()
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        self.W_E.mul_(scale_to(value, self.encoder_norm(keepdim=True)))

    @torch.no_grad()
    def init_encoder_bias_with_mean_hidden_pre(self, batch: Mapping[str, Any]) -> None:
        """`b_E = -` the mean over valid tokens of `x W_E` (`batch` is normalised)."""
        self.b_E.copy_(-valid_rows(self.prepare_input(batch), batch).mean(0) @ self.W_E)
