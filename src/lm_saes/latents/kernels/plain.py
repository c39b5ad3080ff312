"""Sparse products in plain torch operations.

Letters: N rows (tokens), B rows of a block, F latents, D width, E entries of the code, k columns wanted, C candidates,
R rows that have a gradient. All sums run in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lm_saes import machine
from lm_saes.torch_private import fused_adam_, row_dots


def gather_sum(weights_E: Tensor, indices_E: Tensor, offsets: Tensor, table_XD: Tensor) -> Tensor:
    """`out[r] = sum over entries e of row r of weights[e] * table[indices[e]]`; one offset more than rows."""
    n_rows = offsets.numel() - 1
    if weights_E.numel() == 0:
        return table_XD.new_zeros(n_rows, table_XD.shape[1])
    n_parts = table_XD.nbytes // machine.CORE_CACHE_BYTES
    often = weights_E.numel() >= machine.OFTEN_READ * (n_rows + len(table_XD))
    parts = table_XD.chunk(n_parts, 1) if often and 1 < n_parts <= machine.MOST_COLUMN_PARTS else [table_XD]
    sums = [
        nnf.embedding_bag(
            indices_E, part.contiguous(), offsets, mode="sum", per_sample_weights=weights_E, include_last_offset=True
        )
        for part in parts
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums, 1)


def row_dot(left_ND: Tensor, table_FD: Tensor, rows_E: Tensor, indices_E: Tensor, offsets: Tensor) -> Tensor:
    """`out[e] = <left[rows[e]], table[indices[e]]>` without gathering `[E, D]` tensors."""
    if indices_E.numel() == 0:
        return left_ND.new_zeros(0)
    return row_dots(left_ND, table_FD, rows_E, indices_E, offsets)


def transpose(indices_E: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Order of the entries by latent (stable: rows stay ascending within one) and each latent's segment offsets."""
    ids_E, order_E = torch.sort(indices_E, stable=True)
    latents = torch.arange(n_latents + 1, dtype=ids_E.dtype, device=ids_E.device)
    return order_E, torch.searchsorted(ids_E, latents, out_int32=True)


