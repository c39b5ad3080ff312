"""Sparsity losses. Gradients flow through the decoder norms.

A new sparsity loss is a subclass of `SparsityLoss`: its fields are its settings, and calling it with a record gives it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lm_saes.choices import Choice
from lm_saes.config import BaseConfig, build
from lm_saes.errors import ConfigError
from lm_saes.latents import codes
from lm_saes.latents.codes import EntryFunction, Identity
from lm_saes.latents.record import Record, accumulable


class SparsityLoss(Choice):
    """What makes latents few, as a function of a forward pass."""

    registry: ClassVar[dict[str, type[SparsityLoss]]] = {}
    noun = "sparsity loss"

    @abstractmethod
    def __call__(self, record: Record) -> Tensor:
        """The loss without its coefficient (0-d), a mean over the valid tokens of the whole batch."""


def bound_loss(name: str | None, given: Mapping[str, Any]) -> SparsityLoss | None:
    """The sparsity loss of that name with those of the given settings that it reads; None without a name.

    Raises:
        ConfigError: there is none of that name, or a setting is out of bounds.
    """
    if name is None:
        return None
    kind = find_loss(name)
    return build(kind, {setting: given[setting] for setting in kind.model_fields if setting in given})


def find_loss(name: str) -> type[SparsityLoss]:
    """The sparsity loss of that name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return SparsityLoss.find(name)
    except ConfigError as error:
        raise ConfigError(f"sparsity_loss_type={error} or none") from None


class PowerSettings(BaseConfig):
    """Settings of `power`."""

    p: float = Field(default=1, gt=0)
    """Exponent of the `power` loss; fractions are allowed."""


class TanhSettings(BaseConfig):
    """Settings of `tanh` and `tanh-quad`."""

    tanh_stretch_coefficient: float = Field(default=4.0, gt=0)
    """Stretch `c` of the tanh losses."""


class TanhQuadSettings(TanhSettings):
    """Settings of `tanh-quad`."""

    frequency_scale: float = Field(default=0.01, gt=0)
    """Firing frequency at which `tanh-quad` counts a latent twice."""


def _latent_sums(record: Record, function: EntryFunction) -> Tensor:
    """`function(f norm)` of each latent summed over the valid tokens of this part of the batch: `[F]`, or `[S, F]`."""
    norm = record.norm[0] if record.code_sites == 1 else record.norm
    return record.code.latent_sums(function, norm, record.row_mask)


class Power(PowerSettings, SparsityLoss):
    """Mean over tokens of `|| f norm ||_p`; where a norm has no derivative (at 0) its gradient is 0."""

    name = "power"

    def __call__(self, record: Record) -> Tensor:
        p, latents = self.p, record.axes.latents
        if p == 1:
            return record.row_mean_of_sum(latents.leave(_latent_sums(record, Identity()).sum()))
        norm = record.norm[0] if record.code_sites == 1 else record.norm
        weighed = accumulable(record.code.values * record.code.at(norm))
        active = weighed > 0
        powers = torch.where(active, torch.where(active, weighed, 1.0) ** p, 0.0)
        sums = latents.leave(record.code.sum_rows(powers))
        some = sums > 0
        return record.row_mean(torch.where(some, torch.where(some, sums, 1.0) ** (1 / p), 0.0))


class Tanh(TanhSettings, SparsityLoss):
    """Mean over tokens of `sum_i tanh(c f_i norm_i)` (Anthropic, January 2025 update)."""

    name = "tanh"

    def __call__(self, record: Record) -> Tensor:
        sums_F = _latent_sums(record, codes.Tanh(self.tanh_stretch_coefficient))
        return record.row_mean_of_sum(record.axes.latents.leave(sums_F.sum()))


class TanhQuad(TanhQuadSettings, SparsityLoss):
    """`sum_i q_i (1 + q_i / s)` with `q_i` the mean over tokens of `tanh(c f_i norm_i)`: dense latents pay more."""

    name = "tanh-quad"

    def __call__(self, record: Record) -> Tensor:
        sums_F = _latent_sums(record, codes.Tanh(self.tanh_stretch_coefficient))
        q_F = record.axes.tokens.leave(sums_F) / record.n_tokens
        return record.axes.latents.leave((q_F * (1 + q_F / self.frequency_scale)).sum()) / record.code_sites
