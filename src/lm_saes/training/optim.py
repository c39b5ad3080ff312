"""The optimizer of a dictionary, and the norms of its gradients."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import ConfigError
from lm_saes.latents.gradients.rows import carry_row_gradients
from lm_saes.training.config import TrainerConfig
from lm_saes.training.optimizers import OptimizerChoice, gradient_of


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
    choice = cast(OptimizerChoice, cfg.chosen("optimizer_class"))
    carry_row_gradients(names, choice.works_with_rows)
    return choice.build(groups, dictionary.axes)


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
        if name.endswith("log_jumprelu_threshold") == thresholds and (gradient := gradient_of(p)) is not None
    }
