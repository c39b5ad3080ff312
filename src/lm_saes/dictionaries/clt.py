"""The cross-layer transcoder: latents of layer i read layer i and write to every layer from i on.

    h_l = x_l W_E[l] + b_E[l],   f_l = h_l where selected, else 0
    y_hat_l = sum over i <= l of f_i W_D.l[i] + b_D.l

Letters: N tokens, L layers, D width, F latents of a layer, T target layers. Decoders are stored by source,
`decoders[i] [F, L - i, D]`: one active latent's write to all its target layers is one contiguous read. Files hold them
by target, `W_D.l [l + 1, F, D]`.
Source: Ameisen et al. 2025, Circuit Tracing (transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lm_saes.dictionaries.config import ALL_ACTIVATIONS, BaseSAEConfig
from lm_saes.dictionaries.rows import active_directions, scale_to, valid_rows
from lm_saes.dictionaries.sites import SitedDictionary, side_by_side
from lm_saes.dictionaries.weight_files import check_fit
from lm_saes.latents.codes import Code
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.encode.linear import LayeredEncoder, LinearEncoder
from lm_saes.latents.gradients.rows import chosen_rows
from lm_saes.latents.record import Record, squared_length
from lm_saes.losses.dead_latents import DeadList, strongest


class CLTConfig(BaseSAEConfig):
    """A cross-layer transcoder; `hook_points_in[l]` and `hook_points_out[l]` belong to layer l."""

    activation_functions: ClassVar[frozenset[str]] = ALL_ACTIVATIONS

    sae_type: Literal["clt"] = "clt"  # type: ignore[assignment]
    """Kind of dictionary."""
    hook_points_in: list[str] = Field(min_length=1)
    """Hook point that each layer's latents read."""
    hook_points_out: list[str] = Field(min_length=1)
    """Hook point that is reconstructed in each layer."""
    init_cross_layer_decoder_all_zero: bool = False
    """Start decoders to other layers than the latent's own at zero."""
    decode_with_csr: bool = False
    """Kept for old configs; the sparse path is chosen automatically."""
    sparsity_threshold_for_csr: float = 0.05
    """Kept for old configs; the sparse path is chosen automatically."""

    @model_validator(mode="after")
    def _check_layers(self) -> CLTConfig:
        if len(self.hook_points_in) != len(self.hook_points_out):
            lengths = f"{len(self.hook_points_in)} and {len(self.hook_points_out)}"
            raise ValueError(f"hook_points_in, hook_points_out: name {lengths} layers; give one of each a layer")
        old = ("decode_with_csr", "sparsity_threshold_for_csr")
        self.warn_without_effect(old, "the sparse path is chosen automatically")
        return self

    @property
    def hook_points_read(self) -> list[str]:
        return self.hook_points_in

    @property
    def hook_points_written(self) -> list[str]:
        return self.hook_points_out

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return len(self.hook_points_in)

    @property
    def n_decoders(self) -> int:
        """Pairs of source and target layer, L (L + 1) / 2."""
        return self.n_layers * (self.n_layers + 1) // 2

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        return (self.n_layers, self.d_sae)

    @property
    def n_selection_pools(self) -> int:
        return self.n_layers


