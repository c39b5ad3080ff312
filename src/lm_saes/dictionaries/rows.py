"""Batches as rows: the small steps between a batch and the mathematics of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lm_saes.errors import ConfigError, DataError


def hook_rows(batch: Mapping[str, Any], hook_point: str, d_model: int) -> Tensor:
    """The activations of a hook point, `[..., d_model]`.

    Raises:
        DataError: the batch lacks it, or it has another width.
    """
    if hook_point not in batch:
        raise DataError(f"batch: hook point {hook_point!r} is missing; it has {sorted(batch)}")
    x = batch[hook_point]
    if x.shape[-1] != d_model:
        raise DataError(f"{hook_point}: shape {tuple(x.shape)}, wanted [..., {d_model}] (d_model)")
    return x


def flat_mask(mask: Tensor | None) -> Tensor | None:
    """A mask as bool `[N]`."""
    return None if mask is None else mask.reshape(-1).bool()


def valid_rows(x: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The rows of `x [..., d]` that the batch's mask lets count."""
    mask_N = flat_mask(batch.get("mask"))
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if mask_N is None else x_ND[mask_N]


def scale_to(value: float, norm: Tensor, exact: bool = True) -> Tensor:
    """What brings `norm` to `value`, or only what is above it unless `exact`; a zero norm stays zero."""
    factor = torch.where(norm > 0, value / norm, 1.0)
    return factor if exact else factor.clamp(max=1)


def active_directions(y_ND: Tensor, n: int) -> Tensor:
    """The n orthonormal directions of most variance of the rows, `[n, D]`.

    Raises:
        ConfigError: there cannot be that many.
    """
    if not 0 < n <= y_ND.shape[1]:
        raise ConfigError(f"d_active_subspace={n}: must be between 1 and d_model={y_ND.shape[1]}")
    y_ND = y_ND.float()
    return torch.linalg.svd(y_ND - y_ND.mean(0), full_matrices=False).Vh[:n]
