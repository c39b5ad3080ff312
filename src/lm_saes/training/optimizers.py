"""Optimizers: what moves the weights, and the settings that each of them reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from lm_saes.axes.axis import Axes
from lm_saes.choices import Choice
from lm_saes.config import BaseConfig
from lm_saes.latents import kernels
from lm_saes.latents.gradients.rows import RowGradients, storage_order
from lm_saes.torch_private import AdamOfViews

Decay = Annotated[float, Field(ge=0, lt=1)]
Groups = list[dict[str, Any]]


class OptimizerChoice(Choice):
    """An optimizer that `optimizer_class` may name. Its fields are its settings."""

    registry: ClassVar[dict[str, type[OptimizerChoice]]] = {}
    noun = "optimizer"
    works_with_rows: ClassVar[bool] = False
    """Whether it needs nothing but the rows of gradients that are not zero (`RowGradients`)."""

    @abstractmethod
    def build(self, groups: Groups, axes: Axes) -> Optimizer:
        """The optimizer of parameter groups, each with its `lr`, of a dictionary whose parameters these axes cut."""


class BetasSettings(BaseConfig):
    """Settings of Adam and its kin."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of Adam's moments."""


class AdamSettings(BetasSettings):
    """Settings of `adam`."""

    optimizer_foreach: bool = True
    """True: the fastest implementation there is; False: a plain loop."""


class AdamChoice(AdamSettings, OptimizerChoice):
    """Adam (Kingma and Ba 2015): fused where that is possible."""

    name = "adam"

    def build(self, groups: Groups, axes: Axes) -> Optimizer:
        if not self.optimizer_foreach:
            return torch.optim.Adam(groups, betas=self.betas, foreach=False, fused=False)
        parameters = [p for group in groups for p in group["params"]]
        if all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters):
            return FusedAdam(groups, betas=self.betas, fused=True)
        return torch.optim.Adam(groups, betas=self.betas, foreach=True)


class SparseAdamChoice(BetasSettings, OptimizerChoice):
    """Adam that leaves alone what has no gradient."""

    name = "sparseadam"
    works_with_rows = True

    def build(self, groups: Groups, axes: Axes) -> Optimizer:
        return SparseAdam(groups, betas=self.betas, axes=axes)


class SparseAdam(Optimizer):
    """Adam that leaves alone what has no gradient.

    Moments decay everywhere; moments take up the gradient, and weights move, only where the gradient is not zero:
    `w -= lr sqrt(1 - b2^t)/(1 - b1^t) m / (sqrt(v) + eps)`. A parameter whose gradient is all zero is skipped.

    A gradient is a parameter's `grad`, or the rows that it carries (`RowGradients`). With `axes`, parameters are parts
    of what is cut along its latents and sites, and skipped where the gradient is zero in all of it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        axes: Axes | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._axes = Axes() if axes is None else axes

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; the closure, if given, is evaluated first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        listed = [(p, gradient_of(p), group) for group in self.param_groups for p in group["params"]]
        given = [(p, gradient, group) for p, gradient, group in listed if gradient is not None]
        some = torch.stack([gradient.any().int() for _, gradient, _ in given]) if given else torch.zeros(0)
        some = self._axes.sites.total(self._axes.latents.total(some)).tolist()
        for (p, gradient, group), not_zero in zip(given, some, strict=True):
            if not_zero:
                self._update(p, gradient, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                if (carried := RowGradients.of(p)) is not None:
                    carried.clear()

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        order, carried = storage_order(p), RowGradients.instead_of_grad(p)
        if carried is not None:
            n_rows, rows = carried.n_rows, carried.ids_U
        else:
            n_rows = p.numel() // p.shape[order[-1]] if order else 1
            rows, gradient = torch.arange(n_rows, device=p.device), gradient.permute(order).reshape(n_rows, -1)
        weights, m, v = (x.permute(order).view(n_rows, -1) for x in (p, state["exp_avg"], state["exp_avg_sq"]))
        (beta1, beta2), step = group["betas"], float(state["step"])
        kernels.sparse_adam(weights, m, v, gradient, rows, group["lr"], beta1, beta2, group["eps"], step)


class FusedAdam(AdamOfViews):
    """Fused Adam for parameters of any layout.

    The fused kernel copies a gradient that is not contiguous, which costs as much as the update, and on a CPU mixes
    entries up where a gradient lies otherwise than its parameter. A latent-major parameter is therefore handed to it,
    with its gradient and moments, with its dimensions in the order that they are stored in.
    """

    def views(self, params: list[Tensor], others: Sequence[list[Tensor]]) -> None:
        grads, lists = others[0], (params, *others)
        for i, p in enumerate(params):
            if grads[i].stride() != p.stride():
                grads[i] = torch.empty_like(p).copy_(grads[i])
            order = storage_order(p)
            if not p.is_contiguous() and all(tensors[i].permute(order).is_contiguous() for tensors in lists):
                for tensors in lists:
                    tensors[i] = tensors[i].permute(order)


def gradient_of(p: Tensor) -> Tensor | None:
    """A parameter's gradient: its `grad`, or the values of the rows that it carries."""
    carried = RowGradients.instead_of_grad(p)
    return p.grad if carried is None else carried.values_UD
