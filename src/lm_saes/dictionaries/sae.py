"""The sparse autoencoder, and the transcoder: the same mathematics reading one hook point and writing another.

    h = x W_E + b_E            (GLU: times sigmoid(x W_E_glu + b_E_glu))
    f = h where selected, else 0
    y_hat = f W_D + b_D

Letters: N tokens, D width, F latents. Encoder parameters have shape `[D, F]` but are stored latent-major, so that one
latent's weights lie together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_saes import machine
from lm_saes.dictionaries.rows import active_directions, scale_to, valid_rows
from lm_saes.dictionaries.single import LinearlyEncoded, SingleConfig
from lm_saes.latents.codes import Code
from lm_saes.latents.encode.linear import LinearEncoder
from lm_saes.latents.gradients.rows import chosen_rows
from lm_saes.latents.record import Record
from lm_saes.losses.dead_latents import DeadList, auxk


class SAEConfig(SingleConfig):
    """A sparse autoencoder, or a transcoder if the two hook points differ."""

    sae_type: Literal["sae"] = "sae"  # type: ignore[assignment]
    """Kind of dictionary."""
    hook_point_out: str = Field(min_length=1)
    """Hook point that is reconstructed; another than `hook_point_in` makes a transcoder."""
    use_glu_encoder: bool = False
    """Multiply each pre-activation by a learnt gate (gated linear unit)."""


def _latent_major(d_model: int, d_sae: int, cfg: SAEConfig) -> nn.Parameter:
    return nn.Parameter(torch.zeros(d_sae, d_model, dtype=cfg.dtype).T)


class SparseAutoEncoder(LinearlyEncoded):
    """A sparse autoencoder or transcoder."""

    config_class = SAEConfig
    cfg: SAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        d_model, d_sae = cfg.d_model, cfg.d_sae
        self.W_E = _latent_major(d_model, d_sae, cfg)
        self.b_E = nn.Parameter(torch.zeros(d_sae, dtype=cfg.dtype))
        if cfg.use_glu_encoder:
            self.W_E_glu = _latent_major(d_model, d_sae, cfg)
            self.b_E_glu = nn.Parameter(torch.zeros(d_sae, dtype=cfg.dtype))
        self.W_D = nn.Parameter(torch.zeros(d_sae, d_model, dtype=cfg.dtype))
        self.b_D = nn.Parameter(torch.zeros(d_model, dtype=cfg.dtype)) if cfg.use_decoder_bias else None

    # -- forward ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> LinearEncoder:
        """The encoder's weights."""
        if self.cfg.use_glu_encoder:
            return LinearEncoder(self.W_E, self.b_E, self.W_E_glu, self.b_E_glu)
        return LinearEncoder(self.W_E, self.b_E)

    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        return self._add_up(code.decode(self.W_D))

    # -- losses ----------------------------------------------------------------------------------------------------

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        scale_X, latents = dead[0].scale(self.selection_scale(record.norm[0])), dead[0].latents
        h_NX = self.encoder.rows(latents).pre_activations(record.input[0])
        return auxk(record, h_NX, scale_X, chosen_rows(self.W_D, self.W_D, latents), k_aux)

    # -- norms, folding --------------------------------------------------------------------------------------------

    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        return torch.linalg.vector_norm(self.W_D, dim=1, keepdim=keepdim)

    @torch.no_grad()
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        self.W_E.mul_(scale_to(value, self.encoder_norm(keepdim=True)))

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        self.W_D.mul_(scale_to(value, self.decoder_norm(keepdim=True), force_exact))

    @torch.no_grad()
    def transform_to_unit_decoder_norm(self) -> None:
        """Scale each decoder row to norm 1 and its encoder by the old norm: the same function.

        Raises:
            NotImplementedError: ungated top-k selection, where it would change which latents are selected.
        """
        norm_F = self.unit_norm_factors()
        self.W_D.div_(norm_F[:, None])
        self.W_E.mul_(norm_F)
        self.b_E.mul_(norm_F)

    def fold_factors(self) -> None:
        factor_in, factor_out = self.norm_factors(self.W_D)
        self.W_E.mul_(factor_in)
        if self.cfg.use_glu_encoder:
            self.W_E_glu.mul_(factor_in)
        self.W_D.div_(factor_out)
        self.fold_beside_weights(factor_out, growth=1 / factor_out)

    # -- initialisation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        """`W_E`, `W_E_glu`, `W_D` uniform within their bounds, biases 0, thresholds as given."""
        self.draw_uniform(self.W_E.T, encoder_uniform_bound)
        self.draw_uniform(self.W_D, decoder_uniform_bound)
        if self.cfg.use_glu_encoder:
            self.draw_uniform(self.W_E_glu.T, encoder_uniform_bound)
            self.b_E_glu.zero_()
        self.b_E.zero_()
        if self.b_D is not None:
            self.b_D.zero_()
        self.init_thresholds(init_log_jumprelu_threshold_value)

    @torch.no_grad()
    def init_encoder_with_decoder_transpose(self, factor: float = 1.0) -> None:
        """`W_E = factor x W_D^T`."""
        self.W_E.copy_(self.W_D.T).mul_(factor)

    @torch.no_grad()
    def init_W_D_with_active_subspace(self, batch: Mapping[str, Any], d_active_subspace: int) -> None:
        """`W_D <- W_D[:, :m] U_m^T`: decoder rows within the m directions of most variance of the normalised labels."""
        directions_MD = active_directions(valid_rows(self.prepare_label(batch), batch), d_active_subspace)
        self.W_D.copy_(self.W_D[:, : len(directions_MD)] @ directions_MD.to(self.cfg.dtype))

    @torch.no_grad()
    def init_tc_with_mlp(self, batch: Mapping[str, Any], mlp: Callable[[Tensor], Tensor]) -> None:
        """Decoder row i `= MLP(mean + direction_i x mean distance from the mean)`, less the rows' mean, of norm 1.

        `direction_i` is encoder direction i, brought to norm 1; mean and distance are those of the valid inputs.

        Args:
            batch: raw activations.
            mlp: raw activations `[n, d]` at `hook_point_in` to raw ones at `hook_point_out`.
        """
        x_ND = valid_rows(self.prepare_input(batch), batch).to(self.cfg.dtype)
        mean_D = x_ND.mean(0)
        distance = torch.linalg.vector_norm(x_ND - mean_D, dim=1).mean()
        self.set_encoder_to_fixed_norm(1.0)
        blocks = self.W_E.T.split(machine.MLP_ROWS)
        y_FD = torch.cat([mlp(mean_D + distance * directions) for directions in blocks])
        self.W_D.copy_(y_FD - y_FD.mean(0))
        self.set_decoder_to_fixed_norm(1.0, force_exact=True)

    def dim_maps(self) -> dict[str, dict[str, int]]:
        maps = {"W_E": {"model": 1}, "b_E": {"model": 0}, "W_D": {"model": 0}, "b_D": {},
                "W_E_glu": {"model": 1}, "b_E_glu": {"model": 0},
                "activation_function.log_jumprelu_threshold": {"model": 0}}  # fmt: skip
        return {name: maps[name] for name, _ in self.named_parameters()}
