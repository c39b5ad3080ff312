"""What kinds that read one hook point and write one share: an autoencoder, a mixture of transforms, an attention.

Letters: N tokens, D width, F latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.normalization import geometric_median
from lm_saes.dictionaries.rows import hook_rows, valid_rows
from lm_saes.errors import ConfigError
from lm_saes.latents.codes import Code, DenseCode
from lm_saes.latents.encode.linear import LinearEncoder, encode
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

    def rows_of(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, x.shape[-1])

    def latents_of(self, latents_RF: Tensor, x: Tensor) -> Tensor:
        return latents_RF.view(*x.shape[:-1], -1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The (normalised) reconstruction of dense latents `[..., F]`."""
        code = DenseCode(feature_acts.reshape(-1, feature_acts.shape[-1]))
        return self._decode_code(code, feature_acts).view(*feature_acts.shape[:-1], -1)

    def _add_up(self, y_ND: Tensor) -> Tensor:
        """What all processes' latents write, `[1, N, D]`, with the bias."""
        y_ND = self.axes.latents.leave(y_ND)
        return (y_ND if self.b_D is None else y_ND + self.b_D)[None]

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
    """One whose pre-activations are what an `encoder` makes of its inputs: `x W + b_E`, `W [D, F]`, or with a gate."""

    density_scale: ClassVar[float] = 1.0
    """How many times the usual share of latents may be active before dense products are faster."""
    b_E: nn.Parameter

    @property
    @abstractmethod
    def encoder(self) -> LinearEncoder:
        """The encoder's weights."""

    def hidden_pre(self, x: Tensor) -> Tensor:
        return self.latents_of(self.encoder.pre_activations(self.rows_of(x)[0]), x)

    def _encode_rows(self, x: Tensor, mask_N: Tensor | None, norm: Tensor) -> Code:
        x_ND, scale_F = self.axes.latents.enter(self.rows_of(x)[0]), self.selection_scale(norm)
        return encode(x_ND, self.encoder, self.selector, scale_F, mask_N, density_scale=self.density_scale)

    def pre_activation_loss(self, record: Record) -> Tensor:
        """Gated `sum_i relu(theta_i - h_i norm_i)`, else `sum_i relu(theta_i - h_i) norm_i`; mean over tokens."""
        hidden = self.encoder.hidden(record.code, record.input[0])
        return record.row_mean_of_sum(self.axes.latents.leave(self.shortfall(hidden, record.norm[0], record.mask)))

    def encoder_norm(self, keepdim: bool = False) -> Tensor:
        return torch.linalg.vector_norm(self.encoder.W_DF, dim=0, keepdim=keepdim)

    @torch.no_grad()
    def init_encoder_bias_with_mean_hidden_pre(self, batch: Mapping[str, Any]) -> None:
        """`b_E = -` the mean over valid tokens of `x W` (`batch` is normalised)."""
        self.b_E.copy_(-valid_rows(self.prepare_input(batch), batch).mean(0) @ self.encoder.W_DF)
