"""Unoptimised twins of the cross-layer transcoder and the crosscoder, written from the specification alone.

Both have several sites (layers, heads). A twin keeps everything dense, `[N, S, F]`, never sees a masked token, and
leaves every derivative to autograd; parameters carry the names and shapes of files.

Letters: N valid tokens, S sites, D width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes import Initializer, InitializerConfig
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.clt import CLTConfig, CrossLayerTranscoder
from lm_saes.dictionaries.crosscoder import CrossCoder, CrossCoderConfig

from .twin import THETA, gradients, gradients_of, random_batch, randomized

SITES, D, F = 3, 6, 24
ACT_FNS = ("relu", "jumprelu", "topk", "batchtopk", "layertopk", "batchlayertopk")
THRESHOLD = "activation_function.batch_topk_threshold"
INS, OUTS, HOOKS = ([f"{name}{i}" for i in range(SITES)] for name in ("in", "out", "hook"))

Dictionary = CrossLayerTranscoder | CrossCoder


def clt_config(sites: int = SITES, **settings: Any) -> CLTConfig:
    return CLTConfig(hook_points_in=INS[:sites], hook_points_out=OUTS[:sites], **_small(settings))


def crosscoder_config(sites: int = SITES, **settings: Any) -> CrossCoderConfig:
    return CrossCoderConfig(hook_points=HOOKS[:sites], **_small(settings))


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {"d_model": D, "expansion_factor": F / D, "norm_activation": "inference"}
    if "topk" in settings.get("act_fn", ""):
        small["top_k"] = 3  # a multiple of the heads, which tie where selection is not gated
    return small | settings


CONFIGS: dict[str, Callable[..., Any]] = {"clt": clt_config, "crosscoder": crosscoder_config}
every_kind = pytest.mark.parametrize("kind", CONFIGS)
every_act_fn = pytest.mark.parametrize("act_fn", ACT_FNS)
both_gatings = pytest.mark.parametrize("gated", [False, True])


def random_dictionary(cfg: CLTConfig | CrossCoderConfig, seed: int = 0) -> Any:
    return randomized(AbstractSparseAutoEncoder.from_config(cfg), seed)


def made(kind: str, **settings: Any) -> Any:
    return random_dictionary(CONFIGS[kind](**settings))


def batch_for(dictionary: Any, shape: tuple[int, ...] = (9,), masked: bool = False, **options: Any) -> dict[str, Any]:
    return random_batch(dictionary.cfg, shape, masked, **options)


def valid_sites(x: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """`[S, ..., D]` as rows of valid tokens, `[S, N, D]`."""
    flat = x.flatten(1, -2)
    return flat[:, batch["mask"].flatten().bool()] if "mask" in batch else flat


class SiteTwin:
    """What both kinds have in common; a subclass gives `hidden`, `decode`, the decoder's norms and AuxK's decoding."""

    hooks_in: list[str]
    hooks_out: list[str]
    shared_theta: bool
    pools_per_site: bool
    """Whether batchtopk picks k a token for each site by itself (else S k a token over all of them)."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.cfg = dictionary.cfg
        files = dictionary.full_state_dict()
        floating = {n for n in files if not n.startswith("dataset_average") and n != THRESHOLD}
        self.p = {n: files[n].detach().clone().contiguous().requires_grad_() for n in floating}
        self.norm_SF = self.norm()

    def norm(self) -> Tensor:
        raise NotImplementedError

    def hidden(self, x_SND: Tensor) -> Tensor:
        """Pre-activations of every site, `[N, S, F]`."""
        raise NotImplementedError

    def written(self, f_NSF: Tensor) -> Tensor:
        """What latents write, `[S, N, D]`, without the decoder bias."""
        raise NotImplementedError

    def bias(self) -> Tensor:
        """The decoder bias `[S, D]`."""
        raise NotImplementedError

    def decode(self, f_NSF: Tensor) -> Tensor:
        y_SND = self.written(f_NSF)
        return y_SND + self.bias()[:, None] if self.cfg.use_decoder_bias else y_SND

    def scale(self) -> Tensor:
        return self.norm_SF.detach() if self.cfg.sparsity_include_decoder_norm else torch.ones_like(self.norm_SF)

    def latents(self, h_NSF: Tensor) -> Tensor:
        s_NSF, k, n = (h_NSF * self.scale()).detach(), self.cfg.top_k, len(h_NSF)
        match self.cfg.act_fn:
            case "relu":
                kept = s_NSF > 0
            case "topk":
                kept = _largest(s_NSF, k)
            case "layertopk":
                kept = _largest(s_NSF.flatten(1), k).view_as(s_NSF)
            case "batchlayertopk":
                kept = _largest(s_NSF.flatten(), k * n).view_as(s_NSF)
            case "batchtopk" if self.pools_per_site:
                kept = torch.stack([_largest(s_NF.flatten(), k * n).view_as(s_NF) for s_NF in s_NSF.unbind(1)], 1)
            case "batchtopk":
                kept = _largest(s_NSF.flatten(), k * n * s_NSF.shape[1]).view_as(s_NSF)
            case _:
                theta = self.p[THETA].exp().to(h_NSF.dtype)
                still, window = theta.detach(), self.cfg.jumprelu_threshold_window
                near = ((s_NSF - still).abs() < window / 2) & (s_NSF > 0)
                # Worth 0, with the derivative that the specification gives to theta, in the units of h.
                moves = near * (still - theta) * still / window / self.scale()
                return torch.where(s_NSF > still, h_NSF, 0) + moves
        return torch.where(kept & (s_NSF > 0), h_NSF, 0)

    def sparsity(self, f_NSF: Tensor, kind: str, p: float = 1, c: float = 4.0, s: float = 0.01) -> Tensor:
        weighed = f_NSF * self.norm_SF
        if kind == "tanh":
            return torch.tanh(c * weighed).sum(2).mean()
        if kind == "tanh-quad":
            q_SF = torch.tanh(c * weighed).mean(0)
            return (q_SF * (1 + q_SF / s)).sum(1).mean()
        if p == 1:
            return weighed.sum(2).mean()
        active = weighed > 0
        sums = torch.where(active, torch.where(active, weighed, 1) ** p, 0).sum(2)
        return torch.where(sums > 0, torch.where(sums > 0, sums, 1) ** (1 / p), 0).mean()

    def pre_activation(self, h_NSF: Tensor) -> Tensor:
        theta = self.p[THETA].exp().to(h_NSF.dtype)
        if self.cfg.sparsity_include_decoder_norm:
            return torch.relu(theta - h_NSF * self.norm_SF).sum(2).mean()
        return (torch.relu(theta - h_NSF) * self.norm_SF).sum(2).mean()

    def auxk(self, h_NSF: Tensor, y_SND: Tensor, y_hat_SND: Tensor, dead_SF: Tensor, k_aux: int) -> Tensor:
        """Every token and site lists its dead latents by `s`; what the first k_aux positive ones write is the guess."""
        s = (h_NSF * self.scale()).tolist()
        kept = torch.zeros(h_NSF.shape, dtype=torch.bool)
        for n, sites in enumerate(s):
            for site, s_F in enumerate(sites):
                dead = dead_SF[site].nonzero().flatten().tolist()
                for i in sorted(dead, key=lambda i: -s_F[i])[:k_aux]:
                    kept[n, site, i] = s_F[i] > 0
        guess = self.written(torch.where(kept, h_NSF, 0))
        return ((y_SND - y_hat_SND).detach() - guess).square().sum(2).mean()

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Label, pre-activations, latents and reconstruction of the valid tokens of a normalised batch."""
        x, y = (valid_sites(torch.stack([batch[h] for h in hooks]), batch) for hooks in (self.hooks_in, self.hooks_out))
        h = self.hidden(x)
        f = self.latents(h)
        return y, h, f, self.decode(f)

    def losses(
        self,
        batch: Mapping[str, Any],
        sparsity: tuple[str, float] = ("power", 1),
        dead_SF: Tensor | None = None,
        k_aux: int = 512,
    ) -> dict[str, Tensor]:
        """Every term with coefficient 1."""
        y, h, f, y_hat = self.forward(batch)
        terms = {"l_rec": (y_hat - y).square().sum(2).mean(), "l_s": self.sparsity(f, *sparsity)}
        if self.cfg.act_fn == "jumprelu":
            terms["l_p"] = self.pre_activation(h)
        if dead_SF is not None:
            terms["l_aux"] = self.auxk(h, y, y_hat, dead_SF, k_aux)
        return terms

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return gradients_of(self.p, loss)


def _largest(s: Tensor, k: int) -> Tensor:
    """Whether an entry is at least the k-th largest of the last dimension."""
    return s >= s.sort(dim=-1, descending=True).values[..., [min(k, s.shape[-1]) - 1]]


class CLTTwin(SiteTwin):
    """`h_l = x_l W_E[l] + b_E[l]`; `y_l = sum over i <= l of f_i W_D.l[i] + b_D.l`."""

    pools_per_site = True

    def __init__(self, dictionary: CrossLayerTranscoder) -> None:
        self.hooks_in, self.hooks_out = dictionary.cfg.hook_points_in, dictionary.cfg.hook_points_out
        super().__init__(dictionary)

    def norm(self) -> Tensor:
        layers = range(len(self.hooks_in))
        squares = [sum(self.p[f"W_D.{to}"][i].square().sum(1) for to in layers if to >= i) for i in layers]
        return torch.stack(squares).sqrt()  # type: ignore[arg-type]

    def hidden(self, x_SND: Tensor) -> Tensor:
        return torch.stack([x @ W + b for x, W, b in zip(x_SND, self.p["W_E"], self.p["b_E"], strict=True)], 1)

    def written(self, f_NSF: Tensor) -> Tensor:
        y = [sum(f_NSF[:, i] @ self.p[f"W_D.{to}"][i] for i in range(to + 1)) for to in range(len(self.hooks_in))]
        return torch.stack(y)  # type: ignore[arg-type]

    def bias(self) -> Tensor:
        return torch.stack([self.p[f"b_D.{layer}"] for layer in range(len(self.hooks_in))])


class CrossCoderTwin(SiteTwin):
    """One `h = sum over heads of (x_j W_E[j] + b_E[j])`; head j selects by its norms; `y_j = f_j W_D[j] + b_D[j]`."""

    pools_per_site = False

    def __init__(self, dictionary: CrossCoder) -> None:
        self.hooks_in = self.hooks_out = dictionary.cfg.hook_points
        super().__init__(dictionary)

    def norm(self) -> Tensor:
        return self.p["W_D"].square().sum(2).sqrt()

    def hidden(self, x_SND: Tensor) -> Tensor:
        heads = [x @ W + b for x, W, b in zip(x_SND, self.p["W_E"], self.p["b_E"], strict=True)]
        h_NF: Tensor = sum(heads[1:], start=heads[0])
        return h_NF[:, None].expand(-1, len(heads), -1)

    def written(self, f_NSF: Tensor) -> Tensor:
        return torch.stack([f_NF @ W for f_NF, W in zip(f_NSF.unbind(1), self.p["W_D"], strict=True)])

    def bias(self) -> Tensor:
        return self.p["b_D"]


def twin_of(dictionary: Any) -> SiteTwin:
    return CLTTwin(dictionary) if isinstance(dictionary, CrossLayerTranscoder) else CrossCoderTwin(dictionary)


def file_gradients(dictionary: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter under its name, and in its shape, in files."""
    grads = gradients(dictionary, loss)
    by_source = [grads.pop(name) for name in list(grads) if name.startswith("decoders.")]  # [F, S - i, D] of layer i
    for to in range(len(by_source)):
        grads[f"W_D.{to}"] = torch.stack([by_source[i][:, to - i] for i in range(to + 1)])
    return grads


