"""Which way to look for what is wanted: in full, screened, or in half precision; the rest is asked block by block.

A new activation function takes the fast ways by what it wants, not by what it is.

Letters: N tokens, F latents, E entries, k kept of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.codes import Pattern
from lm_saes.latents.offsets import offsets_of_lengths, offsets_of_rows, places_of_columns
from lm_saes.latents.products import product_dtype
from lm_saes.latents.selection.budget import SearchByBudget
from lm_saes.latents.selection.full import above_in_full, top_in_full
from lm_saes.latents.selection.half_precision import batch_in_half, top_in_half
from lm_saes.latents.selection.scores import BatchScores, Block, Found, Scores
from lm_saes.latents.selection.screened import batch_screened, top_screened
from lm_saes.latents.selection.search import Search, SearchByThreshold, SearchByToken

Precision = Literal["full", "screened", "half"]


def precision(x_ND: Tensor, n_latents: int, k: int) -> Precision:
    """In which precision to look for k entries of each token.

    In half where autocast asks for bfloat16 and the processor multiplies it fast; screened in half where float32 is
    asked for and there is enough to multiply.
    """
    if x_ND.device.type != "cpu" or x_ND.dtype != torch.float32:
        return "full"
    dtype, n_tokens = product_dtype(x_ND), len(x_ND)
    large = x_ND.numel() * n_latents >= machine.SCREENING_LEAST_PRODUCT
    worth = dtype == torch.bfloat16 or (
        dtype == torch.float32
        and large
        and n_tokens >= machine.SCREENING_LEAST_TOKENS
        and 16 * k <= n_latents
        and not machine.waits_cost(x_ND.device)
    )
    if not worth or not machine.cpu_computes_in(torch.bfloat16):
        return "full"
    return "half" if dtype == torch.bfloat16 else "screened"


def find(search: Search, scores: BatchScores) -> tuple[Found, Pattern]:
    """The candidates of a search through a batch, by token, then site, and where they are."""
    n_latents = scores.n_sites * scores.n_latents
    if (found := _at_once(search, scores.plain)) is not None:
        return found, Pattern(found.indices, offsets_of_lengths(found.lengths), n_latents)
    while True:
        found = _joined([_look(block, search, tokens) for tokens, block in scores.blocks()])
        pattern = Pattern(found.indices, offsets_of_lengths(found.lengths), n_latents)
        if search.found_enough(found.s_E, pattern):
            return found, pattern


def _at_once(search: Search, scores: Sequence[Scores]) -> Found | None:
    """What never writes out all scores, if there is such a way."""
    if isinstance(search, SearchByToken) and (len(scores) == 1 or (scores and not search.rows.joined)):
        return _side_by_side([_best_of_each_token(of_site, search.want.k) for of_site in scores], len(scores[0].b_F))
    if len(scores) != 1 or scores[0].b_F.dtype.itemsize < 4:
        return None
    if isinstance(search, SearchByThreshold):
        return above_in_full(scores[0], search.want)
    return _best_of_the_batch(scores[0], search) if isinstance(search, SearchByBudget) else None


def _side_by_side(found: Sequence[Found], n_latents: int) -> Found:
    """The candidates of all sites, as many of each token in each, by token."""
    if len(found) == 1:
        return found[0]
    n_tokens = len(found[0].lengths)

    def together(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.view(n_tokens, -1) for part in parts], 1).view(-1)

    indices = together([f.indices + i * n_latents for i, f in enumerate(found)])
    s_E, products_E = together([f.s_E for f in found]), together([f.product_E for f in found])
    return Found(together([f.lengths for f in found]), indices, s_E, products_E)


def _best_of_each_token(scores: Scores, k: int) -> Found:
    b_F, scale_F = scores.b_F, scores.scale_F
    k = min(k, len(scores.b_F))
    ways = {"half": top_in_half, "screened": top_screened, "full": top_in_full}
    best = ways[precision(scores.x_ND, len(scores.b_F), k)](scores, k)
    columns_Nk, products_Nk = best or top_in_full(scores, k)
    columns_E, products_E = columns_Nk.view(-1), products_Nk.view(-1)
    s_E = products_E + b_F.index_select(0, columns_E)
    s_E = s_E if scale_F is None else s_E * scale_F.index_select(0, columns_E)
    lengths = torch.full((len(columns_Nk),), columns_Nk.shape[1], device=columns_Nk.device)
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E)


def _best_of_the_batch(scores: Scores, search: SearchByBudget) -> Found | None:
    x_ND, n_latents, mask_N = scores.x_ND, len(scores.b_F), search.rows.mask_N
    way = precision(x_ND, n_latents, search.want.k)
    if way == "full" or search.axes.batch.size > 1 or not search.budget:
        return None
    valid_X = None if mask_N is None else mask_N.nonzero().squeeze(1)
    find_best = batch_in_half if way == "half" else batch_screened
    best = find_best(scores if valid_X is None else scores.of(valid_X), search.budget)
    if best is None:
        return None
    rows_E, columns_E, products_E, s_E = best
    lengths = torch.bincount(rows_E if valid_X is None else valid_X[rows_E], minlength=len(x_ND))
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E)


def _look(block: Block, search: Search, tokens: slice) -> Found:
    """Read one block at the candidates of a search."""
    n_tokens, n_sites, n_latents = block.s_BSF.shape
    per_token = search.rows.per_token
    width = n_sites * n_latents // per_token
    candidates = search.candidates(block.s_BSF.view(n_tokens * per_token, -1), search.rows.of(tokens))
    if candidates.dtype == torch.bool:
        flat = candidates.view(-1).nonzero().squeeze(1)
        lengths = candidates.view(-1, n_latents).sum(1)
    elif candidates.ndim == 1 or per_token < n_sites:
        flat = candidates if candidates.ndim == 1 else places_of_columns(candidates.sort(1).values, width)
        offsets = offsets_of_rows(flat // n_latents, n_tokens * n_sites)
        lengths = offsets[1:] - offsets[:-1]
    else:
        flat = places_of_columns(candidates, width)
        lengths = torch.full((n_tokens * n_sites,), candidates.shape[1], device=candidates.device)
    indices = flat % (n_sites * n_latents)
    shared = block.product_BSF.shape[1] < n_sites
    source = flat // (n_sites * n_latents) * n_latents + flat % n_latents if shared else flat
    product_E = block.product_BSF.reshape(-1).index_select(0, source)
    gate_E = None if block.gate_BSF is None else block.gate_BSF.reshape(-1).index_select(0, source)
    return Found(lengths, indices.to(torch.int32), block.s_BSF.view(-1).index_select(0, flat), product_E, gate_E)


def _joined(found: Sequence[Found]) -> Found:
    """The candidates of all blocks."""
    lengths, indices, s_E, product_E = (
        torch.cat(parts) for parts in zip(*((f.lengths, f.indices, f.s_E, f.product_E) for f in found), strict=True)
    )
    gates = [f.gate_E for f in found if f.gate_E is not None]
    return Found(lengths, indices, s_E, product_E, torch.cat(gates) if gates else None)
