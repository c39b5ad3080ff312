"""A dictionary kind as somebody outside would add one: a tied autoencoder, whose one matrix both reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lm_saes.dictionaries.rows import scale_to
from lm_saes.dictionaries.single import LinearlyEncoded, SingleConfig
from lm_saes.latents.codes import Code
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.record import Record
from lm_saes.losses.dead_latents import DeadList, auxk


class TiedConfig(SingleConfig):
    """A tied autoencoder."""

    sae_type: Literal["tied"] = "tied"  # type: ignore[assignment]


class Tied(LinearlyEncoded):
    """`h = gain_0 x W^T + b_E`, `y = gain_1 f W + b_D`, `W [F, D]`; the gains take in the activations' factors."""

    config_class = TiedConfig

    def __init__(self, cfg: TiedConfig) -> None:
        super().__init__(cfg)
        self.W = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_model, dtype=cfg.dtype))
        self.b_E = nn.Parameter(torch.zeros(cfg.d_sae, dtype=cfg.dtype))
        self.b_D = nn.Parameter(torch.zeros(cfg.d_model, dtype=cfg.dtype)) if cfg.use_decoder_bias else None
        self.gain: Tensor
        self.register_buffer("gain", torch.ones(2, dtype=cfg.dtype))

    @property
    def encoder(self) -> LinearEncoder:
        return LinearEncoder(self.W.T * self.gain[0], self.b_E)

    def _encode_rows(self, x: Tensor, mask_N: Tensor | None, norm: Tensor) -> Code:
        x_ND = self.axes.latents.enter(self.rows_of(x)[0])
        return encode(x_ND, self.encoder, self.selector, self.selection_scale(norm), mask_N)

    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        return self._add_up(code.decode(self.W) * self.gain[1])

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        h_NX = self.encoder.rows(dead[0].latents).pre_activations(record.input[0])
        W_XD = self.W.index_select(0, dead[0].latents) * self.gain[1]
        return auxk(record, h_NX, dead[0].scale(self.selection_scale(record.norm[0])), W_XD, k_aux)

    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        return torch.linalg.vector_norm(self.W, dim=1, keepdim=keepdim) * self.gain[1]

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        self.W.mul_(scale_to(value, self.decoder_norm(keepdim=True), force_exact))

    @torch.no_grad()
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        self.W.mul_(scale_to(value, self.encoder_norm()[:, None]))

    def transform_to_unit_decoder_norm(self) -> None:
        raise NotImplementedError("a tied autoencoder's encoder cannot take in what its decoder loses")

    def fold_factors(self) -> None:
        factor_in, factor_out = self.norm_factors(self.W)
        self.gain.mul_(torch.stack([factor_in, 1 / factor_out]))
        self.fold_beside_weights(factor_out, growth=1 / factor_out)

    @torch.no_grad()
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        self.draw_uniform(self.W, decoder_uniform_bound)
        self.gain.fill_(1)
        self.init_thresholds(init_log_jumprelu_threshold_value)

    def dim_maps(self) -> dict[str, dict[str, int]]:
        return {name: {} if name == "b_D" else {"model": 0} for name, _ in self.named_parameters()}
