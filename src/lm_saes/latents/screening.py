"""Exact top-k selection at a fraction of a float32 product, on processors that multiply faster in bfloat16.

A bfloat16 product bounds every pre-activation from above; the entries with the largest bounds are computed again in
float32, and the k best of these are the k best of all if the worst of them reaches the bound of everything left out.
Rows for which this cannot be shown are looked at in float32 as a whole. What is selected, and its values, are those of
float32 arithmetic: only the search is done in less.

Letters: N tokens, B tokens of a block, D width, F latents, E entries, C candidates of a token, k of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes import waiting
from lm_saes.latents import kernels
from lm_saes.latents.bounds import Bounds, loosened
from lm_saes.latents.kernels.plain import GROUPS_OF
from lm_saes.latents.products import cpu_computes_in, product, product_dtype, rows_at_once
from lm_saes.latents.segments import offsets_of_rows

PROBE_ROWS = 128
"""So many tokens are tried first."""
WORTH_WHILE = 0.05
"""Screening goes on if it fails for no more than this share of them."""
CANDIDATES = (1.5, 1.75, 2.5, 4.5)
"""So many times the entries that a token keeps are computed exactly: the first that is enough."""
BATCH_CANDIDATES = 1.5
"""So many times the entries that a batch keeps are computed exactly."""
LARGE = 1 << 28
"""Multiplications of a product that is worth screening."""
FEWEST_TOKENS = 512
"""Rounding the weights costs as much as the product of half as many tokens."""


def screening_pays(x_ND: Tensor, n_latents: int, k: int) -> bool:
    """Whether to try: float32 on a processor with faster half precision, and enough to multiply."""
    return (
        x_ND.device.type == "cpu"
        and not waiting.waits_cost(x_ND.device)
        and x_ND.dtype == torch.float32
        and len(x_ND) >= FEWEST_TOKENS
        and len(x_ND) * x_ND.shape[1] * n_latents >= LARGE
        and 16 * k <= n_latents
        and cpu_computes_in(torch.bfloat16)
    )


def top_products(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int
) -> tuple[Tensor, Tensor] | None:
    """The k largest `s = (x W + b) * scale` of each token: their columns and `x W` there, both `[N, k]`.

    None if bounds turn out too loose for these inputs. Everything float32, on a CPU.
    """
    bounds = Bounds(x_ND, W_DF, b_F, scale_F)
    first, *others = bounds.blocks(first=PROBE_ROWS)
    for excess in CANDIDATES:
        found = [_top(bounds, first, k, int(excess * k))]
        if float(found[0].proven_B.float().mean()) >= 1 - WORTH_WHILE:
            break
    else:
        return None
    found += [_top(bounds, tokens, k, int(excess * k)) for tokens in others]
    columns_Nk, products_Nk = torch.cat([f.columns_Bk for f in found]), torch.cat([f.products_Bk for f in found])
    rest_X = torch.cat([~f.proven_B for f in found]).nonzero().squeeze(1)
    if len(rest_X):
        columns_Nk[rest_X], products_Nk[rest_X] = top_in_full(x_ND[rest_X], W_DF, b_F, scale_F, k)
    return columns_Nk, products_Nk


def top_in_full(x_ND: Tensor, W_DF: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """What `top_products` gives, from whole products."""
    shift_F = b_F if scale_F is None else b_F * scale_F
    found: list[tuple[Tensor, Tensor]] = []
    for _, product_BF in products_in_full(x_ND, W_DF, b_F):
        columns_Bk = kernels.top_of_product(product_BF, scale_F, shift_F, k)
        found.append((columns_Bk, product_BF.gather(1, columns_Bk)))
    return torch.cat([c for c, _ in found]), torch.cat([p for _, p in found])


def products_in_full(x_ND: Tensor, W_DF: Tensor, b_F: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`x W` in blocks of tokens, each with the number of its first, computed in the type that autocast asks for and
    written over the one before in the bias's."""
    dtype = product_dtype(x_ND)
    x_ND, W_DF = x_ND.to(dtype), W_DF.to(dtype)
    n_rows = rows_at_once(x_ND.device, b_F.element_size() * len(b_F))
    product_BF = b_F.new_empty(min(len(x_ND), n_rows), len(b_F))
    for start in range(0, len(x_ND), n_rows):
        x_BD = x_ND[start : start + n_rows]
        yield start, product(x_BD, W_DF, out=product_BF[: len(x_BD)])


@dataclass(frozen=True, eq=False)
class _Screened:
    columns_Bk: Tensor
    products_Bk: Tensor
    proven_B: Tensor
    """Whether nothing else can be among the positive ones of the k largest."""


