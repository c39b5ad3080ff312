"""An unoptimised twin of the mixture of linear transforms, written from the specification alone.

It builds every `U_i V_i` as a whole matrix and applies all of them to all tokens. Masked tokens it never sees.

Letters: N valid tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lm_saes.dictionaries.molt import MixtureOfLinearTransform, MOLTConfig

from .twin import IN, OUT, THETA, gradients_of, valid

RANKS = {9: 5, 1: 8, 3: 7}
"""A file may name them in any order; latents are ordered by rank. From rank 8 on the code works in another way."""


def molt_config(**settings: Any) -> MOLTConfig:
    """A small transcoding config of 20 transforms; the top-k family gets a k that is small beside them."""
    small: dict[str, Any] = {"d_model": 6, "rank_counts": RANKS, "norm_activation": "inference"}
    small |= {"hook_point_in": IN, "hook_point_out": OUT}
    if "topk" in settings.get("act_fn", ""):
        small["top_k"] = 3
    return MOLTConfig(**(small | settings))


def random_molt(cfg: MOLTConfig, seed: int = 0) -> MixtureOfLinearTransform:
    """A dictionary with every parameter drawn at random: no bias, norm or threshold is 0 or 1; all ranks are used."""
    draw = torch.Generator().manual_seed(seed)
    molt = MixtureOfLinearTransform(cfg)
    with torch.no_grad():
        for name, parameter in molt.named_parameters():
            value = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            even = int(name.split(".")[1]) ** -0.25 if "matrices" in name else 1.0  # norms do not grow with the rank
            parameter.copy_(0.5 * even * value if name != THETA else 0.4 * value - 1)
    return molt


class MoltTwin:
    """The mathematics of section 4 to 6 over leaf copies of a dictionary's parameters."""

    def __init__(self, molt: MixtureOfLinearTransform) -> None:
        self.cfg = molt.cfg
        self.p = {name: p.detach().clone().requires_grad_() for name, p in molt.named_parameters()}
        maps = []
        for rank in sorted(self.cfg.rank_counts):
            for U_Dr, V_rD in zip(self.p[f"U_matrices.{rank}"], self.p[f"V_matrices.{rank}"], strict=True):
                assert U_Dr.shape == (self.cfg.d_model, rank)
                maps.append(U_Dr @ V_rD)
        self.T_FDD = torch.stack(maps)
        self.norm_F = self.T_FDD.square().sum((1, 2)).sqrt()

    def hidden(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.p["W_E"] + self.p["b_E"]

    def latents(self, h_NF: Tensor) -> Tensor:
        gated = self.cfg.sparsity_include_decoder_norm
        scale_F = self.norm_F.detach() if gated else torch.ones_like(self.norm_F)
        s_NF = (h_NF * scale_F).detach()
        match self.cfg.act_fn:
            case "relu":
                return torch.where(s_NF > 0, h_NF, 0)
            case "topk":
                cut = s_NF.sort(dim=1, descending=True).values[:, [self.cfg.top_k - 1]]
                return torch.where((s_NF >= cut) & (s_NF > 0), h_NF, 0)
            case "batchtopk":
                cut = s_NF.flatten().sort(descending=True).values[self.cfg.top_k * len(s_NF) - 1]
                return torch.where((s_NF >= cut) & (s_NF > 0), h_NF, 0)
        theta_F, window = self.p[THETA].exp().to(h_NF.dtype), self.cfg.jumprelu_threshold_window
        still_F = theta_F.detach()
        near_NF = ((s_NF - still_F).abs() < window / 2) & (s_NF > 0)
        # Worth 0, with the derivative that the specification gives to theta (in the units of h: divided by the scale).
        moves_NF = near_NF * (still_F - theta_F) * still_F / window / scale_F
        return torch.where(s_NF > still_F, h_NF, 0) + moves_NF

    def transformed(self, f_NF: Tensor, x_ND: Tensor) -> Tensor:
        return torch.einsum("nf,fde,ne->nd", f_NF, self.T_FDD, x_ND)

    def decode(self, f_NF: Tensor, x_ND: Tensor) -> Tensor:
        y_ND = self.transformed(f_NF, x_ND)
        return y_ND + self.p["b_D"] if self.cfg.use_decoder_bias else y_ND

    def sparsity(self, f_NF: Tensor, kind: str, p: float) -> Tensor:
        weighed_NF, c, s = f_NF * self.norm_F, 4.0, 0.01
        match kind:
            case "tanh":
                return torch.tanh(c * weighed_NF).sum(1).mean()
            case "tanh-quad":
                q_F = torch.tanh(c * weighed_NF).mean(0)
                return (q_F * (1 + q_F / s)).sum()
        if p == 1:
            return weighed_NF.sum(1).mean()
        powers = torch.where(weighed_NF > 0, torch.where(weighed_NF > 0, weighed_NF, 1) ** p, 0).sum(1)
        return torch.where(powers > 0, torch.where(powers > 0, powers, 1) ** (1 / p), 0).mean()

    def pre_activation(self, h_NF: Tensor) -> Tensor:
        theta_F = self.p[THETA].exp().to(h_NF.dtype)
        if self.cfg.sparsity_include_decoder_norm:
            return torch.relu(theta_F - h_NF * self.norm_F).sum(1).mean()
        return (torch.relu(theta_F - h_NF) * self.norm_F).sum(1).mean()

    def auxk(self, h_NF: Tensor, x_ND: Tensor, error_ND: Tensor, dead: list[int], k_aux: int) -> Tensor:
        s_NF = h_NF * self.norm_F if self.cfg.sparsity_include_decoder_norm else h_NF
        chosen_NF = torch.zeros_like(h_NF)
        for n, s_F in enumerate(s_NF.tolist()):
            best = [i for i in sorted(dead, key=lambda i: -s_F[i])[:k_aux] if s_F[i] > 0]
            chosen_NF[n, best] = 1
        return (error_ND.detach() - self.transformed(chosen_NF * h_NF, x_ND)).square().sum(1).mean()

    def losses(
        self,
        batch: Mapping[str, Any],
        sparsity: tuple[str, float] = ("power", 1),
        dead: list[int] | None = None,
        k_aux: int = 512,
    ) -> dict[str, Tensor]:
        """Every term with coefficient 1, over the valid tokens of a normalised batch."""
        x_ND, y_ND = (valid(batch[hook], batch) for hook in (self.cfg.hook_point_in, self.cfg.hook_point_out))
        h_NF = self.hidden(x_ND)
        f_NF = self.latents(h_NF)
        error_ND = y_ND - self.decode(f_NF, x_ND)
        terms = {"l_rec": error_ND.square().sum(1).mean(), "l_s": self.sparsity(f_NF, *sparsity)}
        if self.cfg.act_fn == "jumprelu":
            terms["l_p"] = self.pre_activation(h_NF)
        if dead:
            terms["l_aux"] = self.auxk(h_NF, x_ND, error_ND, dead, k_aux)
        return terms

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return gradients_of(self.p, loss)
