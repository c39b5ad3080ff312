"""An unoptimised twin of the sparse autoencoder: dense torch and plain autograd, written from the specification alone.

The twin never sees a masked token: it drops them first, which is what a mask means.

Letters: N valid tokens, D width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.sae import SAEConfig, SparseAutoEncoder

IN, OUT = "blocks.1.hook_in", "blocks.1.hook_out"
ACT_FNS = ("relu", "topk", "batchtopk", "jumprelu")
Kind = TypeVar("Kind", bound=torch.nn.Module)
THETA = "activation_function.log_jumprelu_threshold"


def sae_config(transcoder: bool = False, **settings: Any) -> SAEConfig:
    """A small config; the top-k family gets a k that is small beside its 24 latents."""
    small: dict[str, Any] = {"d_model": 6, "expansion_factor": 4.0, "norm_activation": "inference"}
    if "topk" in settings.get("act_fn", ""):
        small["top_k"] = 3
    return SAEConfig(hook_point_in=IN, hook_point_out=OUT if transcoder else IN, **(small | settings))


def random_sae(cfg: SAEConfig, seed: int = 0) -> SparseAutoEncoder:
    return randomized(SparseAutoEncoder(cfg), seed)


@torch.no_grad()
def randomized(dictionary: Kind, seed: int, log_threshold: float = -1.0) -> Kind:
    """Draws every parameter at random: no bias, norm or threshold is 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in dictionary.named_parameters():
        value = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.copy_(0.5 * value if name != THETA else 0.4 * value + log_threshold)
    return dictionary


def random_batch(
    cfg: BaseSAEConfig, shape: tuple[int, ...] = (9,), masked: bool = False, seed: int = 1, scale: float = 1.0
) -> dict[str, Any]:
    """Activations of every hook point of `cfg`, a quarter of the tokens masked if asked for."""
    draw = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {"tokens": torch.zeros(shape, dtype=torch.int64)}
    for hook in cfg.associated_hook_points:
        x = torch.randn(*shape, cfg.d_model, generator=draw, dtype=torch.float64)
        batch[hook] = (scale * x).to(cfg.dtype)
    if masked:
        batch["mask"] = (torch.arange(math.prod(shape)) % 4 != 1).view(shape)
    return batch


def valid(x: Tensor, batch: Mapping[str, Any], token_dims: int | None = None) -> Tensor:
    """The rows of `x` that belong to valid tokens, `[N, ...]`."""
    n = batch["tokens"].ndim if token_dims is None else token_dims
    flat = x.reshape(-1, *x.shape[n:])
    return flat[batch["mask"].flatten().bool()] if batch.get("mask") is not None else flat


