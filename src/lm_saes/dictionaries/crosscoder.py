"""The crosscoder: one set of latents that reads and writes several hook points (heads) at once.

    h = sum over heads j of (x_j W_E[j] + b_E[j])
    f_j = h where head j selects on h (gated: on h norm_j), else 0
    y_hat_j = f_j W_D[j] + b_D[j]

Letters: N tokens, H heads, D width, F latents. `W_E` has shape `[H, D, F]` but is stored latent-major, so that one
latent's weights in all heads lie together and the products of all heads are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_saes.dictionaries.config import ALL_ACTIVATIONS, BaseSAEConfig
from lm_saes.dictionaries.rows import active_directions, scale_to, valid_rows
from lm_saes.dictionaries.sites import SitedDictionary, side_by_side
from lm_saes.latents.codes import Code
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.encode.linear import LinearEncoder
from lm_saes.latents.gradients.rows import chosen_rows
from lm_saes.latents.record import Record
from lm_saes.losses.dead_latents import DeadList, auxk


class CrossCoderConfig(BaseSAEConfig):
    """A crosscoder over several hook points of one width."""

    activation_functions: ClassVar[frozenset[str]] = ALL_ACTIVATIONS

    sae_type: Literal["crosscoder"] = "crosscoder"  # type: ignore[assignment]
    """Kind of dictionary."""
    hook_points: list[str] = Field(min_length=1)
    """The hook points that are read and reconstructed, one head each."""

    @property
    def hook_points_read(self) -> list[str]:
        return self.hook_points

    @property
    def hook_points_written(self) -> list[str]:
        return self.hook_points

    @property
    def n_heads(self) -> int:
        """Number of hook points."""
        return len(self.hook_points)


class CrossCoder(SitedDictionary):
    """A crosscoder. Inputs, labels and reconstructions are `[H, ..., D]`, latents `[..., H, F]`."""

    config_class = CrossCoderConfig
    averages_sites = True
    latent_dimensions = ("heads", "sae")
    cfg: CrossCoderConfig

    def __init__(self, cfg: CrossCoderConfig) -> None:
        super().__init__(cfg)
        heads, d_model, d_sae = cfg.n_heads, cfg.d_model, cfg.d_sae
        self.W_E = nn.Parameter(torch.zeros(d_sae, heads, d_model, dtype=cfg.dtype).permute(1, 2, 0))
        self.b_E = nn.Parameter(torch.zeros(heads, d_sae, dtype=cfg.dtype))
        self.W_D = nn.Parameter(torch.zeros(heads, d_sae, d_model, dtype=cfg.dtype))
        self.b_D = nn.Parameter(torch.zeros(heads, d_model, dtype=cfg.dtype)) if cfg.use_decoder_bias else None

    @property
    def decoder_biases(self) -> Iterable[Tensor]:
        return () if self.b_D is None else self.b_D

    # -- forward ---------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> LinearEncoder:
        """All heads' encoders as one, reading their inputs side by side. (Adds up biases: every process has to ask.)"""
        return replace(self._shared_encoder, n_sites=self.cfg.n_heads)

    @property
    def _shared_encoder(self) -> LinearEncoder:
        """The same for what all heads share: one row a token."""
        sites, W_XF = self.axes.sites, self.W_E.reshape(-1, self.n_latents)
        return LinearEncoder(W_XF, sites.leave(self.b_E.sum(0)), W_of=self.W_E, shared=sites)

    def hidden_pre(self, x: Tensor) -> Tensor:
        x_NX = side_by_side(self.own_sites(x.flatten(1, -2)))
        return self._shared_encoder.pre_activations(x_NX).view(*x.shape[1:-1], -1)

    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        own = code.of_sites(self.own_sites(range(self.n_sites)), self.axes.sites)
        y_RD = self.axes.latents.leave(own.decode(self.W_D))
        y_HND = y_RD.view(-1, len(self.W_D), self.cfg.d_model).transpose(0, 1)
        return self.axes.sites.beside(y_HND if self.b_D is None else y_HND + self.b_D[:, None])

    def latent_counts(self, record: Record) -> Tensor:
        """A latent counts as active on as many tokens as its most active head."""
        return record.counts.view(self.n_sites, -1).amax(0)

    def latent_entries(self, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """A latent that several heads keep on a token is one entry: they keep the same value."""
        rows, latents, values = record.code.entries()
        keys = rows // self.cfg.n_heads * self.n_latents + latents
        keys, order = keys.sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        return keys[first] // self.n_latents, keys[first] % self.n_latents, values[order][first]

    # -- losses ----------------------------------------------------------------------------------------------------

    def pre_activation_loss(self, record: Record) -> Tensor:
        """As the autoencoder's, by each head's norms; mean over tokens and heads."""
        hidden = Hidden.around(self.hidden_pre(record.input))
        short_H = [self.shortfall(hidden, norm_F, record.mask) for norm_F in record.norm]
        return record.row_mean_of_sum(self.axes.latents.leave(torch.stack(short_H).sum()))

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        scale_HF, latents = self.selection_scale(record.norm), dead[0].latents
        sites, x_NX = self.axes.sites, side_by_side(self.own_sites(record.input))
        h_NX = sites.enter(self._shared_encoder.rows(latents).pre_activations(x_NX))
        of_heads = torch.arange(len(self.W_D), device=latents.device)[:, None] * self.n_latents
        rows = chosen_rows(self.W_D, self.W_D.flatten(0, 1), (of_heads + latents).flatten())
        losses = []
        for head, W_XD in zip(self.own_sites(range(self.n_sites)), rows.chunk(len(self.W_D)), strict=True):
            scale_X = dead[0].scale(None if scale_HF is None else scale_HF[head])
            losses.append(auxk(record, h_NX, scale_X, W_XD, k_aux, head))
        return sites.leave(torch.stack(losses).sum()) / self.n_sites

    # -- norms, folding --------------------------------------------------------------------------------------------

    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        return self.axes.sites.beside(torch.linalg.vector_norm(self.W_D, dim=2, keepdim=keepdim))

    def decoder_bias_norm(self) -> Tensor:
        if self.b_D is None:
            return self.W_D.new_zeros(())
        return self.axes.sites.beside(torch.linalg.vector_norm(self.b_D, dim=1)).mean()

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        self.W_D.mul_(scale_to(value, torch.linalg.vector_norm(self.W_D, dim=2, keepdim=True), force_exact))

    def transform_to_unit_decoder_norm(self) -> None:
        """Not possible: a latent's heads share one pre-activation.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a crosscoder's heads share one encoder: norms that differ between heads cannot all be moved into it"
        )

    def fold_factors(self) -> None:
        """With gating, selection keeps the trained norms (`selection_norm`)."""
        own_hooks = self.own_sites(self.cfg.hook_points)
        factors = torch.stack([self.compute_norm_factor(self.W_D, hook) for hook in own_hooks])
        self.keep_selection_norm()
        self.W_E.mul_(factors[:, None, None])
        self.W_D.div_(factors[:, None, None])
        if self.b_D is not None:
            self.b_D.div_(factors[:, None])

    # -- initialisation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        """`W_E`, `W_D` uniform within their bounds, one head drawn and copied to all; biases 0, thresholds as given."""
        self.draw_uniform(self.W_E[0].T, encoder_uniform_bound)
        self.W_E.copy_(self.W_E[0].clone().expand_as(self.W_E))
        self.draw_uniform(self.W_D[0], decoder_uniform_bound)
        self.W_D.copy_(self.W_D[0].clone().expand_as(self.W_D))
        self.b_E.zero_()
        if self.b_D is not None:
            self.b_D.zero_()
        self.init_thresholds(init_log_jumprelu_threshold_value)

    @torch.no_grad()
    def init_encoder_with_decoder_transpose(self, factor: float = 1.0) -> None:
        """`W_E[j] = factor x W_D[j]^T` for every head."""
        self.W_E.copy_(self.W_D.transpose(1, 2)).mul_(factor)

    @torch.no_grad()
    def init_W_D_with_active_subspace(self, batch: Mapping[str, Any], d_active_subspace: int) -> None:
        """`W_D[j] <- W_D[j][:, :m] R_j U_j^T`, `U_j` the m directions of most variance of head j's (normalised) labels.

        Each head's directions have signs and an order of their own, in which rows that are alike in all heads would
        mean something else in each. So the rotation `R_j` (none for the first head) brings head j's coordinates of the
        tokens closest to the first head's (the orthogonal Procrustes problem).
        """
        first_NM, own_heads = None, dict(zip(self.own_sites(range(self.n_sites)), self.W_D, strict=True))
        for head, y in enumerate(self.prepare_label(batch)):
            if head and head not in own_heads:
                continue
            y_ND = valid_rows(y, batch).float()
            directions_MD = active_directions(y_ND, d_active_subspace)
            if first_NM is None:
                first_NM = (y_ND - y_ND.mean(0)) @ directions_MD.T
            else:
                left, _, right = torch.linalg.svd(first_NM.T @ (y_ND @ directions_MD.T))
                directions_MD = left @ right @ directions_MD
            if (W_FD := own_heads.get(head)) is not None:
                W_FD.copy_(W_FD[:, : len(directions_MD)] @ directions_MD.to(self.cfg.dtype))

    def dim_maps(self) -> dict[str, dict[str, int]]:
        maps = {"W_E": {"head": 0, "model": 2}, "b_E": {"head": 0, "model": 1}, "W_D": {"head": 0, "model": 1},
                "b_D": {"head": 0}, "activation_function.log_jumprelu_threshold": {"model": 0}}  # fmt: skip
        return {name: maps[name] for name, _ in self.named_parameters()}
