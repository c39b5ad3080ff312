"""Activation functions: which latents of each token are active. The value kept is always the pre-activation `h`.

Selection looks at `s = h * norm` with gating by the decoder norm, at `s = h` without. What is not kept is exactly 0.
A new activation function is a subclass of `ActivationFunction`; naming it registers it.

A code's rows are tokens, or (token, site) where a dictionary has several sites (layers, heads). Most activation
functions look at rows; those that let sites compete (`joins_sites`) see one row per token with all sites side by side.

Letters: N rows, B rows of one block, S sites, F latents (of a row), C candidates, E entries.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lm_saes.latents.axis import Axes
from lm_saes.latents.kernels.plain import top_columns

if TYPE_CHECKING:
    from lm_saes.dictionaries.config import BaseSAEConfig


class ActivationFunction(nn.Module, ABC):
    """Base of all activation functions: a dense definition and, for the sparse path, candidates block by block."""

    name: ClassVar[str]
    registry: ClassVar[dict[str, type[ActivationFunction]]] = {}
    config_fields: ClassVar[frozenset[str]] = frozenset()
    """The dictionary-config fields that only this kind of activation function reads."""
    log_threshold: Tensor | None = None
    """Logarithm of a learnt threshold per latent, if there is one; its gradient is that of a window around it."""
    window: float = 0.0
    """Width of that window, in the units of `s`."""
    joins_sites: bool = False
    """Whether a row is a token with the latents of all its sites, rather than one (token, site)."""
    judges_entries: ClassVar[bool] = False
    """Whether an entry is active or not by itself, where `h` exceeds its latent's bound: a class that has `bounds`."""
    loose: bool = False
    """Whether `settle` turns down many candidates, so that they are worth dropping from the code."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.judges_entries = "bounds" in vars(cls)
        if not inspect.isabstract(cls):
            ActivationFunction.registry[cls.name] = cls

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__()
        self.axes = Axes()

    @abstractmethod
    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        """The definition: bool `[N, F]`, which entries of the whole batch are active."""

    def dense(self, h_RF: Tensor, scale_SF: Tensor | None, mask: Tensor | None, n_sites: int = 1) -> Tensor:
        """Latents `[R, F]` of a dense batch (R = tokens x sites), differentiable in `h`; `mask` is by token."""
        with torch.no_grad():
            per_token = self.rows_per_token(n_sites)
            s_NF = scaled(h_RF, scale_SF).view(len(h_RF) // n_sites * per_token, -1)
            kept = self.keep(s_NF, self.mask_rows(mask, n_sites))
        return torch.where(kept.view_as(h_RF), h_RF, 0.0)

    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where an activation function that `judges_entries` cuts the `h` of each latent (in the type of `like_F`).

        Active is what exceeds the first bound; what lies strictly between the others moves the latent's threshold.
        """
        raise NotImplementedError(f"{type(self).__name__}: compares entries with each other")

    def rows_per_token(self, n_sites: int) -> int:
        """How many of the rows that selection looks at belong to one token."""
        return 1 if self.joins_sites else n_sites

    def mask_rows(self, mask: Tensor | None, n_sites: int) -> Tensor | None:
        """Which of those rows count, given which tokens do."""
        per_token = self.rows_per_token(n_sites)
        return mask if mask is None or per_token == 1 else mask.repeat_interleave(per_token)

    @abstractmethod
    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        """Entries per token and site that the sparse path has to hold; None if that depends on the batch."""

    def begin(self, mask_N: Tensor | None, n_rows: int) -> None:
        """Called before the blocks of a batch are looked at on the sparse path."""

    @abstractmethod
    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        """Entries of a block that the code has to hold: bool `[B, F]`, or columns, as many a row, `[B, C]` (int64)."""

    def settle(self, s_E: Tensor, sites_E: Tensor) -> Tensor:
        """After the last block: which of all candidates compete successfully (bool `[E]`); may raise `Missed`.

        `sites_E` is the site of each. Of those that do, an entry is active if `s` is positive and above its latent's
        threshold.
        """
        return s_E > 0

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Follow a rescaling of all `s` by `factor`, so that the same entries stay selected."""
        if self.log_threshold is not None:
            self.log_threshold.add_(factor.log())


class Missed(Exception):
    """The candidates of a batch did not contain everything that may be active: look again with the new floor."""


class ReLU(ActivationFunction):
    """Keeps `s > 0`."""

    name = "relu"

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        return s_NF > 0

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return None

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return s_BF > 0

    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, None, None]:
        return _in_units_of_h(torch.zeros_like(like_F), scale_F), None, None


class TopK(ActivationFunction):
    """Keeps the k largest `s` of each token, of those the positive ones (Gao et al. 2024, section 2.3)."""

    name = "topk"
    config_fields = frozenset({"top_k"})

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__(cfg)
        self.k = cfg.top_k

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        columns = self._columns(s_NF)
        best = s_NF.gather(1, columns)
        kept = self.axes.latents.top(best, self.k) & (best > 0)
        return torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, columns, kept)

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return min(self.k / (n_sites if self.joins_sites else 1), n_latents)

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return self.offer(self._columns(s_BF))

    def offer(self, columns_BC: Tensor) -> Tensor:
        """Take these columns as every row's candidates: they hold its k largest."""
        self._width = columns_BC.shape[1]
        return columns_BC

    def settle(self, s_E: Tensor, sites_E: Tensor) -> Tensor:
        return self.axes.latents.top(s_E.view(-1, self._width), self.k).view(-1) & (s_E > 0)

    def _columns(self, s_BF: Tensor) -> Tensor:
        return top_columns(s_BF, min(self.k, s_BF.shape[1]))


