"""Selection of the largest pre-activations as Triton kernels, without writing them out; `plain.py` has the twin.

Letters: B rows, F latents, G groups of columns, k columns wanted, C candidates; in kernels m members of a group,
g groups and c candidates of one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.kernels.cuda_launch import ceil_div, launch, on_its_device, power_of_two, rows_together, sum_type
from lm_saes.latents.kernels.plain import scaled_and_shifted, selection_dtype


@on_its_device
def top_of_product(product_BF: Tensor, scale_F: Tensor | None, shift_F: Tensor, k: int) -> Tensor:
    """Columns of the k largest `s = product * scale + shift` of each row, `[B, k]` (int64); no scale counts as 1.

    One pass over the product finds the largest `s` of each group of columns (those of equal remainder by the number of
    groups); the k groups with the largest hold the k largest entries, and only their members are looked at again.
    """
    n_rows, n_latents = product_BF.shape
    members = machine.SELECTION_GROUP
    n_groups = n_latents // members
    if n_rows == 0 or n_groups < 2 * k:  # few columns
        return scaled_and_shifted(product_BF, scale_F, shift_F).topk(k, dim=1, sorted=False).indices
    product_BF, shift_F = rows_together(product_BF), shift_F.contiguous()
    scaled = scale_F is not None
    scale = scale_F.contiguous() if scaled else shift_F  # unread without a scale
    maxima_BG = product_BF.new_empty(n_rows, n_groups, dtype=selection_dtype(product_BF, shift_F))
    work = sum_type(maxima_BG)
    rows, groups = 8, 256
    launch(
        _group_maxima, (ceil_div(n_rows, rows), ceil_div(n_groups, groups)), product_BF, scale, shift_F, maxima_BG,
        n_rows, n_groups, product_BF.stride(0), SCALED=scaled, WORK=work, ROWS=rows, MEMBERS=members, GROUPS=groups,
        num_warps=1,
    )  # fmt: skip
    if n_groups > machine.MANY_GROUPS:
        groups_Bk = top_of_product(maxima_BG, None, maxima_BG.new_zeros(n_groups), k)
    else:
        groups_Bk = maxima_BG.topk(k, dim=1, sorted=False).indices
    n_candidates = k * members + n_latents % members
    values_BC = maxima_BG.new_empty(n_rows, n_candidates)
    columns_BC = torch.empty(n_rows, n_candidates, dtype=torch.int32, device=product_BF.device)
    candidates = min(1024, power_of_two(n_candidates))
    launch(
        _candidates, (n_rows, ceil_div(n_candidates, candidates)), product_BF, scale, shift_F, groups_Bk, values_BC,
        columns_BC, n_groups, k, n_candidates, product_BF.stride(0), SCALED=scaled, WORK=work, MEMBERS=members,
        CANDIDATES=candidates, num_warps=4,
    )  # fmt: skip
    best_Bk = values_BC.topk(k, dim=1, sorted=False).indices
    return columns_BC.gather(1, best_Bk).long()


@triton.jit(do_not_specialize=["n_rows"])
def _group_maxima(
    product, scale, shift, maxima, n_rows, n_groups, stride, SCALED: tl.constexpr, WORK: tl.constexpr,
    ROWS: tl.constexpr, MEMBERS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program `(i, tile)` finds the maxima of some groups in some rows, which share what they read of the scales."""
    rows_b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside_g = groups_g < n_groups
    mask_bg = (rows_b < n_rows)[:, None] & inside_g[None, :]
    starts_b = rows_b.to(tl.int64) * stride
    maxima_bg = tl.full((ROWS, GROUPS), float("-inf"), WORK)
    for member in range(0, MEMBERS):
        columns_g = member * n_groups + groups_g
        s_bg = tl.load(product + starts_b[:, None] + columns_g[None, :], mask=mask_bg, other=0.0).to(WORK)
        if SCALED:
            s_bg = s_bg * tl.load(scale + columns_g, mask=inside_g, other=0.0).to(WORK)[None, :]
        s_bg += tl.load(shift + columns_g, mask=inside_g, other=0.0).to(WORK)[None, :]
        maxima_bg = tl.maximum(maxima_bg, s_bg)
    at_bg = maxima + rows_b.to(tl.int64)[:, None] * n_groups + groups_g[None, :]
    tl.store(at_bg, maxima_bg, mask=mask_bg)


@triton.jit
def _candidates(
    product, scale, shift, groups, values, columns, n_groups, k, n_candidates, stride, SCALED: tl.constexpr,
    WORK: tl.constexpr, MEMBERS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Program `(b, tile)` writes value and column of some candidates of row b: members of its best groups, then the
    last columns, which belong to no group."""
    row = tl.program_id(0).to(tl.int64)
    numbers_c = tl.program_id(1) * CANDIDATES + tl.arange(0, CANDIDATES)
    inside_c = numbers_c < n_candidates
    member_c = numbers_c < k * MEMBERS
    groups_c = tl.load(groups + row * k + numbers_c // MEMBERS, mask=member_c, other=0).to(tl.int32)
    alone_c = numbers_c - k * MEMBERS + n_groups * MEMBERS
    columns_c = tl.where(member_c, groups_c + numbers_c % MEMBERS * n_groups, alone_c)
    s_c = tl.load(product + row * stride + columns_c, mask=inside_c, other=0.0).to(WORK)
    if SCALED:
        s_c = s_c * tl.load(scale + columns_c, mask=inside_c, other=0.0).to(WORK)
    s_c += tl.load(shift + columns_c, mask=inside_c, other=0.0).to(WORK)
    tl.store(values + row * n_candidates + numbers_c, s_c, mask=inside_c)
    tl.store(columns + row * n_candidates + numbers_c, columns_c, mask=inside_c)
