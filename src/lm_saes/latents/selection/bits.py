"""The largest of numbers in bfloat16, compared as the integers that their bits are.

That is the order of the positive ones; the others lie below in no order, and are never among those wanted for good.
Integers of 16 bits are compared several times faster than bfloat16, and few enough to be counted.

Letters: B tokens of a block, F latents, G groups, X columns, M of a group, k or n wanted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lm_saes import machine


def largest(v_BX: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, `[B, k]` (int64).

    They lie in the k groups with the largest maxima, which are found in the same way. A group is what leaves the same
    remainder.
    """
    return _largest(v_BX.view(torch.int16), k)


def above(v_BF: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """At least the n largest positive entries of a block (places in the flattened block, by row; bits), and the least
    bits of which all are among them (1: all that are positive)."""
    n_rows, n_latents = v_BF.shape
    groups_of = machine.BITS_GROUP if n_latents % machine.BITS_GROUP == 0 else 1
    n_groups = n_latents // groups_of
    bits_BF = v_BF.view(torch.int16)
    maxima_BG = bits_BF.view(n_rows, groups_of, n_groups).amax(1)
    least = _nth_largest(maxima_BG, n)
    groups_X = (maxima_BG >= least).view(-1).nonzero().squeeze(1)
    starts_X = groups_X.add_(groups_X // n_groups, alpha=n_latents - n_groups)
    flat_XM = (starts_X[:, None] + torch.arange(0, n_latents, n_groups)).view(-1)
    bits_XM = bits_BF.view(-1).index_select(0, flat_XM)
    chosen = (bits_XM >= least).nonzero().squeeze(1)
    return flat_XM.index_select(0, chosen), bits_XM.index_select(0, chosen), least


def above_in_blocks(blocks: Iterable[tuple[int, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
    """The same of blocks together: each with the number of its first row, and the n that is taken from it."""
    found, floor = list[tuple[Tensor, Tensor]](), 1
    for first, v_BF, n in blocks:
        flat_E, bits_E, least = above(v_BF, n)
        found.append((flat_E + first * v_BF.shape[1], bits_E))
        floor = max(floor, least)
    flat_E, bits_E = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(found) == 1:
        return flat_E, bits_E, floor
    likely_E = (bits_E >= floor).nonzero().squeeze(1)
    return flat_E.index_select(0, likely_E), bits_E.index_select(0, likely_E), floor


def _largest(v_BX: Tensor, k: int) -> Tensor:
    n_rows, n_columns = v_BX.shape
    n_groups = n_columns // machine.BITS_GROUP
    if n_columns % machine.BITS_GROUP or n_groups < 2 * k:
        return v_BX.topk(k, dim=1, sorted=False).indices
    groups_Bk = _largest(v_BX.view(n_rows, machine.BITS_GROUP, n_groups).amax(1), k)
    columns_BC = (groups_Bk[:, None] + torch.arange(0, n_columns, n_groups)[:, None]).view(n_rows, -1)
    best_Bk = v_BX.gather(1, columns_BC).topk(k, dim=1, sorted=False).indices
    return columns_BC.gather(1, best_Bk)


def _nth_largest(v: Tensor, n: int) -> int:
    """The n-th largest of 16-bit integers; 1, the least positive one, where fewer are positive."""
    counts = torch.bincount(v.clamp(min=0).view(-1), minlength=1 << 15)
    at_least = counts[1:].flip(0).cumsum(0).flip(0)
    return max(1, int((at_least >= n).sum()))
