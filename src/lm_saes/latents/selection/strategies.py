"""The entries that selection has found, and the ways to find them that never write out what is selected on.

Letters: N tokens, F latents, S sites, E entries, k kept of each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.activations.base import ActivationFunction
from lm_saes.latents.activations.batchtopk import BatchTopK
from lm_saes.latents.activations.topk import TopK
from lm_saes.latents.offsets import offsets_of_rows
from lm_saes.latents.selection.half_precision import batch_in_half, half_pays, top_in_half
from lm_saes.latents.selection.screened import (
    batch_products,
    products_in_full,
    screening_pays,
    top_in_full,
    top_products,
)

FEW_TOKENS = 16
"""So many tokens' pre-activations are compared at a time on a CPU: they stay in a core's cache."""


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
    if isinstance(activation, TopK) and _chooses_like(activation, TopK):
        return _best_of_each_token(x_ND, W_DF, b_F, activation, scale_F)
    if isinstance(activation, BatchTopK) and _chooses_like(activation, BatchTopK) and activation.training:
        alone = activation.axes.batch.size == 1
        if alone and (half_pays(x_ND) or screening_pays(x_ND, len(b_F), activation.k)):
            return _best_of_the_batch(x_ND, W_DF, b_F, activation, scale_F, mask_N)
        return None
    if activation.judges_entries:
        return _all_above(x_ND, W_DF, b_F, activation, scale_F)
    return None


def _chooses_like(activation: ActivationFunction, kind: type[ActivationFunction]) -> bool:
    """Whether a kind of activation function has no candidates of its own, other than its parent's."""
    return type(activation).candidates is kind.candidates


def _all_above(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, activation: ActivationFunction, scale_F: Tensor | None
) -> Found:  # fmt: skip
    """What exceeds its latent's bound, or lies in the window around it."""
    above_F, low_F, _ = activation.bounds(b_F, scale_F)
    least_F = (above_F if low_F is None or not activation.training else low_F) - b_F
    places, products = list[Tensor](), list[Tensor]()
    few = len(x_ND) if machine.waits_cost(x_ND.device) else FEW_TOKENS
    for start, product_BF in products_in_full(x_ND, W_DF, b_F):
        flat_E = torch.cat(
            [
                (few_BF > least_F).view(-1).nonzero().squeeze(1).add_(i * few * len(b_F))
                for i, few_BF in enumerate(product_BF.split(few))
            ]
        )
        products.append(product_BF.view(-1).index_select(0, flat_E))
        places.append(flat_E.add_(start * len(b_F)))
    flat_E, products_E = torch.cat(places), torch.cat(products)
    rows_E = flat_E // len(b_F)
    columns_E = flat_E.sub_(rows_E * len(b_F)).to(torch.int32)
    s_E = products_E + b_F.index_select(0, columns_E)
    s_E = s_E if scale_F is None else s_E.mul_(scale_F.index_select(0, columns_E))
    offsets = offsets_of_rows(rows_E, len(x_ND))
    return Found(offsets[1:] - offsets[:-1], columns_E, s_E, products_E, None)


def find_best_of_layers(
    x_NSD: Tensor, W_SDF: Tensor, b_SF: Tensor, activation: ActivationFunction, scale_SF: Tensor | None
) -> Found | None:
    """The same where each site (layer) has its own inputs and weights; entries by token, then site."""
    if not isinstance(activation, TopK) or not _chooses_like(activation, TopK) or activation.joins_sites:
        return None
    scales = [None] * len(W_SDF) if scale_SF is None else scale_SF.unbind()
    layers = zip(x_NSD.unbind(1), W_SDF, b_SF, scales, strict=True)
    found = [_best_of_each_token(x.contiguous(), W, b, activation, scale) for x, W, b, scale in layers]
    n_tokens, n_latents = len(x_NSD), b_SF.shape[1]

    def together(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.view(n_tokens, -1) for part in parts], 1).view(-1)

    indices = together([f.indices + i * n_latents for i, f in enumerate(found)])
    s_E, products_E = together([f.s_E for f in found]), together([f.product_E for f in found])
    return Found(together([f.lengths for f in found]), indices, s_E, products_E, None)


def _best_of_each_token(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, activation: TopK, scale_F: Tensor | None
) -> Found:  # fmt: skip
    k, best = min(activation.k, len(b_F)), None
    if half_pays(x_ND):
        best = top_in_half(x_ND, W_DF, b_F, scale_F, k)
    elif screening_pays(x_ND, len(b_F), k):
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
    if not budget:
        return None
    valid_X = None if mask_N is None else mask_N.nonzero().squeeze(1)
    find = batch_in_half if half_pays(x_ND) else batch_products
    best = find(x_ND if valid_X is None else x_ND[valid_X], W_DF, b_F, scale_F, budget)
    if best is None:
        return None
    rows_E, columns_E, products_E, s_E = best
    lengths = torch.bincount(rows_E if valid_X is None else valid_X[rows_E], minlength=len(x_ND))
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E, None)
