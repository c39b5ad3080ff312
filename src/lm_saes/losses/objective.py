"""The training objective: `l_rec + l_s + l_p + l_aux`, each already times its coefficient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_saes.dictionaries.record import Record
from lm_saes.losses.settings import LossSettings
from lm_saes.losses.sparsity import find_sparsity_loss

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder


def objective(
    dictionary: AbstractSparseAutoEncoder, record: Record, settings: LossSettings, is_dead: Tensor | None = None
) -> dict[str, Tensor]:
    """The loss terms of a record: `loss`, `l_rec` and, where they are switched on, `l_s`, `l_p`, `l_aux` (0-d tensors).

    Args:
        is_dead: bool (`[F]`, or `[S, F]`), which latents AuxK revives, as of before this batch; None: none.
    """
    terms = {"l_rec": record.token_mean(record.squared_error)}
    if settings.sparsity_loss_type is not None:
        terms["l_s"] = settings.l1_coefficient * find_sparsity_loss(settings.sparsity_loss_type)(record, settings)
    if settings.lp_coefficient:
        terms["l_p"] = settings.lp_coefficient * dictionary.pre_activation_loss(record)
    if settings.auxk_coefficient:
        dead = None if is_dead is None else is_dead.flatten().nonzero().squeeze(-1)
        terms["l_aux"] = (
            terms["l_rec"].new_zeros(())
            if dead is None or not dictionary.axes.latents.total(torch.tensor(dead.numel()))
            else settings.auxk_coefficient * dictionary.dead_latent_loss(record, dead, settings.k_aux)
        )
    return {"loss": sum(terms.values(), start=terms["l_rec"].new_zeros(())), **terms}
