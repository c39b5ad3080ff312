"""Activation functions: which latents of each token are active. The value kept is always the pre-activation `h`.

Selection looks at `s = h * norm` with gating by the decoder norm, at `s = h` without. What is not kept is exactly 0.
A new activation function is a subclass of `ActivationFunction`; naming it registers it.

Letters: N tokens, B tokens of one block of rows, F latents, C candidates.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lm_saes.latents.axis import LatentAxis

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
    loose: bool = False
    """Whether `settle` turns down many candidates, so that they are worth dropping from the code."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            ActivationFunction.registry[cls.name] = cls

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__()
        self.axis = LatentAxis()

    @abstractmethod
    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        """The definition: bool `[N, F]`, which entries of the whole batch are active."""

    def dense(self, h_NF: Tensor, scale_F: Tensor | None, mask_N: Tensor | None) -> Tensor:
        """Latents `[N, F]` of a dense batch, differentiable in `h`."""
        with torch.no_grad():
            kept = self.keep(h_NF if scale_F is None else h_NF * scale_F, mask_N)
        return torch.where(kept, h_NF, 0.0)

    @abstractmethod
    def expected_entries(self, n_latents: int) -> float | None:
        """Entries per token that the sparse path has to hold; None if that depends on the batch."""

    def begin(self, mask_N: Tensor | None, n_tokens: int) -> None:
        """Called before the blocks of a batch are looked at on the sparse path."""

    @abstractmethod
    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        """Entries of a block that the code has to hold: bool `[B, F]`, or columns, as many a row, `[B, C]` (int64)."""

    def settle(self, s_E: Tensor) -> Tensor:
        """After the last block: which of all candidates compete successfully (bool `[E]`); may raise `Missed`.

        Of those, an entry is active if `s` is positive and above its latent's threshold.
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

    def expected_entries(self, n_latents: int) -> float | None:
        return None

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return s_BF > 0


def top_columns(s_BF: Tensor, k: int, groups_of: int = 16) -> Tensor:
    """Columns of the k largest entries of each row, `[B, k]` (int64).

    Two stages, several times faster than one: the k groups with the largest maxima hold the k largest entries, since
    whatever is among these makes its group's maximum at least as large.
    """
    n_rows, n_latents = s_BF.shape
    n_groups = n_latents // groups_of
    if n_groups < 2 * k:
        return s_BF.topk(k, dim=1, sorted=False).indices
    whole = n_groups * groups_of  # the group of a column is its remainder by n_groups
    maxima_BG = s_BF[:, :whole].view(n_rows, groups_of, n_groups).amax(1)
    groups_Bk = maxima_BG.topk(k, dim=1, sorted=False).indices
    starts = torch.arange(0, whole, n_groups, device=s_BF.device)
    columns_BC = (groups_Bk[:, None, :] + starts[:, None]).reshape(n_rows, -1)
    tail = torch.arange(whole, n_latents, device=s_BF.device).expand(n_rows, -1)
    columns_BC = torch.cat([columns_BC, tail], dim=1) if tail.shape[1] else columns_BC
    best = s_BF.gather(1, columns_BC).topk(k, dim=1, sorted=False).indices
    return columns_BC.gather(1, best)


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
        kept = self.axis.top(best, self.k) & (best > 0)
        return torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, columns, kept)

    def expected_entries(self, n_latents: int) -> float | None:
        return min(self.k, n_latents)

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        columns = self._columns(s_BF)
        self._width = columns.shape[1]
        return columns

    def settle(self, s_E: Tensor) -> Tensor:
        return self.axis.top(s_E.view(-1, self._width), self.k).view(-1) & (s_E > 0)

    def _columns(self, s_BF: Tensor) -> Tensor:
        return top_columns(s_BF, min(self.k, s_BF.shape[1]))


class BatchTopK(ActivationFunction):
    """Keeps the `k x valid tokens` largest positive `s` of the whole batch (Bussmann et al. 2024).

    Outside training it keeps what exceeds the running threshold: the first batch's smallest kept value, then a
    moving average with decay 0.99.
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
        self.batch_topk_threshold: Tensor
        self.register_buffer("batch_topk_threshold", torch.zeros((), dtype=torch.float32))
        self._floor: Tensor | None = None
        self._mask_N: Tensor | None = None
        self._budget = self._misses = 0

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        if not self.training:
            return s_NF > self.batch_topk_threshold.to(s_NF.dtype).clamp(min=0)
        valid = s_NF if mask_N is None else torch.where(mask_N[:, None], s_NF, -math.inf)
        budget = self.k * (len(s_NF) if mask_N is None else int(mask_N.sum()))
        kept = (self.axis.top(valid.reshape(1, -1), budget).view_as(s_NF)) & (valid > 0)
        self._observe(valid, kept)
        return kept

    def expected_entries(self, n_latents: int) -> float | None:
        return min(self.k, n_latents)

    def begin(self, mask_N: Tensor | None, n_tokens: int) -> None:
        threshold = self.batch_topk_threshold
        self._mask_N, self._budget = mask_N, self.k * (n_tokens if mask_N is None else int(mask_N.sum()))
        self._floor = threshold * self.margin if threshold > 0 else None
        self._misses = 0

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        if not self.training:
            return s_BF > self.batch_topk_threshold.to(s_BF.dtype)
        if self._mask_N is not None:
            s_BF = torch.where(self._mask_N[rows, None], s_BF, -math.inf)
        if self._floor is None:  # nothing known yet: what twice this block's share of the budget would exceed
            share = min(s_BF.numel(), 2 * self.k * len(s_BF))
            self._floor = s_BF.flatten().topk(share, sorted=False).values.min().clamp(min=0)
        return s_BF > self._floor.to(s_BF.dtype)

    def settle(self, s_E: Tensor) -> Tensor:
        if not self.training:
            return s_E > 0
        if len(s_E) < self._budget and self._floor is not None and self._floor > 0:
            self._misses += 1
            self._floor = self._floor / 4 if self._misses == 1 else torch.zeros_like(self._floor)
            raise Missed
        kept = self.axis.top(s_E[None], self._budget)[0]
        self._observe(s_E, kept)
        return kept

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        self.batch_topk_threshold.mul_(factor)

    @torch.no_grad()
    def _observe(self, s: Tensor, kept: Tensor) -> None:
        if s.numel() == 0:
            return
        smallest = torch.where(kept, s, math.inf).amin().float()
        known = self.batch_topk_threshold
        moved = torch.where(known == 0, smallest, self.decay * known + (1 - self.decay) * smallest)
        known.copy_(torch.where(torch.isfinite(smallest), moved, known))


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
        self.log_jumprelu_threshold = nn.Parameter(torch.zeros(cfg.d_sae, dtype=torch.float32))

    @property
    def log_threshold(self) -> Tensor:  # type: ignore[override]
        return self.log_jumprelu_threshold

    @property
    def theta(self) -> Tensor:
        """The thresholds, `[F]`, in the units of `s`."""
        return self.log_jumprelu_threshold.exp()

    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        return s_NF > self.theta.to(s_NF.dtype)

    def dense(self, h_NF: Tensor, scale_F: Tensor | None, mask_N: Tensor | None) -> Tensor:
        return _DenseJumpReLU.apply(h_NF, self.log_jumprelu_threshold, scale_F, self.window)  # type: ignore[return-value]

    def expected_entries(self, n_latents: int) -> float | None:
        return None

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        theta_F = self.theta.detach().to(s_BF.dtype)
        return s_BF > ((theta_F - self.window / 2).clamp(min=0) if self.training else theta_F)


