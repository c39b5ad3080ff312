"""Selection from whole products, block by block.

Letters: N tokens, B tokens of a block, F latents, E entries, k kept of each token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents import kernels
from lm_saes.latents.offsets import offsets_of_rows
from lm_saes.latents.products import product, product_dtype, rows_at_once
from lm_saes.latents.selection.scores import Found, Scores
from lm_saes.latents.selection.wants import Above


def products_in_full(scores: Scores) -> Iterator[tuple[int, Tensor]]:
    """`x W` in blocks of tokens, each with the number of its first, computed in the type that autocast asks for and
    written over the one before in the bias's."""
    b_F, dtype = scores.b_F, product_dtype(scores.x_ND)
    x_ND, W_DF = scores.x_ND.to(dtype), scores.W_DF.to(dtype)
    n_rows = rows_at_once(x_ND.device, b_F.element_size() * len(b_F))
    product_BF = b_F.new_empty(min(len(x_ND), n_rows), len(b_F))
    for start in range(0, len(x_ND), n_rows):
        x_BD = x_ND[start : start + n_rows]
        yield start, product(x_BD, W_DF, out=product_BF[: len(x_BD)])


def top_in_full(scores: Scores, k: int) -> tuple[Tensor, Tensor]:
    """The k largest `s` of each token: their columns and `x W` there, both `[N, k]`."""
    shift_F = scores.b_F if scores.scale_F is None else scores.b_F * scores.scale_F
    found: list[tuple[Tensor, Tensor]] = []
    for _, product_BF in products_in_full(scores):
        columns_Bk = kernels.top_of_product(product_BF, scores.scale_F, shift_F, k)
        found.append((columns_Bk, product_BF.gather(1, columns_Bk)))
    return torch.cat([c for c, _ in found]), torch.cat([p for _, p in found])


def above_in_full(scores: Scores, want: Above) -> Found:
    """What exceeds its latent's threshold, or lies in the window around it."""
    x_ND, b_F, scale_F = scores.x_ND, scores.b_F, scores.scale_F
    above_F, low_F, _ = want.bounds(b_F, scale_F)
    least_F = (low_F if low_F is not None and want.learns else above_F) - b_F
    places, products = list[Tensor](), list[Tensor]()
    few = len(x_ND) if machine.waits_cost(x_ND.device) else machine.COMPARED_TOKENS
    for start, product_BF in products_in_full(scores):
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
    return Found(offsets[1:] - offsets[:-1], columns_E, s_E, products_E)