def _top(bounds: Bounds, tokens: slice, k: int, n_candidates: int) -> _Screened:
    """The k largest `s` of each token, of at least so many candidates."""
    bounds_BF = bounds.of(tokens)
    n_tokens, n_latents = bounds_BF.shape
    rows_E, columns_E, outside_B = _above_the_best(bounds_BF, min(n_candidates, n_latents))
    products_E, s_E = bounds.exact(tokens, rows_E, columns_E)
    offsets = offsets_of_rows(rows_E, n_tokens).long()
    width = int((offsets[1:] - offsets[:-1]).max())
    entries_E = torch.arange(len(s_E))
    places_E = entries_E + (torch.arange(n_tokens) * width - offsets[:-1]).index_select(0, rows_E)
    s_BC = s_E.new_full((n_tokens * width,), -torch.inf).index_copy_(0, places_E, s_E).view(n_tokens, width)
    entry_BC = entries_E.new_zeros(n_tokens * width).index_copy_(0, places_E, entries_E).view(n_tokens, width)
    best = s_BC.topk(min(k, width), dim=1, sorted=False)
    entries_Bk = entry_BC.gather(1, best.indices)
    proven_B = best.values.amin(1).clamp(min=0) >= loosened(outside_B)
    return _Screened(columns_E[entries_Bk], products_E[entries_Bk], proven_B)


def _above_the_best(bounds_BF: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least the n largest entries of each row (rows and columns, by row), and what the others do not exceed, `[B]`.

    Groups of columns (a group is what leaves the same remainder) are compared by their maxima; the entries that reach
    the n-th largest maximum lie in the groups of the n largest.
    """
    n_rows, n_latents = bounds_BF.shape
    n_groups = n_latents // GROUPS_OF
    if n_latents % GROUPS_OF or n_groups < 2 * n:
        best = bounds_BF.topk(n, dim=1, sorted=False)
        rows = torch.arange(n_rows).repeat_interleave(n)
        return rows, best.indices.view(-1), best.values.amin(1)
    maxima = bounds_BF.view(n_rows, GROUPS_OF, n_groups).amax(1).topk(n, dim=1, sorted=False)
    least_B = maxima.values.amin(1)
    within = torch.arange(0, n_latents, n_groups)
    columns_BX = (maxima.indices[:, :, None] + within).view(n_rows, -1)
    chosen = (bounds_BF.gather(1, columns_BX) >= least_B[:, None]).view(-1).nonzero().squeeze(1)
    return chosen // columns_BX.shape[1], columns_BX.view(-1).index_select(0, chosen), least_B


def batch_products(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, scale_F: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Entries among which are the n largest positive `s = (x W + b) * scale` of the whole batch, and few others.

    Their rows and columns, by row, `x W` and `s` there, all `[E]`. None if this cannot be shown. Everything float32,
    on a CPU.
    """
    bounds, found, floor = Bounds(x_ND, W_DF, b_F, scale_F), list[tuple[Tensor, Tensor, Tensor]](), x_ND.new_zeros(())
    for tokens in bounds.blocks(first=0):
        share = BATCH_CANDIDATES * n * (tokens.stop - tokens.start) // len(x_ND)
        flat_E, bounds_E, outside = _above_the_batch(bounds.of(tokens), int(share))
        found.append((flat_E + tokens.start * len(b_F), bounds_E, outside))
        floor = torch.maximum(floor, outside)
    flat_E = torch.cat([flat[bounds_E >= floor] for flat, bounds_E, _ in found])
    rows_E, columns_E = flat_E // len(b_F), flat_E % len(b_F)
    products_E, s_E = bounds.exact(slice(0, len(x_ND)), rows_E, columns_E)
    least = s_E.topk(n, sorted=False).values.amin() if len(s_E) >= n else s_E.new_zeros(())
    if not bool(least.clamp(min=0) >= loosened(floor)):
        return None
    likely_E = (s_E >= least).nonzero().squeeze(1)
    return rows_E[likely_E], columns_E[likely_E], products_E[likely_E], s_E[likely_E]


def _above_the_batch(bounds_BF: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least the n largest positive entries of a block (places in the flattened block, ascending; bounds), and what
    the others do not exceed."""
    n_rows, n_latents = bounds_BF.shape
    n_groups = n_latents // GROUPS_OF
    if n_latents % GROUPS_OF or n_rows * n_groups <= n:
        least = bounds_BF.float().flatten().topk(min(n, bounds_BF.numel()), sorted=False).values.amin().clamp(min=0)
        flat_E = (bounds_BF > least).view(-1).nonzero().squeeze(1)
        return flat_E, bounds_BF.view(-1).index_select(0, flat_E).float(), least
    maxima_BG = bounds_BF.view(n_rows, GROUPS_OF, n_groups).amax(1).float()
    least = maxima_BG.flatten().topk(n, sorted=False).values.amin().clamp(min=0)
    rows_X, groups_X = (maxima_BG > least).nonzero().unbind(1)
    flat_XM = (rows_X * n_latents + groups_X)[:, None] + torch.arange(0, n_latents, n_groups)
    values_XM = bounds_BF.view(-1).index_select(0, flat_XM.view(-1)).float()
    chosen = (values_XM > least).nonzero().squeeze(1)
    flat_E, order = flat_XM.view(-1).index_select(0, chosen).sort()
    return flat_E, values_XM.index_select(0, chosen).index_select(0, order), least
