"""Which way to look for what is wanted: in full, screened, or in half precision; the rest is asked block by block.

A new activation function takes the fast ways by what it wants, not by what it is.

Letters: N tokens, F latents, E entries, k kept of each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.latents.selection.budget import SearchByBudget
from lm_saes.latents.selection.full import above_in_full, top_in_full
from lm_saes.latents.selection.half_precision import batch_in_half, half_pays, top_in_half
from lm_saes.latents.selection.scores import BatchScores, Found, Scores, joined, look
from lm_saes.latents.selection.screened import batch_screened, screening_pays, top_screened
from lm_saes.latents.selection.search import Search, SearchByRule, SearchByThreshold, SearchByToken
from lm_saes.latents.selection.wants import Above, BestOfBatch, BestPerToken, Rows, Want


def begin(want: Want, rows: Rows, axes: Axes, device: torch.device) -> Search:
    """A search through a batch on `device` for what is wanted."""
    match want:
        case BestPerToken():
            return SearchByToken(want, rows, axes)
        case BestOfBatch():
            return SearchByBudget(want, rows, axes, device)
        case Above():
            return SearchByThreshold(want, rows, axes)
    return SearchByRule(want, rows, axes)


def find(search: Search, scores: BatchScores) -> Found:
    """The candidates of a search through a batch, by token, then site."""
    found = _at_once(search, scores.plain)
    while found is None:
        found = joined([look(block, search, tokens) for tokens, block in scores.blocks()])
        if not search.found_enough(found.s_E, found.pattern(scores.n_sites * scores.n_latents)):
            found = None
    return found


def _at_once(search: Search, scores: Sequence[Scores]) -> Found | None:
    """What never writes out all scores, if there is such a way."""
    if isinstance(search, SearchByToken) and (len(scores) == 1 or (scores and not search.rows.joined)):
        return _side_by_side([_best_of_each_token(of_site, search.want.k) for of_site in scores], scores[0].n_latents)
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
    k, best = min(k, scores.n_latents), None
    if half_pays(scores.x_ND):
        best = top_in_half(scores, k)
    elif screening_pays(scores.x_ND, scores.n_latents, k):
        best = top_screened(scores, k)
    columns_Nk, products_Nk = best or top_in_full(scores, k)
    columns_E, products_E = columns_Nk.view(-1), products_Nk.view(-1)
    s_E = products_E + b_F.index_select(0, columns_E)
    s_E = s_E if scale_F is None else s_E * scale_F.index_select(0, columns_E)
    lengths = torch.full((len(columns_Nk),), columns_Nk.shape[1], device=columns_Nk.device)
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E)


def _best_of_the_batch(scores: Scores, search: SearchByBudget) -> Found | None:
    x_ND, n_latents, mask_N = scores.x_ND, scores.n_latents, search.rows.mask_N
    in_half = half_pays(x_ND)
    pays = in_half or screening_pays(x_ND, n_latents, search.want.k)
    if not pays or search.axes.batch.size > 1 or not search.budget:
        return None
    valid_X = None if mask_N is None else mask_N.nonzero().squeeze(1)
    find_best = batch_in_half if in_half else batch_screened
    best = find_best(scores if valid_X is None else scores.of(valid_X), search.budget)
    if best is None:
        return None
    rows_E, columns_E, products_E, s_E = best
    lengths = torch.bincount(rows_E if valid_X is None else valid_X[rows_E], minlength=len(x_ND))
    return Found(lengths, columns_E.to(torch.int32), s_E, products_E)
