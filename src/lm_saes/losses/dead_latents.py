"""Dead latents: the auxiliary reconstruction loss (AuxK)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.dictionaries.record import Record


def auxk(record: Record, hidden_pre_ND: Tensor, norm_D: Tensor | None, W_DM: Tensor, k_aux: int) -> Tensor:
    """How badly the dead latents alone explain what the dictionary missed (Gao et al. 2024, appendix A.2).

    `e = y - y_hat`, detached; per token the `min(k_aux, n_dead)` largest positive `s` among the dead latents keep
    their value `h`; the loss is the mean over tokens of `||e - f W||^2`, so gradients reach encoder and decoder.

    Args:
        record: a record with one site.
        hidden_pre_ND: pre-activations of the dead latents (differentiable).
        norm_D: their decoder norms if selection is gated, else None.
        W_DM: their decoder rows (differentiable).
    """
    error_NM = (record.label - record.reconstruction).detach()[0]
    with torch.no_grad():
        s_ND = hidden_pre_ND if norm_D is None else hidden_pre_ND * norm_D
        best = s_ND.topk(min(k_aux, s_ND.shape[1]), dim=1, sorted=False)
        kept_ND = torch.zeros_like(s_ND, dtype=torch.bool).scatter_(1, best.indices, best.values > 0)
    difference = error_NM - torch.where(kept_ND, hidden_pre_ND, 0.0) @ W_DM
    return record.token_mean(torch.linalg.vecdot(difference, difference))
