"""Exact top-k selection at a fraction of a float32 product, on processors that multiply faster in bfloat16.

A bfloat16 product bounds every pre-activation from above; the entries with the largest bounds are computed again in
float32, and the k best of these are the k best of all if the worst of them reaches the bound of everything left out.
Rows for which this cannot be shown are looked at with more candidates, and if need be in float32 as a whole. What is
selected, and its values, are those of float32 arithmetic: only the search is done in less.

Letters: N tokens, B tokens of a block, D width, F latents, E entries, C candidates of a token, k of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.selection.bits import above_in_blocks, largest
from lm_saes.latents.selection.bounds import Bounds, loosened
from lm_saes.latents.selection.full import top_in_full
from lm_saes.latents.selection.scores import Scores


def top_screened(scores: Scores, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest `s = (x W + b) * scale` of each token: their columns and `x W` there, both `[N, k]`.

    None if bounds turn out too loose for these inputs. Everything float32, on a CPU.
    """
    bounds, found, n_candidates = Bounds(scores), list[_Screened](), 0
    for tokens in bounds.blocks():
        x_BD, bounds_BF = scores.x_ND[tokens], bounds.of(tokens)
        if not found:
            first, rest = slice(0, machine.SCREENING_PROBE_TOKENS), slice(machine.SCREENING_PROBE_TOKENS, None)
            enough = _enough(bounds, x_BD[first], bounds_BF[first], k)
            if enough is None:
                return None
            n_candidates, tried = enough
            found.append(_look_again(tried, bounds, x_BD[first], bounds_BF[first], k))
            x_BD, bounds_BF = x_BD[rest], bounds_BF[rest]
        if len(x_BD):
            found.append(_look_again(_top(bounds, x_BD, bounds_BF, k, n_candidates), bounds, x_BD, bounds_BF, k))
    columns_Nk, products_Nk = torch.cat([f.columns_Bk for f in found]), torch.cat([f.products_Bk for f in found])
    rest_X = torch.cat([~f.proven_B for f in found]).nonzero().squeeze(1)
    if len(rest_X):
        columns_Nk[rest_X], products_Nk[rest_X] = top_in_full(scores.of(rest_X), k)
    return columns_Nk, products_Nk


@dataclass(frozen=True, eq=False)
class _Screened:
    columns_Bk: Tensor
    products_Bk: Tensor
    proven_B: Tensor
    """Whether nothing else can be among the positive ones of the k largest."""


def _enough(bounds: Bounds, x_BD: Tensor, bounds_BF: Tensor, k: int) -> tuple[int, _Screened] | None:
    """How many candidates are enough for nearly all of these tokens, and what they find; None: not even the most."""
    for excess in machine.SCREENING_CANDIDATES:
        n_candidates = min(int(excess * k), bounds_BF.shape[1])
        found = _top(bounds, x_BD, bounds_BF, k, n_candidates)
        if float(found.proven_B.float().mean()) >= 1 - machine.SCREENING_MOST_FAILURES:
            return n_candidates, found
    return None


def _look_again(found: _Screened, bounds: Bounds, x_BD: Tensor, bounds_BF: Tensor, k: int) -> _Screened:
    """What was found, with the most candidates where it is not proven."""
    rest_X = (~found.proven_B).nonzero().squeeze(1)
    if len(rest_X):
        most = min(int(machine.SCREENING_CANDIDATES[-1] * k), bounds_BF.shape[1])
        better = _top(bounds, x_BD[rest_X], bounds_BF[rest_X], k, most)
        found.columns_Bk[rest_X], found.products_Bk[rest_X] = better.columns_Bk, better.products_Bk
        found.proven_B[rest_X] = better.proven_B
    return found


def _top(bounds: Bounds, x_BD: Tensor, bounds_BF: Tensor, k: int, n_candidates: int) -> _Screened:
    """The k largest `s` of each token, of so many candidates."""
    columns_BC = largest(bounds_BF, n_candidates)
    outside_B = bounds_BF.gather(1, columns_BC).amin(1).clamp(min=0)
    rows_E = torch.arange(len(columns_BC)).repeat_interleave(columns_BC.shape[1])
    products_E, s_E = bounds.exact(x_BD, rows_E, columns_BC.view(-1))
    best = s_E.view_as(columns_BC).topk(k, dim=1, sorted=False)
    proven_B = best.values.amin(1).clamp(min=0) >= loosened(outside_B)
    return _Screened(
        columns_BC.gather(1, best.indices), products_E.view_as(columns_BC).gather(1, best.indices), proven_B
    )


def batch_screened(scores: Scores, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Entries among which are the n largest positive `s` of the whole batch, and few others.

    Their rows and columns, by row, `x W` and `s` there, all `[E]`. None if this cannot be shown. Everything float32,
    on a CPU.
    """
    bounds, n_tokens, n_latents = Bounds(scores), len(scores.x_ND), len(scores.b_F)
    wanted = machine.SCREENING_BATCH_CANDIDATES * n
    flat_E, _, floor = above_in_blocks(
        (tokens.start, bounds.of(tokens), int(wanted * (tokens.stop - tokens.start) / n_tokens))
        for tokens in bounds.blocks()
    )
    rows_E, columns_E = flat_E // n_latents, flat_E % n_latents
    products_E, s_E = bounds.exact(scores.x_ND, rows_E, columns_E)
    least = s_E.topk(n, sorted=False).values.amin() if len(s_E) >= n else s_E.new_zeros(())
    outside = torch.tensor(floor, dtype=torch.int16).view(torch.bfloat16) if floor > 1 else s_E.new_zeros(())
    if not bool(least.clamp(min=0) >= loosened(outside)):
        return None
    likely_E = (s_E >= least).nonzero().squeeze(1)
    return rows_E[likely_E], columns_E[likely_E], products_E[likely_E], s_E[likely_E]