def top_columns(s_BF: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row, `[B, k]` (int64).

    Two stages, several times faster than one: the k groups with the largest maxima hold the k largest entries, since
    whatever is among these makes its group's maximum at least as large.
    """
    n_rows, n_latents = s_BF.shape
    n_groups = n_latents // machine.SELECTION_GROUP
    if n_groups < 2 * k:
        return s_BF.topk(k, dim=1, sorted=False).indices
    whole = n_groups * machine.SELECTION_GROUP  # the group of a column is its remainder by n_groups
    maxima_BG = s_BF[:, :whole].view(n_rows, machine.SELECTION_GROUP, n_groups).amax(1)
    groups_Bk = maxima_BG.topk(k, dim=1, sorted=False).indices
    starts = torch.arange(0, whole, n_groups, device=s_BF.device)
    columns_BC = (groups_Bk[:, None, :] + starts[:, None]).flatten(1)
    tail = torch.arange(whole, n_latents, device=s_BF.device).expand(n_rows, -1)
    columns_BC = torch.cat([columns_BC, tail], dim=1) if tail.shape[1] else columns_BC
    best = s_BF.gather(1, columns_BC).topk(k, dim=1, sorted=False).indices
    return columns_BC.gather(1, best)


def top_of_product(product_BF: Tensor, scale_F: Tensor | None, shift_F: Tensor, k: int) -> Tensor:
    """Columns of the k largest `s = product * scale + shift` of each row, `[B, k]` (int64); no scale counts as 1.

    `s` is made for a few rows at a time, in float32 at least, and stays in the cache while it is selected from. Among
    equal entries any may be chosen.
    """
    n_rows, n_latents = product_BF.shape
    columns_Bk = torch.empty(n_rows, k, dtype=torch.int64, device=product_BF.device)
    dtype = selection_dtype(product_BF, shift_F)
    size = _rows_at_once(product_BF, dtype.itemsize * n_latents)
    scratch = product_BF.new_empty(min(size, n_rows), n_latents, dtype=dtype)
    for product, columns in zip(product_BF.split(size), columns_Bk.split(size), strict=True):
        s = scaled_and_shifted(product, scale_F, shift_F, out=scratch[: len(product)])
        columns.copy_(top_columns(s, k))
    return columns_Bk


def selection_dtype(product_BF: Tensor, shift_F: Tensor) -> torch.dtype:
    """The type in which entries are compared: that of product and shift, but at least float32."""
    return torch.promote_types(torch.promote_types(product_BF.dtype, shift_F.dtype), torch.float32)


def scaled_and_shifted(
    product_BF: Tensor, scale_F: Tensor | None, shift_F: Tensor, out: Tensor | None = None
) -> Tensor:
    """`product * scale + shift` in the type that entries are compared in."""
    shift_F = shift_F.to(selection_dtype(product_BF, shift_F))
    if scale_F is None:
        return torch.add(product_BF, shift_F, out=out)
    return torch.addcmul(shift_F, product_BF, scale_F.to(shift_F.dtype), out=out)


def sparse_adam(
    p_FD: Tensor, m_FD: Tensor, v_FD: Tensor, grad_RD: Tensor, rows_R: Tensor, lr: float, beta1: float, beta2: float,
    eps: float, step: float,
) -> None:  # fmt: skip
    """One update of sparse Adam, in place, with a gradient that is zero outside `rows`.

    All moments decay; where an entry of the gradient is not zero they take it up and the weight moves by
    `-lr sqrt(1 - beta2^step) / (1 - beta1^step) m / (sqrt(v) + eps)`.

    Args:
        grad_RD: gradient of the rows in `rows_R` alone, which are all different (int32 or int64).
        step: number of this update, from 1 on.
    """
    rows_R, order_R = rows_R.long().sort()
    if 2 * len(rows_R) < len(p_FD) and p_FD.dtype.itemsize >= 4:
        return _sparse_adam_of_few(p_FD, m_FD, v_FD, grad_RD, rows_R, order_R, lr, beta1, beta2, eps, step)
    # torch's Adam adds eps after the bias correction: scaled by it, that is the same update
    eps /= (1 - beta2**step) ** 0.5
    steps = torch.full((), step, dtype=torch.float32, device=p_FD.device)
    n_rows = _rows_at_once(p_FD, 5 * p_FD.element_size() * p_FD.shape[1])
    blocks = list(zip(*(x.split(n_rows) for x in (p_FD, m_FD, v_FD)), strict=True))
    starts = n_rows * torch.arange(len(blocks) + 1, device=p_FD.device)
    bounds = torch.searchsorted(rows_R, starts).tolist()
    for block, start, low, high in zip(blocks, starts.tolist()[:-1], bounds[:-1], bounds[1:], strict=True):
        p, m, v = parts = [x.contiguous() for x in block]
        rows, given = rows_R[low:high] - start, grad_RD.index_select(0, order_R[low:high]).to(p.dtype)
        some_zero, g, kept = bool((given == 0).any()), given, rows[:0]
        if len(given) < len(p):
            g = torch.zeros_like(p).index_copy_(0, rows, given)
            kept = torch.ones_like(g[:, 0], dtype=torch.bool).index_fill_(0, rows, False).nonzero().squeeze(1)
        before = p.clone() if some_zero else p.index_select(0, kept)
        fused_adam_(p, g, m, v, steps, lr=lr, beta1=beta1, beta2=beta2, eps=eps)
        if some_zero:
            torch.where(g == 0, before, p, out=p)
        else:
            p.index_copy_(0, kept, before)
        for x, part in zip(block, parts, strict=True):
            if part is not x:
                x.copy_(part)


def _sparse_adam_of_few(
    p_FD: Tensor, m_FD: Tensor, v_FD: Tensor, grad_RD: Tensor, rows_R: Tensor, order_R: Tensor, lr: float,
    beta1: float, beta2: float, eps: float, step: float,
) -> None:  # fmt: skip
    """The same where few rows have a gradient: the others only decay."""
    m_FD.mul_(beta1)
    v_FD.mul_(beta2)
    size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    n_rows = _rows_at_once(p_FD, 5 * p_FD.element_size() * p_FD.shape[1])
    for rows, order in zip(rows_R.split(n_rows), order_R.split(n_rows), strict=True):
        g = grad_RD.index_select(0, order).to(p_FD.dtype)
        m = m_FD.index_select(0, rows).add_(g, alpha=1 - beta1)
        v = v_FD.index_select(0, rows).addcmul_(g, g, value=1 - beta2)
        m_FD.index_copy_(0, rows, m)
        v_FD.index_copy_(0, rows, v)
        m.mul_(torch.ne(g, 0, out=g))  # a number, not a mask: masks are slow
        p = p_FD.index_select(0, rows).addcdiv_(m, v.sqrt_().add_(eps), value=-size)
        p_FD.index_copy_(0, rows, p)


def _rows_at_once(like: Tensor, row_bytes: int) -> int:
    """How many rows of so many bytes stay in the cache, or on a GPU are enough to keep it busy."""
    cores = torch.get_num_threads() if like.device.type == "cpu" else 256
    size = machine.CORE_CACHE_BYTES * cores
    return max(1, size // max(1, row_bytes))