class _DenseJumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NF, log_theta_F, scale_F, window):  # type: ignore[override]
        s_NF = h_NF if scale_F is None else h_NF * scale_F
        theta_F = log_theta_F.exp().to(h_NF.dtype)
        kept_NF = s_NF > theta_F
        in_window_NF = ((s_NF - theta_F).abs() < window / 2) & (s_NF > 0)
        ctx.save_for_backward(kept_NF, in_window_NF, log_theta_F, scale_F)
        ctx.window = window
        return torch.where(kept_NF, h_NF, 0.0)

    @staticmethod
    def backward(ctx, df_NF):  # type: ignore[override]
        kept_NF, in_window_NF, log_theta_F, scale_F = ctx.saved_tensors
        dh_NF = torch.where(kept_NF, df_NF, 0.0)
        per_latent_F = torch.where(in_window_NF, df_NF, 0.0).sum(0)
        return dh_NF, threshold_gradient(per_latent_F, log_theta_F, scale_F, ctx.window), None, None


def threshold_gradient(df_F: Tensor, log_theta_F: Tensor, scale_F: Tensor | None, window: float) -> Tensor:
    """Gradient of log theta from the summed output gradients of the entries in the window (in the units of `h`)."""
    g_F = df_F if scale_F is None else torch.where(scale_F > 0, df_F / scale_F, 0.0)
    return (-(log_theta_F.exp() ** 2) / window * g_F).to(log_theta_F.dtype)
