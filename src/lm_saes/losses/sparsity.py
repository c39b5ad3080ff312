"""Sparsity losses. Gradients flow through the decoder norms.

A new sparsity loss is a function of (record, settings) under `@sparsity_loss("its-name")`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.latents.codes import EntryFunction, Identity, Tanh
from lm_saes.latents.record import Record, accumulable
from lm_saes.losses.settings import LossSettings

SparsityLoss = Callable[[Record, LossSettings], Tensor]
SPARSITY_LOSSES: dict[str, SparsityLoss] = {}


def sparsity_loss(name: str) -> Callable[[SparsityLoss], SparsityLoss]:
    """Register a sparsity loss under the name that `sparsity_loss_type` chooses it by."""

    def register(function: SparsityLoss) -> SparsityLoss:
        SPARSITY_LOSSES[name] = function
        return function

    return register


def find_sparsity_loss(name: str) -> SparsityLoss:
    """The sparsity loss of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SPARSITY_LOSSES:
        raise ConfigError(
            f"sparsity_loss_type={name!r}: not a sparsity loss; use one of {', '.join(SPARSITY_LOSSES)} or none"
        )
    return SPARSITY_LOSSES[name]


def _latent_sums(record: Record, function: EntryFunction) -> Tensor:
    """`function(f norm)` of each latent summed over the valid tokens of this part of the batch: `[F]`, or `[S, F]`."""
    norm = record.norm[0] if record.code_sites == 1 else record.norm
    return record.code.latent_sums(function, norm, record.row_mask)


@sparsity_loss("power")
def power(record: Record, settings: LossSettings) -> Tensor:
    """Mean over tokens of `|| f norm ||_p`; where a norm has no derivative (at 0) its gradient is 0."""
    p, latents = settings.p, record.axes.latents
    if p <= 0:
        raise ConfigError(f"p={p}: the power of a norm must be positive; use 1 for the L1 norm")
    if p == 1:
        return record.row_mean_of_sum(latents.leave(_latent_sums(record, Identity()).sum()))
    norm = record.norm[0] if record.code_sites == 1 else record.norm
    weighed = accumulable(record.code.values * record.code.at(norm))
    active = weighed > 0
    powers = torch.where(active, torch.where(active, weighed, 1.0) ** p, 0.0)
    sums = latents.leave(record.code.sum_rows(powers))
    some = sums > 0
    return record.row_mean(torch.where(some, torch.where(some, sums, 1.0) ** (1 / p), 0.0))


@sparsity_loss("tanh")
def tanh(record: Record, settings: LossSettings) -> Tensor:
    """Mean over tokens of `sum_i tanh(c f_i norm_i)` (Anthropic, January 2025 update)."""
    sums_F = _latent_sums(record, Tanh(settings.tanh_stretch_coefficient))
    return record.row_mean_of_sum(record.axes.latents.leave(sums_F.sum()))


@sparsity_loss("tanh-quad")
def tanh_quad(record: Record, settings: LossSettings) -> Tensor:
    """`sum_i q_i (1 + q_i / s)` with `q_i` the mean over tokens of `tanh(c f_i norm_i)`: dense latents pay more."""
    sums_F = _latent_sums(record, Tanh(settings.tanh_stretch_coefficient))
    q_F = record.axes.tokens.leave(sums_F) / record.n_tokens
    return record.axes.latents.leave((q_F * (1 + q_F / settings.frequency_scale)).sum()) / record.code_sites
