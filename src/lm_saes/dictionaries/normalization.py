"""Scales that bring activations to an average norm of sqrt(d_model)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

NORM_BATCHES = 8
"""Batches over which the dataset-wise norm is measured."""


def token_wise_factor(x: Tensor) -> Tensor:
    """`sqrt(d) / ||x||` of each token: `[..., 1]`; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.shape[-1] ** 0.5 / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def batch_wise_factor(x: Tensor, mask: Tensor | None) -> Tensor:
    """`sqrt(d)` over the mean norm of the batch's valid tokens (0-d)."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    mean = norm.mean() if mask is None else (norm * mask).sum() / mask.sum()
    return x.shape[-1] ** 0.5 / mean


def average_norms(batches: Iterable[Mapping[str, Any]], hook_points: Iterable[str]) -> dict[str, float]:
    """Mean norm of each hook point's activations over the valid tokens of all `batches` together."""
    totals = {hook: 0.0 for hook in hook_points}
    n_tokens = 0.0
    for batch in batches:
        mask = batch.get("mask")
        for hook in totals:
            norm = torch.linalg.vector_norm(batch[hook].float(), dim=-1).double()
            totals[hook] += float((norm if mask is None else norm * mask).sum())
        n_tokens += float(batch["tokens"].numel() if mask is None else mask.sum())
    return {hook: total / n_tokens for hook, total in totals.items()}


def geometric_median(x_ND: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration: `[D]`.

    Source: Weiszfeld 1937; rows closer than rounding to the current point are left out of a step.
    """
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(steps):
        distance_N = torch.linalg.vector_norm(x_ND - median_D, dim=1)
        weight_N = torch.where(distance_N > 1e-12, 1 / distance_N.clamp(min=1e-12), 0.0)
        moved_D = weight_N @ x_ND / weight_N.sum().clamp(min=1e-300)
        if weight_N.sum() == 0 or torch.linalg.vector_norm(moved_D - median_D) <= tolerance * distance_N.mean():
            break
        median_D = moved_D
    return median_D
