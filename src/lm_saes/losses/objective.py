"""The training objective: `l_rec + l_s + l_p + l_aux`, each already times its coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.latents.record import Record
from lm_saes.losses.dead_latents import DeadList, list_dead
from lm_saes.losses.settings import LossSettings


class HasPenalties(Protocol):
    """What the objective asks of a dictionary, whose kind knows these terms."""

    axes: Axes

    def pre_activation_loss(self, record: Record) -> Tensor:
        """The pre-activation penalty `l_p` (JumpReLU only), without its coefficient."""
        ...

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        """AuxK over the `dead` latents (one list, or one for each layer), without its coefficient."""
        ...


def objective(
    dictionary: HasPenalties,
    record: Record,
    settings: LossSettings,
    is_dead: Tensor | None = None,
    dead_room: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The loss terms of a record: `loss`, `l_rec` and, where they are switched on, `l_s`, `l_p`, `l_aux` (0-d tensors).

    Args:
        is_dead: bool (`[F]`, or `[S, F]`), which latents AuxK revives, as of before this batch; None: none.
        dead_room: how many of each site AuxK has places for, so that nobody waits to count them; None: for all.
    """
    terms = {"l_rec": record.token_mean(record.squared_error)}
    if settings.sparsity_loss is not None:
        terms["l_s"] = settings.l1_coefficient * settings.sparsity_loss(record)
    if settings.lp_coefficient:
        terms["l_p"] = settings.lp_coefficient * dictionary.pre_activation_loss(record)
    if settings.auxk_coefficient:
        terms["l_aux"] = _dead_latent_loss(dictionary, record, settings, is_dead, dead_room)
    return {"loss": sum(terms.values(), start=terms["l_rec"].new_zeros(())), **terms}


def _dead_latent_loss(
    dictionary: HasPenalties,
    record: Record,
    settings: LossSettings,
    is_dead: Tensor | None,
    room: Sequence[int] | None,
) -> Tensor:
    """AuxK times its coefficient: 0 if nothing is dead."""
    nothing = record.squared_error.new_zeros(())
    if is_dead is None:
        return nothing
    dead, latents = list_dead(is_dead, room), dictionary.axes.latents
    if not latents.count(sum(len(some.latents) for some in dead)):
        return nothing
    loss = settings.auxk_coefficient * dictionary.dead_latent_loss(record, dead, settings.k_aux)
    return loss if room is None else torch.where(latents.total(is_dead.sum()) > 0, loss, nothing)
