"""Dead latents: the auxiliary reconstruction loss (AuxK)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import Axis
from lm_saes.latents.record import Record, squared_length


@dataclass(frozen=True, eq=False)
class DeadList:
    """The dead latents of a dictionary, or of one of its layers, by number."""

    latents: Tensor
    """`[X]` int64; the dead ones ascending, then 0 in the places that are left over."""
    real: Tensor | None = None
    """Which places hold a dead latent, bool `[X]`; None: all."""

    def scale(self, scale_F: Tensor | None) -> Tensor | None:
        """What selection multiplies their `h` by (None: nothing): 0 where no latent is meant."""
        if scale_F is None:
            return self.real
        scale_X = scale_F.index_select(0, self.latents)
        return scale_X if self.real is None else scale_X * self.real

    @property
    def exact(self) -> Tensor:
        """Their numbers alone; may wait for the device."""
        return self.latents if self.real is None else self.latents[self.real]


def list_dead(is_dead: Tensor, room: Sequence[int] | None = None) -> list[DeadList]:
    """The dead latents of each row of `is_dead` (`[F]` counts as one).

    Args:
        room: how many each row's list has places for: no size then depends on values. Of more, the first are listed.
    """
    rows = is_dead.view(-1, is_dead.shape[-1])
    if room is None:
        return [DeadList(row_F.nonzero().squeeze(1)) for row_F in rows]
    lists = []
    for row_F, size in zip(rows, room, strict=True):
        latents = torch.nonzero_static(row_F, size=size, fill_value=0).squeeze(1)
        lists.append(DeadList(latents, torch.arange(size, device=row_F.device) < row_F.sum()))
    return lists


def auxk(
    record: Record, hidden_pre_ND: Tensor, norm_D: Tensor | None, W_DM: Tensor, k_aux: int, site: int = 0
) -> Tensor:
    """How badly the dead latents alone explain what the dictionary missed (Gao et al. 2024, appendix A.2).

    `e = y - y_hat`, detached; per token the `min(k_aux, n_dead)` largest positive `s` among the dead latents keep
    their value `h`; the loss is the mean over tokens of `||e - f W||^2`, so gradients reach encoder and decoder.

    Args:
        record: one forward pass.
        hidden_pre_ND: pre-activations of the dead latents (differentiable).
        norm_D: their decoder norms if selection is gated, else None.
        W_DM: their decoder rows (differentiable).
        site: the site whose error they are to explain.
    """
    error_NM = (record.label[site] - record.reconstruction[site]).detach()
    latents = record.axes.latents
    difference = error_NM - latents.leave(strongest(hidden_pre_ND, norm_D, k_aux, latents) @ W_DM)
    return record.token_mean(squared_length(difference))


def strongest(hidden_pre_ND: Tensor, norm_D: Tensor | None, k: int, latents: Axis) -> Tensor:
    """The k largest positive `s = h norm` of each row keep their `h`; the rest is 0. Differentiable in `h`."""
    with torch.no_grad():
        s_ND = hidden_pre_ND if norm_D is None else hidden_pre_ND * norm_D
        kept_ND = torch.gt(s_ND, 0, out=torch.empty_like(s_ND))  # as numbers: masks and `where` are slow
        if machine.waits_cost(s_ND.device):
            kept_ND *= latents.top(s_ND, k)
        elif latents.size > 1 or s_ND.shape[1] > k:
            crowded_X = (latents.total(kept_ND.sum(1)) > k).nonzero().squeeze(1)
            if len(crowded_X):
                kept_ND[crowded_X] *= latents.top(s_ND[crowded_X], k)
    return hidden_pre_ND * kept_ND
