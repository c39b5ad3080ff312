"""Optimizers and gradient norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lm_saes.axes.axis import Axes
from lm_saes.errors import ConfigError
from lm_saes.latents import kernels
from lm_saes.latents.gradients.rows import RowGradients, carry_row_gradients, storage_order
from lm_saes.training.config import TrainerConfig

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder


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
        listed = [(p, _gradient(p), group) for group in self.param_groups for p in group["params"]]
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


class FusedAdam(torch.optim.Adam):
    """Fused Adam for parameters of any layout.

    The fused kernel copies a gradient that is not contiguous, which costs as much as the update, and on a CPU mixes
    entries up where a gradient lies otherwise than its parameter. A latent-major parameter is therefore handed to it,
    with its gradient and moments, with its dimensions in the order that they are stored in.
    """

    def _init_group(
        self, group: Any, params_with_grad: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, max_exp_avg_sqs: Any,
        state_steps: Any,
    ) -> Any:  # fmt: skip
        params = params_with_grad
        result = super()._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        lists = (params, grads, exp_avgs, exp_avg_sqs)
        for i, p in enumerate(params):
            if grads[i].stride() != p.stride():
                grads[i] = torch.empty_like(p).copy_(grads[i])
            order = storage_order(p)
            if not p.is_contiguous() and all(tensors[i].permute(order).is_contiguous() for tensors in lists):
                for tensors in lists:
                    tensors[i] = tensors[i].permute(order)
        return result


def build_optimizer(cfg: TrainerConfig, dictionary: AbstractSparseAutoEncoder) -> Optimizer:
    """The optimizer with one group per parameter, each with its name and full learning rate (`base_lr`).

    Raises:
        ConfigError: `lr` names no parameter or group of this dictionary, or leaves one without a rate.
    """
    names = {p: name for name, p in dictionary.named_parameters()}
    groups: list[dict[str, Any]] = []
    known = {"default"}
    for family in dictionary.get_parameters():
        for p in family["params"]:
            name = names[p]
            known |= {name, family["name"]}
            groups.append({"params": [p], "name": name, "base_lr": _rate(cfg, name, family["name"])})
    if isinstance(cfg.lr, dict) and set(cfg.lr) - known:
        raise ConfigError(
            f"lr={cfg.lr}: {sorted(set(cfg.lr) - known)[0]!r} is no parameter or group; use {sorted(known)}"
        )
    for group in groups:
        group["lr"] = group["base_lr"]
    carry_row_gradients(names, cfg.optimizer_class == "sparseadam")
    if cfg.optimizer_class == "sparseadam":
        return SparseAdam(groups, betas=cfg.betas, axes=dictionary.axes)
    if not cfg.optimizer_foreach:
        return torch.optim.Adam(groups, betas=cfg.betas, foreach=False, fused=False)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in names)
    return (
        FusedAdam(groups, betas=cfg.betas, fused=True)
        if fused
        else torch.optim.Adam(groups, betas=cfg.betas, foreach=True)
    )


def _rate(cfg: TrainerConfig, name: str, family: str) -> float:
    factor = cfg.jumprelu_lr_factor if family == "jumprelu" else 1.0
    if not isinstance(cfg.lr, dict):
        return cfg.lr * factor
    for key in (name, family, "default"):
        if key in cfg.lr:
            return cfg.lr[key] * factor
    raise ConfigError(f"lr={cfg.lr}: gives no rate for {name!r}; add it, its group {family!r}, or 'default'")


def gradient_norm(dictionary: AbstractSparseAutoEncoder) -> Tensor:
    """Global 2-norm of the gradients of all parameters but JumpReLU thresholds (0-d)."""
    return _norm(dictionary, thresholds=False)


def threshold_gradient_norm(dictionary: AbstractSparseAutoEncoder) -> Tensor:
    """2-norm of the gradients of JumpReLU thresholds (0-d; 0 without any)."""
    return _norm(dictionary, thresholds=True)


def _norm(dictionary: AbstractSparseAutoEncoder, thresholds: bool) -> Tensor:
    gradients, axes = _gradients(dictionary, thresholds), dictionary.axes
    if axes.latents.size == axes.sites.size == 1:
        return torch.nn.utils.get_total_norm(gradients.values())
    maps, sizes = dictionary.dim_maps(), {"model": axes.latents.size, "head": axes.sites.size}
    square = next(dictionary.parameters()).new_zeros(())
    for name, gradient in gradients.items():
        copies = math.prod(size for along, size in sizes.items() if along not in maps[name])
        square = square + torch.linalg.vector_norm(gradient).square() / copies
    return axes.sites.total(axes.latents.total(square)).sqrt()


def clip_gradients(dictionary: nn.Module, norm: Tensor, largest: float) -> Tensor:
    """Scale the gradients that `norm` is the 2-norm of down to at most `largest`; the norm afterwards (0-d)."""
    factor = (largest / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
    for gradient in _gradients(dictionary, thresholds=False).values():
        gradient.mul_(factor)
    return norm * factor


def _gradients(dictionary: nn.Module, thresholds: bool) -> dict[str, Tensor]:
    return {
        name: gradient
        for name, p in dictionary.named_parameters()
        if name.endswith("log_jumprelu_threshold") == thresholds and (gradient := _gradient(p)) is not None
    }


def _gradient(p: Tensor) -> Tensor | None:
    """A parameter's gradient: its `grad`, or the values of the rows that it carries."""
    carried = RowGradients.instead_of_grad(p)
    return p.grad if carried is None else carried.values_UD
