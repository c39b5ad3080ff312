"""What kinds with several sites share, whether layers of a cross-layer transcoder or heads of a crosscoder.

Inputs, labels and reconstructions are `[S, ..., D]`, latents `[..., S, F]`: one site for each hook point written.

Letters: N tokens, S sites, D width, F latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.normalization import geometric_median
from lm_saes.dictionaries.rows import hook_rows, scale_to, valid_rows
from lm_saes.errors import ConfigError
from lm_saes.latents.codes import Code, DenseCode
from lm_saes.latents.encode.linear import Encoder, encode

Each = TypeVar("Each", Tensor, range, list[str])


class SitedDictionary(AbstractSparseAutoEncoder):
    """A dictionary of several sites, with encoders `W_E [S, D, F]`, `b_E [S, F]`."""

    W_E: nn.Parameter
    b_E: nn.Parameter

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """The encoders of all sites, reading their inputs side by side."""

    @property
    @abstractmethod
    def decoder_biases(self) -> Iterable[Tensor]:
        """The decoder bias of each site; none if biases are off."""

    @property
    def n_sites(self) -> int:
        """Number of sites S."""
        return len(self.cfg.hook_points_written)

    def own_sites(self, of_all: Each) -> Each:
        """Of what each site has, in order, the part of those whose weights are here."""
        axis = self.axes.sites
        n = len(of_all) // axis.size
        return of_all[axis.place * n : (axis.place + 1) * n]

    def prepare_input(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.stack([hook_rows(batch, hook, self.cfg.d_model) for hook in self.cfg.hook_points_read])

    def prepare_label(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.stack([hook_rows(batch, hook, self.cfg.d_model) for hook in self.cfg.hook_points_written])

    def rows_of(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2)

    def latents_of(self, latents_RF: Tensor, x: Tensor) -> Tensor:
        return latents_RF.view(*x.shape[1:-1], self.n_sites, -1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The (normalised) reconstruction `[S, ..., D]` of dense latents `[..., S, F]`."""
        code = DenseCode(feature_acts.reshape(-1, feature_acts.shape[-1]), self.n_sites)
        return self._decode_code(code, feature_acts).reshape(self.n_sites, *feature_acts.shape[:-2], -1)

    def _encode_rows(self, x: Tensor, mask_N: Tensor | None, norm: Tensor) -> Code:
        own_SND = self.own_sites(self.axes.sites.enter(self.rows_of(x)))
        x_NX = self.axes.latents.enter(side_by_side(own_SND))
        return encode(x_NX, self.encoder, self.selector, self.selection_scale(norm), mask_N)

    def denormalize_activations(self, batch: Mapping[str, Any], reconstruction: Tensor) -> Tensor:
        return self.denormalize_sites(batch, reconstruction, self.cfg.hook_points_written)

    def encoder_norm(self, keepdim: bool = False) -> Tensor:
        return self.axes.sites.beside(torch.linalg.vector_norm(self.W_E, dim=1, keepdim=keepdim))

    @torch.no_grad()
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        self.W_E.mul_(scale_to(value, torch.linalg.vector_norm(self.W_E, dim=1, keepdim=True)))

    @torch.no_grad()
    def init_decoder_bias_with_geometric_median(self, batch: Mapping[str, Any]) -> None:
        """Each site's decoder bias `=` the geometric median of its valid (normalised) labels."""
        if not self.cfg.use_decoder_bias:
            raise ConfigError("bias_init_method: use_decoder_bias is off; there is no bias to set")
        for b_D, y in zip(self.decoder_biases, self.own_sites(self.prepare_label(batch)), strict=True):
            b_D.copy_(geometric_median(valid_rows(y, batch)))

    @torch.no_grad()
    def init_encoder_bias_with_mean_hidden_pre(self, batch: Mapping[str, Any]) -> None:
        """`b_E[j] = -` the mean over valid tokens of `x_j W_E[j]` (`batch` is normalised)."""
        for b_F, x, W_DF in zip(self.b_E, self.own_sites(self.prepare_input(batch)), self.W_E, strict=True):
            b_F.copy_(-valid_rows(x, batch).mean(0) @ W_DF)


def side_by_side(x_SND: Tensor) -> Tensor:
    """Each token's activations of all sites in a row, `[N, S * D]`."""
    return x_SND.transpose(0, 1).flatten(1)
