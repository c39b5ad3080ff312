"""The mixture of linear transforms: each latent switches on a low-rank linear map of the input (Anthropic, 2025).

    h = x W_E + b_E
    f = h where selected, else 0
    y_hat = sum_i f_i U_i (V_i x) + b_D

Letters: N tokens, D width, F latents, n transforms of one rank r. Latents are ordered by ascending rank. `W_E` has
shape `[D, F]` and `U` of a rank `[n, D, r]`, but they are stored latent-major and rank-major, so that what a transform
needs lies together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor, nn

from lm_saes import machine
from lm_saes.dictionaries.rows import scale_to
from lm_saes.dictionaries.single import LinearlyEncoded, SingleConfig
from lm_saes.errors import ConfigError
from lm_saes.latents.codes import Code, DenseCode
from lm_saes.latents.encode.linear import LinearEncoder
from lm_saes.latents.encode.transforms import Transforms, active_code
from lm_saes.latents.record import Record, squared_length
from lm_saes.losses.dead_latents import DeadList, strongest

Positive = Annotated[int, Field(gt=0)]


class MOLTConfig(SingleConfig):
    """A mixture of linear transforms, which reads one hook point and writes another (or the same)."""

    sae_type: Literal["molt"] = "molt"  # type: ignore[assignment]
    """Kind of dictionary."""
    rank_counts: dict[Positive, Positive] = Field(min_length=1)
    """How many transforms there are of each rank; `d_sae` is their sum."""
    expansion_factor: float | None = Field(default=None, gt=0)  # type: ignore[assignment]
    """Not needed; if given, `int(d_model * expansion_factor)` must be the number of transforms."""

    @model_validator(mode="after")
    def _check_expansion_factor(self, info: ValidationInfo) -> MOLTConfig:
        factor = self.expansion_factor
        if factor is not None and abs(self.d_model * factor - self.d_sae) >= 1:
            raise ValueError(
                f"expansion_factor={factor}: gives {int(self.d_model * factor)} latents at d_model={self.d_model}, but "
                f"rank_counts has {self.d_sae} transforms; remove it"
            )
        return self

    @property
    def d_sae(self) -> int:
        """Number of latents, which are transforms."""
        return sum(self.rank_counts.values())

    @property
    def ranks(self) -> dict[int, int]:
        """`rank_counts` in the order of latents: by ascending rank."""
        return dict(sorted(self.rank_counts.items()))


class MixtureOfLinearTransform(LinearlyEncoded):
    """A mixture of linear transforms."""

    config_class = MOLTConfig
    reads_uniform_bounds = False
    density_scale = machine.TRANSFORM_DENSITY_SCALE
    cfg: MOLTConfig  # type: ignore[assignment]

    def __init__(self, cfg: MOLTConfig) -> None:
        super().__init__(cfg)
        d_model, d_sae = cfg.d_model, cfg.d_sae
        self.W_E = nn.Parameter(torch.zeros(d_sae, d_model, dtype=cfg.dtype).T)
        self.b_E = nn.Parameter(torch.zeros(d_sae, dtype=cfg.dtype))
        self.U_matrices, self.V_matrices = nn.ParameterDict(), nn.ParameterDict()
        for rank, n in cfg.ranks.items():
            self.U_matrices[str(rank)] = nn.Parameter(torch.zeros(n, rank, d_model, dtype=cfg.dtype).mT)
            self.V_matrices[str(rank)] = nn.Parameter(torch.zeros(n, rank, d_model, dtype=cfg.dtype))
        self.b_D = nn.Parameter(torch.zeros(d_model, dtype=cfg.dtype)) if cfg.use_decoder_bias else None

    # -- forward ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> LinearEncoder:
        """The encoder's weights."""
        return LinearEncoder(self.W_E, self.b_E)

    @property
    def transforms(self) -> Transforms:
        """All transforms, in the order of latents."""
        return Transforms([(self.U_matrices[str(rank)], self.V_matrices[str(rank)]) for rank in self.cfg.ranks])

    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        return self._add_up(self.transforms.mix(code, self.axes.latents.enter(self.rows_of(x)[0])))

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        """The (normalised) reconstruction of dense latents `[..., F]`, which transform the (normalised) input `x`."""
        if x is None:
            raise ConfigError("decode: the latents of a mixture of linear transforms act on its input; give x")
        f_NF = feature_acts.reshape(-1, self.n_latents)
        return self._decode_code(DenseCode(f_NF) if f_NF.requires_grad else active_code(f_NF), x).view(x.shape)

    # -- losses ----------------------------------------------------------------------------------------------------

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        """As for an autoencoder: what the dead transforms make of the input is to explain the error."""
        x_ND, scale_F = record.input[0], self.selection_scale(record.norm[0])
        latents = dead[0].exact
        h_NX = self.encoder.rows(latents).pre_activations(x_ND)
        f_NX = strongest(h_NX, None if scale_F is None else scale_F.index_select(0, latents), k_aux, self.axes.latents)
        error_ND = (record.label[0] - record.reconstruction[0]).detach()
        y_ND = self.axes.latents.leave(self.transforms.select(latents).mix(active_code(f_NX), x_ND))
        difference = error_ND - y_ND
        return record.token_mean(squared_length(difference))

    # -- norms, folding --------------------------------------------------------------------------------------------

    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        """`||U_i V_i||_F` of each transform, `[F]`; differentiable."""
        norm_F = self.transforms.norms()
        return norm_F[:, None] if keepdim else norm_F

    @torch.no_grad()
    def _scale_transforms(self, factor_F: Tensor) -> None:
        """Multiply each `U_i V_i` by a positive factor, shared evenly between `U_i` and `V_i`."""
        roots = factor_F.sqrt().split([len(V_nrD) for V_nrD in self.V_matrices.values()])
        for (U_nDr, V_nrD), root_n in zip(self.transforms.groups, roots, strict=True):
            U_nDr.mul_(root_n[:, None, None])
            V_nrD.mul_(root_n[:, None, None])

    @torch.no_grad()
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        self.W_E.mul_(scale_to(value, self.encoder_norm(keepdim=True)))

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        self._scale_transforms(scale_to(value, self.decoder_norm(), force_exact))

    @torch.no_grad()
    def transform_to_unit_decoder_norm(self) -> None:
        """Bring each transform to norm 1 and scale its encoder by the old norm: the same function.

        Raises:
            NotImplementedError: ungated top-k selection, where it would change which latents are selected.
        """
        norm_F = self.unit_norm_factors()
        self._scale_transforms(1 / norm_F)
        self.W_E.mul_(norm_F)
        self.b_E.mul_(norm_F)

    def fold_factors(self) -> None:
        """The input is scaled twice, where latents read it and where transforms do.

        So the transforms are multiplied by the input's factor over the output's. Their norms stay in proportion.
        """
        factor_in, factor_out = self.norm_factors(self.W_E)
        growth = factor_in / factor_out
        self.W_E.mul_(factor_in)
        self._scale_transforms(growth.expand(self.n_latents))
        self.fold_beside_weights(factor_out, growth)

    # -- initialisation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        """`W_E`, `U` and `V` uniform within +-1/sqrt(F) (the bounds are not read); biases 0, thresholds as given."""
        bound = self.cfg.d_sae**-0.5
        self.draw_uniform(self.W_E.T, bound)
        for U_nDr, V_nrD in self.transforms.groups:
            for maps in (U_nDr.mT, V_nrD):
                self.axes.latents.draw(maps, lambda block: block.uniform_(-bound, bound))
        self.b_E.zero_()
        if self.b_D is not None:
            self.b_D.zero_()
        self.init_thresholds(init_log_jumprelu_threshold_value)

    @property
    def latent_runs(self) -> list[int]:
        """The transforms of each rank are cut evenly."""
        return list(self.cfg.ranks.values())

    def dim_maps(self) -> dict[str, dict[str, int]]:
        """Every rank's transforms are cut along the model axis."""
        maps = {"W_E": {"model": 1}, "b_D": dict[str, int]()}
        return {name: maps.get(name, {"model": 0}) for name, _ in self.named_parameters()}