def initialized(cfg: CLTConfig | CrossCoderConfig, batch: dict[str, Any] | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    stream = None if batch is None else iter([batch])
    dictionary = Initializer(InitializerConfig(**settings)).initialize_sae_from_config(cfg, stream)
    assert isinstance(dictionary, CrossLayerTranscoder if isinstance(cfg, CLTConfig) else CrossCoder)
    return dictionary


def skewed_batch(cfg: CLTConfig | CrossCoderConfig) -> dict[str, Any]:
    """Skewed activations with another centre in every hook point."""
    batch = random_batch(cfg, (40, 3), masked=True)
    for i, hook in enumerate(cfg.associated_hook_points):
        batch[hook] = batch[hook].abs() ** 1.5 + i
    return batch


def dead_latents(dictionary: Any) -> Tensor:
    """Some dead latents, shaped as the dictionary counts them: in a CLT other ones in each layer, in one none."""
    shape = dictionary.dead_shape
    dead = torch.zeros(shape, dtype=torch.bool)
    if len(shape) == 1:
        dead[[2, 3, 7, 11, 20]] = True
    else:
        dead[0, [2, 3, 7, 11, 20]] = dead[-1, [0, 5, 6, 23]] = True
    return dead


def by_site(dead: Tensor, sites: int) -> Tensor:
    return dead if dead.ndim == 2 else dead.expand(sites, -1)


def tokens_of(batch: Mapping[str, Any]) -> int:
    return int(batch["mask"].sum()) if "mask" in batch else math.prod(batch["tokens"].shape)
