"""The entries that selection has found, and the ways to find them that never write out what is selected on.

Letters: N tokens, F latents, S sites, E entries, k kept of each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.latents.activations import ActivationFunction, BatchTopK, TopK
from lm_saes.latents.screening import batch_products, screening_pays, top_in_full, top_products


@dataclass(frozen=True, eq=False)
class Found:
    """Candidates, row by row."""

    lengths: Tensor
    """Entries of each row (token, site)."""
    indices: Tensor
    """`site * F + latent` of each entry."""
    s_E: Tensor
    product_E: Tensor
    """`x W` without the bias."""
    gate_E: Tensor | None


def find_best(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, activation: ActivationFunction, scale_SF: Tensor | None,
    mask_N: Tensor | None,
) -> Found | None:  # fmt: skip
    """The best entries of `s = (x W + b) * scale`, where it is these that an activation function keeps."""
    scale_F = None if scale_SF is None else scale_SF.view(-1)
    if isinstance(activation, TopK):
        return _best_of_each_token(x_ND, W_DF, b_F, activation, scale_F)
    if isinstance(activation, BatchTopK) and activation.training and screening_pays(x_ND, len(b_F), activation.k):
        return _best_of_the_batch(x_ND, W_DF, b_F, activation, scale_F, mask_N)
    return None


def _best_of_each_token(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, activation: TopK, scale_F: Tensor | None
) -> Found:  # fmt: skip
    k, best = min(activation.k, len(b_F)), None
    if screening_pays(x_ND, len(b_F), k):
        best = top_products(x_ND, W_DF, b_F, scale_F, k)
    columns_Nk, products_Nk = best or top_in_full(x_ND, W_DF, b_F, scale_F, k)
    activation.offer(columns_Nk)
    columns_E, products_E = columns_Nk.view(-1), products_Nk.view(-1)
    s_E = products_E + b_F.index_select(0, columns_E)
    s_E = s_E if scale_F is None else s_E * scale_F.index_select(0, columns_E)
    lengths = torch.full((len(x_ND),), columns_Nk.shape[1], device=x_ND.device)
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E, None)


def _best_of_the_batch(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, activation: BatchTopK, scale_F: Tensor | None, mask_N: Tensor | None
) -> Found | None:
    budget = activation.offer(mask_N, len(x_ND))
    valid_X = None if mask_N is None else mask_N.nonzero().squeeze(1)
    best = batch_products(x_ND if valid_X is None else x_ND[valid_X], W_DF, b_F, scale_F, budget)
    if best is None:
        return None
    rows_E, columns_E, products_E, s_E = best
    lengths = torch.bincount(rows_E if valid_X is None else valid_X[rows_E], minlength=len(x_ND))
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E, None)
