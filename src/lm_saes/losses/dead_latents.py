"""Dead latents: the auxiliary reconstruction loss (AuxK)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.dictionaries.record import Record
from lm_saes.latents.axis import Axis


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
    return record.token_mean(torch.linalg.vecdot(difference, difference))


def strongest(hidden_pre_ND: Tensor, norm_D: Tensor | None, k: int, latents: Axis) -> Tensor:
    """The k largest positive `s = h norm` of each row keep their `h`; the rest is 0. Differentiable in `h`."""
    with torch.no_grad():
        s_ND = hidden_pre_ND if norm_D is None else hidden_pre_ND * norm_D
        kept_ND = torch.gt(s_ND, 0, out=torch.empty_like(s_ND))  # as numbers: masks and `where` are slow
        crowded_X = (latents.total(kept_ND.sum(1)) > k).nonzero().squeeze(1)
        if len(crowded_X):
            kept_ND[crowded_X] *= latents.top(s_ND[crowded_X], k)
    return hidden_pre_ND * kept_ND