class CrossLayerTranscoder(SitedDictionary):
    """A cross-layer transcoder. Inputs, labels and reconstructions are `[L, ..., D]`, latents `[..., L, F]`."""

    config_class = CLTConfig
    reads_uniform_bounds = False
    latent_dimensions = ("layers", "sae")
    cfg: CLTConfig

    def __init__(self, cfg: CLTConfig) -> None:
        super().__init__(cfg)
        layers, d_model, d_sae = cfg.n_layers, cfg.d_model, cfg.d_sae
        self.W_E = nn.Parameter(torch.zeros(layers, d_sae, d_model, dtype=cfg.dtype).transpose(1, 2))
        self.b_E = nn.Parameter(torch.zeros(layers, d_sae, dtype=cfg.dtype))
        self.decoders = nn.ParameterList(
            torch.zeros(d_sae, layers - i, d_model, dtype=cfg.dtype) for i in range(layers)
        )
        biases = layers if cfg.use_decoder_bias else 0
        self.b_D = nn.ParameterList(torch.zeros(d_model, dtype=cfg.dtype) for _ in range(biases))

    @property
    def W_D(self) -> list[Tensor]:
        """Decoders by target layer, as in files: `W_D[l]` is `[l + 1, F, D]`, source layers first."""
        layers = range(self.cfg.n_layers)
        return [torch.stack([self.decoders[i][:, target - i] for i in range(target + 1)]) for target in layers]

    @property
    def decoder_biases(self) -> Iterable[Tensor]:
        return self.b_D

    # -- forward ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> LayeredEncoder:
        """The encoders of all layers."""
        return LayeredEncoder(self.W_E, self.b_E)

    def hidden_pre(self, x: Tensor) -> Tensor:
        h_RF = self.encoder.pre_activations(side_by_side(x.flatten(1, -2)))
        return h_RF.view(*x.shape[1:-1], self.cfg.n_layers, -1)

    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        return self._add_up([code.site(i).decode(self.decoders[i]) for i in range(self.cfg.n_layers)])

    def _add_up(self, written: list[Tensor], bias: bool = True) -> Tensor:
        """`y [L, N, D]` from what each source layer writes to its targets, `[N, (L - i) D]`."""
        layers, d_model = self.cfg.n_layers, self.cfg.d_model
        parts = [w_NX.view(len(w_NX), layers - i, d_model) for i, w_NX in enumerate(written)]
        y = [
            sum((parts[i][:, target - i] for i in range(1, target + 1)), parts[0][:, target])
            for target in range(layers)
        ]
        y_LND = self.axes.latents.leave(torch.stack(y))
        return y_LND + torch.stack(list(self.b_D))[:, None] if bias and len(self.b_D) else y_LND

    @property
    def dead_shape(self) -> tuple[int, ...]:
        return (self.cfg.n_layers, self.n_latents)

    def latent_entries(self, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents, values = record.code.entries()
        return rows // self.cfg.n_layers, rows % self.cfg.n_layers * self.n_latents + latents, values

    # -- losses ----------------------------------------------------------------------------------------------------

    def pre_activation_loss(self, record: Record) -> Tensor:
        """As the autoencoder's, by each layer's thresholds and norms; mean over tokens and layers."""
        layers = enumerate(zip(self.hidden_pre(record.input).unbind(-2), record.norm, strict=True))
        short_L = [self.shortfall(Hidden.around(h_NF), norm_F, record.mask, layer) for layer, (h_NF, norm_F) in layers]
        return record.row_mean_of_sum(self.axes.latents.leave(torch.stack(short_L).sum()))

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        scale_LF = self.selection_scale(record.norm)
        written = []
        for i, (x_ND, D_FTD) in enumerate(zip(record.input, self.decoders, strict=True)):
            here = dead[i].latents
            W_XD = chosen_rows(self.W_E, self.W_E.mT.flatten(0, 1), here + i * self.n_latents)
            h_NX = LinearEncoder(W_XD.T, self.b_E[i].index_select(0, here)).pre_activations(x_ND)
            f_NX = strongest(h_NX, dead[i].scale(None if scale_LF is None else scale_LF[i]), k_aux, self.axes.latents)
            written.append(f_NX @ chosen_rows(D_FTD, D_FTD, here).flatten(1))
        error_LND = (record.label - record.reconstruction).detach()
        difference = error_LND - self._add_up(written, bias=False)
        return record.token_mean(squared_length(difference))

    # -- norms, folding --------------------------------------------------------------------------------------------

    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        norm_LF = torch.stack([torch.linalg.vector_norm(D_FTD.flatten(1), dim=1) for D_FTD in self.decoders])
        return norm_LF[..., None] if keepdim else norm_LF

    def decoder_bias_norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(b_D) for b_D in self.b_D]
        return torch.stack(norms).mean() if norms else self.b_E.new_zeros(())

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        """Bring the norm over all target layers together to `value`."""
        for D_FTD, ratio_F in zip(self.decoders, scale_to(value, self.decoder_norm(), force_exact), strict=True):
            D_FTD.mul_(ratio_F[:, None, None])

    @torch.no_grad()
    def transform_to_unit_decoder_norm(self) -> None:
        """Scale each latent's decoders to a joint norm of 1 and its encoder by the old norm: the same function.

        Raises:
            NotImplementedError: ungated top-k selection, where it would change which latents are selected.
        """
        norm_LF = self.unit_norm_factors()
        for D_FTD, norm_F in zip(self.decoders, norm_LF, strict=True):
            D_FTD.div_(norm_F[:, None, None])
        self.W_E.mul_(norm_LF[:, None])
        self.b_E.mul_(norm_LF)

    def fold_factors(self) -> None:
        """With gating, selection keeps the trained norms (`selection_norm`)."""
        factors_in = [self.compute_norm_factor(self.b_E, hook) for hook in self.cfg.hook_points_in]
        factors_out = torch.stack([self.compute_norm_factor(self.b_E, hook) for hook in self.cfg.hook_points_out])
        self.keep_selection_norm()
        self.W_E.mul_(torch.stack(factors_in)[:, None, None])
        for i, D_FTD in enumerate(self.decoders):
            D_FTD.div_(factors_out[i:, None])
        for b_D, factor in zip(self.b_D, factors_out, strict=False):
            b_D.div_(factor)

    # -- initialisation, files -------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        """`W_E` uniform within +-1/sqrt(F), decoders within +-1/sqrt(L D) (the bounds are not read); biases 0."""
        for W_DF in self.W_E:
            self.draw_uniform(W_DF.T, self.cfg.d_sae**-0.5)
        bound = (self.cfg.n_layers * self.cfg.d_model) ** -0.5
        for D_FTD in self.decoders:
            self.draw_uniform(D_FTD, bound)
            if self.cfg.init_cross_layer_decoder_all_zero:
                D_FTD[:, 1:] = 0
        for bias in (self.b_E, *self.b_D):
            bias.zero_()
        self.init_thresholds(init_log_jumprelu_threshold_value)

    @torch.no_grad()
    def init_W_D_with_active_subspace(self, batch: Mapping[str, Any], d_active_subspace: int) -> None:
        """Each target layer's decoders within the directions of most variance of its (normalised) labels."""
        for target, y in enumerate(self.prepare_label(batch)):
            directions_MD = active_directions(valid_rows(y, batch), d_active_subspace).to(self.cfg.dtype)
            for i in range(target + 1):
                W_FD = self.decoders[i][:, target - i]
                W_FD.copy_(W_FD[:, : len(directions_MD)] @ directions_MD)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every tensor under its name in files: decoders by target layer, `W_D.l [l + 1, F, D]`."""
        state = {name: t for name, t in super().full_state_dict().items() if not name.startswith("decoders.")}
        return {**state, **{f"W_D.{target}": W.detach() for target, W in enumerate(self.W_D)}}

    @torch.no_grad()
    def load_full_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        layers, width = range(self.cfg.n_layers), (self.n_latents, self.cfg.d_model)
        given = {name: t for name, t in state.items() if name.startswith("W_D.")}
        check_fit({f"W_D.{to}": torch.empty(to + 1, *width, device="meta") for to in layers}, given, strict)
        own = {f"decoders.{i}": D_FTD for i, D_FTD in enumerate(self.decoders)}
        super().load_full_state_dict({n: t for n, t in {**state, **own}.items() if n not in given}, strict)
        for to in layers:
            for i, W_FD in enumerate(given.get(f"W_D.{to}", ())):
                self.decoders[i][:, to - i] = W_FD

    def dim_maps(self) -> dict[str, dict[str, int]]:
        maps = {"W_E": {"model": 2}, "b_E": {"model": 1}, "activation_function.log_jumprelu_threshold": {"model": 1}}
        maps |= {f"decoders.{i}": {"model": 0} for i in range(self.cfg.n_layers)}
        return {name: maps.get(name, {}) for name, _ in self.named_parameters()}

    def file_dim_maps(self) -> dict[str, dict[str, int]]:
        return super().file_dim_maps() | {f"W_D.{target}": {"model": 1} for target in range(self.cfg.n_layers)}