class Twin:
    """The mathematics of section 4 to 6 over leaf copies of a dictionary's parameters."""

    def __init__(self, sae: SparseAutoEncoder) -> None:
        self.cfg = sae.cfg
        self.p = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
        self.norm_F = self.p["W_D"].square().sum(1).sqrt()

    def hidden(self, x_ND: Tensor) -> Tensor:
        h = x_ND @ self.p["W_E"] + self.p["b_E"]
        return h * torch.sigmoid(x_ND @ self.p["W_E_glu"] + self.p["b_E_glu"]) if self.cfg.use_glu_encoder else h

    def valid_hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Pre-activations of the valid tokens."""
        return self.hidden(valid(batch[self.cfg.hook_point_in], batch))

    def latents(self, h_NF: Tensor) -> Tensor:
        scale_F = self.norm_F.detach() if self.cfg.sparsity_include_decoder_norm else torch.ones_like(self.norm_F)
        s_NF = (h_NF * scale_F).detach()
        k = self.cfg.top_k
        match self.cfg.act_fn:
            case "relu":
                return torch.where(s_NF > 0, h_NF, 0)
            case "topk":
                cut_N1 = s_NF.sort(dim=1, descending=True).values[:, [k - 1]]
                return torch.where((s_NF >= cut_N1) & (s_NF > 0), h_NF, 0)
            case "batchtopk":
                cut = s_NF.flatten().sort(descending=True).values[min(k * len(s_NF), s_NF.numel()) - 1]
                return torch.where((s_NF >= cut) & (s_NF > 0), h_NF, 0)
        theta_F = self.p[THETA].exp().to(h_NF.dtype)
        still_F, window = theta_F.detach(), self.cfg.jumprelu_threshold_window
        near_NF = ((s_NF - still_F).abs() < window / 2) & (s_NF > 0)
        # Worth 0, with the derivative that the specification gives to theta (in the units of h: divided by the scale).
        moves_NF = near_NF * (still_F - theta_F) * still_F / window / scale_F
        return torch.where(s_NF > still_F, h_NF, 0) + moves_NF

    def decode(self, f_NF: Tensor) -> Tensor:
        y = f_NF @ self.p["W_D"]
        return y + self.p["b_D"] if self.cfg.use_decoder_bias else y

    def sparsity(self, f_NF: Tensor, kind: str, p: float = 1, c: float = 4.0, s: float = 0.01) -> Tensor:
        weighed_NF = f_NF * self.norm_F
        if kind == "tanh":
            return torch.tanh(c * weighed_NF).sum(1).mean()
        if kind == "tanh-quad":
            q_F = torch.tanh(c * weighed_NF).mean(0)
            return (q_F * (1 + q_F / s)).sum()
        if p == 1:
            return weighed_NF.sum(1).mean()
        active_NF = weighed_NF > 0
        powers_NF = torch.where(active_NF, torch.where(active_NF, weighed_NF, 1) ** p, 0)
        return (powers_NF.sum(1) ** (1 / p)).mean()

    def pre_activation(self, h_NF: Tensor) -> Tensor:
        theta_F = self.p[THETA].exp().to(h_NF.dtype)
        if self.cfg.sparsity_include_decoder_norm:
            return torch.relu(theta_F - h_NF * self.norm_F).sum(1).mean()
        return (torch.relu(theta_F - h_NF) * self.norm_F).sum(1).mean()

    def auxk(self, h_NF: Tensor, y_ND: Tensor, y_hat_ND: Tensor, dead: list[int], k_aux: int) -> Tensor:
        error_ND = (y_ND - y_hat_ND).detach()
        s_NF = (h_NF * self.norm_F if self.cfg.sparsity_include_decoder_norm else h_NF).tolist()
        total = torch.zeros((), dtype=h_NF.dtype)
        for h_F, s_F, error_D in zip(h_NF, s_NF, error_ND, strict=True):
            best = [i for i in sorted(dead, key=lambda i: -s_F[i])[:k_aux] if s_F[i] > 0]
            guess_D = sum((h_F[i] * self.p["W_D"][i] for i in best), start=torch.zeros_like(error_D))
            total = total + (error_D - guess_D).square().sum()
        return total / len(h_NF)

    def losses(
        self,
        batch: Mapping[str, Any],
        sparsity: tuple[str, float] | None = ("power", 1),
        dead: list[int] | None = None,
        k_aux: int = 512,
    ) -> dict[str, Tensor]:
        """Every term with coefficient 1, over the valid tokens of a normalised batch."""
        h_NF, y_ND = self.valid_hidden(batch), valid(batch[self.cfg.hook_point_out], batch)
        f_NF = self.latents(h_NF)
        y_hat_ND = self.decode(f_NF)
        terms = {"l_rec": (y_hat_ND - y_ND).square().sum(1).mean()}
        if sparsity is not None:
            terms["l_s"] = self.sparsity(f_NF, sparsity[0], sparsity[1])
        if self.cfg.act_fn == "jumprelu":
            terms["l_p"] = self.pre_activation(h_NF)
        if dead:
            terms["l_aux"] = self.auxk(h_NF, y_ND, y_hat_ND, dead, k_aux)
        return terms

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return gradients_of(self.p, loss)


def gradients_of(named: Mapping[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; 0 for those that the loss does not reach."""
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def gradients(sae: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The same of a dictionary."""
    return gradients_of(dict(sae.named_parameters()), loss)


def assert_same(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Equal to within `tolerance` of the largest entry."""
    largest = float(want.detach().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance * largest, check_dtype=False, msg=lambda text: f"{what}: {text}"
    )


def assert_same_gradients(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:  # thresholds, and so their gradients, are float32 in every dictionary
        assert_same(got[name], want[name], max(tolerance, 1e-6) if name == THETA else tolerance, name)


def distances(point_D: Tensor, x_ND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_ND - point_D, dim=1).sum()


def least_distance(x_ND: Tensor) -> Tensor:
    """The geometric median by a general minimiser."""
    x_ND = x_ND.double()
    point_D = x_ND.mean(0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point_D], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = distances(point_D, x_ND)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return point_D.detach()