class LayerTopK(TopK):
    """Keeps the k largest `s` of each token over all its layers (heads) together, of those the positive ones."""

    name = "layertopk"
    joins_sites = True


class BatchTopK(ActivationFunction):
    """Keeps the `k x valid rows` largest positive `s` of the whole batch (Bussmann et al. 2024).

    A cross-layer transcoder's layers select each for itself, `k x valid tokens`; a crosscoder's heads form one pool.
    Outside training it keeps what exceeds the running threshold: the first batch's smallest kept value, then a moving
    average with decay 0.99.
    """

    name = "batchtopk"
    loose = True
    config_fields = frozenset({"top_k"})
    decay = 0.99
    margin = 0.8
    """Candidates are what exceeds this share of the running threshold; a miss costs a second look, never exactness."""

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__(cfg)
        self.k = cfg.top_k
        self.n_pools = 1 if self.joins_sites else cfg.n_selection_pools
        self.batch_topk_threshold: Tensor
        shape = () if self.n_pools == 1 else (self.n_pools,)
        self.register_buffer("batch_topk_threshold", torch.zeros(shape, dtype=torch.float32))
        self._floor_P: Tensor | None = None
        self._mask_N: Tensor | None = None
        self._budget = self._misses = 0

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        if not self.training:
            return s_NF > self._of_rows(self.batch_topk_threshold, s_NF)
        valid = s_NF if mask_N is None else torch.where(mask_N[:, None], s_NF, -math.inf)
        budget = self._pool_budget(mask_N, len(s_NF))
        pools_PX = valid.view(-1, self.n_pools, s_NF.shape[1]).transpose(0, 1).flatten(1)
        kept_PX = self.axes.everywhere.top(pools_PX, budget) & (pools_PX > 0)
        self._observe([(s, kept) for s, kept in zip(pools_PX, kept_PX, strict=True)])
        return kept_PX.view(self.n_pools, -1, s_NF.shape[1]).transpose(0, 1).reshape(s_NF.shape)

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return min(self.k / (n_sites if self.joins_sites else 1), n_latents)

    def begin(self, mask_N: Tensor | None, n_rows: int) -> None:
        threshold_P = self.batch_topk_threshold.view(-1)
        self._mask_N, self._budget = mask_N, self._pool_budget(mask_N, n_rows)
        self._floor_P = threshold_P * self.margin if bool((threshold_P > 0).all()) else None
        self._misses = 0

    def offer(self, mask_N: Tensor | None, n_rows: int) -> int:
        """Announce candidates that hold the batch's largest: how many entries that are."""
        self._mask_N, self._floor_P, self._budget = mask_N, None, self._pool_budget(mask_N, n_rows)
        return self._budget

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        if not self.training:
            return s_BF > self._of_rows(self.batch_topk_threshold, s_BF)
        if self._mask_N is not None:
            s_BF = torch.where(self._mask_N[rows, None], s_BF, -math.inf)
        if self._floor_P is None:  # nothing known yet: what twice this block's share of the budget would exceed
            pools_PX = s_BF.view(-1, self.n_pools, s_BF.shape[1]).transpose(0, 1).flatten(1)
            share = min(pools_PX.shape[1], 2 * self.k * len(s_BF) // self.n_pools)
            own_P = pools_PX.topk(share, sorted=False).values.amin(1).clamp(min=0)
            self._floor_P = self.axes.everywhere.smallest(own_P)
        return s_BF > self._of_rows(self._floor_P, s_BF)

    def settle(self, s_E: Tensor, sites_E: Tensor) -> Tensor:
        if not self.training:
            return s_E > 0
        pools = (
            [slice(None)] if self.n_pools == 1 else [(sites_E == p).nonzero().squeeze(1) for p in range(self.n_pools)]
        )
        offered_P = self.axes.everywhere.total(torch.tensor([len(s_E[pool]) for pool in pools]))
        short = bool((offered_P < self._budget).any())
        if short and self._floor_P is not None and bool((self._floor_P > 0).any()):
            self._misses += 1
            self._floor_P = self._floor_P / 4 if self._misses == 1 else torch.zeros_like(self._floor_P)
            raise Missed
        kept_E = torch.zeros_like(s_E, dtype=torch.bool)
        for pool in pools:
            kept_E[pool] = self.axes.everywhere.top(s_E[pool][None], self._budget)[0]
        self._observe([(s_E[pool], kept_E[pool]) for pool in pools])
        return kept_E

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        self.batch_topk_threshold.mul_(factor)

    def _pool_budget(self, mask_N: Tensor | None, n_rows: int) -> int:
        n_valid = torch.tensor(n_rows if mask_N is None else int(mask_N.sum()))
        return self.k * int(self.axes.tokens.total(n_valid)) // self.n_pools

    def _of_rows(self, value_P: Tensor, s_BF: Tensor) -> Tensor:
        """A value of each pool as one of each row (pools alternate), or the value itself if there is one pool."""
        value_P = value_P.to(s_BF.dtype)
        return value_P if self.n_pools == 1 else value_P.repeat(len(s_BF) // self.n_pools)[:, None]

    @torch.no_grad()
    def _observe(self, pools: list[tuple[Tensor, Tensor]]) -> None:
        smallest_P = torch.stack([torch.where(kept, s, math.inf).amin() if s.numel() else s.new_tensor(math.inf)
                                  for s, kept in pools]).float()  # fmt: skip
        smallest_P = self.axes.everywhere.smallest(smallest_P)
        known_P = self.batch_topk_threshold.view(-1)
        moved_P = torch.where(known_P == 0, smallest_P, self.decay * known_P + (1 - self.decay) * smallest_P)
        known_P.copy_(torch.where(torch.isfinite(smallest_P), moved_P, known_P))


class BatchLayerTopK(BatchTopK):
    """Keeps the `k x valid tokens` largest positive `s` of the batch over all layers (heads) together."""

    name = "batchlayertopk"
    joins_sites = True


class JumpReLU(ActivationFunction):
    """Keeps `s > theta` with a learnt `theta = exp(log_theta)` per latent (Rajamanoharan et al. 2024).

    The threshold's gradient is that of a rectangular window: with `g` the gradient at the output in the units of `s`,
    `dL/d theta = -(theta / window) g` over entries with `|s - theta| < window / 2` and `s > 0`, kept or not.
    """

    name = "jumprelu"
    config_fields = frozenset({"jumprelu_threshold_window"})

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__(cfg)
        self.window = cfg.jumprelu_threshold_window
        self.log_jumprelu_threshold = nn.Parameter(torch.zeros(cfg.threshold_shape, dtype=torch.float32))
        self.joins_sites = self.log_jumprelu_threshold.ndim > 1

    @property
    def log_threshold(self) -> Tensor:  # type: ignore[override]
        return self.log_jumprelu_threshold

    @property
    def theta(self) -> Tensor:
        """The thresholds of a row, `[F]` (or `[S * F]`), in the units of `s`."""
        return self.log_jumprelu_threshold.exp().view(-1)

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        return s_NF > self.theta.to(s_NF.dtype)

    def dense(self, h_RF: Tensor, scale_SF: Tensor | None, mask: Tensor | None, n_sites: int = 1) -> Tensor:
        return _DenseJumpReLU.apply(h_RF, self.log_jumprelu_threshold, scale_SF, self.window, n_sites)  # type: ignore[return-value]

    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        return None

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        theta_F = self.theta.detach().to(s_BF.dtype)
        return s_BF > ((theta_F - self.window / 2).clamp(min=0) if self.training else theta_F)

    @torch.no_grad()
    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        theta_F, half = self.theta.to(like_F.dtype), self.window / 2
        above, low, high = (
            _in_units_of_h(s_F, scale_F) for s_F in (theta_F, (theta_F - half).clamp(min=0), theta_F + half)
        )
        return above, low, high


def _in_units_of_h(s_F: Tensor, scale_F: Tensor | None) -> Tensor:
    """The `h` from which on `s = h scale` exceeds `s_F`; with a scale of 0 it never does."""
    return s_F if scale_F is None else torch.where(scale_F > 0, s_F / scale_F, math.inf)


class _DenseJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_RF, log_theta, scale_SF, window, n_sites):  # type: ignore[override]
        theta = log_theta.exp().to(h_RF.dtype)
        s_NSF = scaled(h_RF, scale_SF).view(-1, n_sites, h_RF.shape[1])
        kept_NSF = s_NSF > theta
        in_window_NSF = ((s_NSF - theta).abs() < window / 2) & (s_NSF > 0)
        ctx.save_for_backward(kept_NSF, in_window_NSF, log_theta, scale_SF)
        ctx.window = window
        return torch.where(kept_NSF.view_as(h_RF), h_RF, 0.0)

    @staticmethod
    def backward(ctx, df_RF):  # type: ignore[override]
        kept_NSF, in_window_NSF, log_theta, scale_SF = ctx.saved_tensors
        dh_RF = torch.where(kept_NSF.view_as(df_RF), df_RF, 0.0)
        window_SF = torch.where(in_window_NSF, df_RF.view(in_window_NSF.shape), 0.0).sum(0)
        return dh_RF, threshold_gradient(window_SF, log_theta, scale_SF, ctx.window), None, None, None


def scaled(h_RF: Tensor, scale_SF: Tensor | None) -> Tensor:
    """`s = h * scale`, each row by its site's scale; `h` itself without one."""
    if scale_SF is None:
        return h_RF
    return (h_RF.view(-1, *scale_SF.shape) * scale_SF).view(h_RF.shape)


def threshold_gradient(df_SF: Tensor, log_theta: Tensor, scale_SF: Tensor | None, window: float) -> Tensor:
    """Gradient of log theta (`[F]` or `[S, F]`) from the summed output gradients of the entries in the window.

    `df_SF` is in the units of `h`; divided by the scales it is `g`.
    """
    g_SF = df_SF if scale_SF is None else torch.where(scale_SF > 0, df_SF / scale_SF, 0.0)
    g = g_SF if log_theta.ndim > 1 else g_SF.sum(0)
    return (-(log_theta.exp() ** 2) / window * g).to(log_theta.dtype)
