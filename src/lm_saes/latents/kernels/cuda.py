"""The sparse products as Triton kernels, for CUDA; each has a plain twin in `plain.py` that says the same in torch.

All sums run in a fixed order, without float atomics: the same input gives the same bits. Nothing here waits for the
device: every grid and buffer follows from shapes. Sums are made in float32 (float64 for float64 tables), and results
have the table's type. Sizes of tiles follow from width and type; nothing is tuned at run time.

Letters: N rows (tokens), F latents, D width, E entries of the code, X rows of a table; in kernels e entries and c
columns of one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.kernels.cuda_launch import (
    SUM_TYPES,
    ceil_div,
    launch,
    on_its_device,
    power_of_two,
    rows_together,
    sum_type,
    tile_columns,
    tile_warps,
)
from lm_saes.latents.kernels.cuda_selection import top_of_product as top_of_product
from lm_saes.latents.kernels.plain import transpose as transpose  # a stable radix sort on the device, without a wait


@on_its_device
def gather_sum(weights_E: Tensor, indices_E: Tensor, offsets: Tensor, table_XD: Tensor) -> Tensor:
    """`out[r] = sum over entries e of row r of weights[e] * table[indices[e]]`; one offset more than rows.

    A row of at most one chunk is added up by one program for each tile of columns. Of a longer row every window of a
    chunk's length (counted from the first entry of all) that it reaches into holds one piece, and a second kernel adds
    its pieces in order. Two long rows at most share a window, so the pieces have fixed places: `2 w` for the row that
    holds the window's first entry, `2 w + 1` for the one that holds its last.
    """
    n_rows, n_entries, width = offsets.numel() - 1, weights_E.numel(), table_XD.shape[1]
    if 0 in (n_rows, n_entries, width):
        return table_XD.new_zeros(n_rows, width)
    table_XD, offsets = rows_together(table_XD), offsets.contiguous()
    out = table_XD.new_empty(n_rows, width)
    chunk = max(machine.CHUNK_ENTRIES, power_of_two(ceil_div(n_entries, machine.MOST_CHUNKS)))
    n_windows = ceil_div(n_entries, chunk) if n_entries > chunk else 0
    sums, columns = sum_type(table_XD), tile_columns(table_XD)
    pieces = torch.empty(2 * n_windows, width, dtype=SUM_TYPES[sums], device=out.device)
    n_tiles = ceil_div(width, columns)
    warps = tile_warps(columns, table_XD)
    launch(
        _gather_sum, (n_rows + 2 * n_windows, n_tiles), weights_E.contiguous(), indices_E.contiguous(), offsets,
        table_XD, out, pieces, n_rows, n_entries, width, table_XD.stride(0), chunk, SUM=sums, ENTRIES=4,
        COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if n_windows:
        launch(
            _add_pieces, (n_windows, n_tiles), offsets, pieces, out, n_rows, width, chunk, SUM=sums, PIECES=4,
            COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return out


@on_its_device
def row_dot(left_ND: Tensor, table_FD: Tensor, rows_E: Tensor, indices_E: Tensor, offsets: Tensor) -> Tensor:
    """`out[e] = <left[rows[e]], table[indices[e]]>` without gathering `[E, D]` tensors.

    Programs share out entries, not rows; those of one row lie together and find its left side in the cache.
    """
    n_entries, width = indices_E.numel(), table_FD.shape[1]
    if 0 in (n_entries, width):
        return table_FD.new_zeros(n_entries)
    left_ND, table_FD = rows_together(left_ND), rows_together(table_FD)
    out = table_FD.new_empty(n_entries)
    entries, columns = 16, min(256, tile_columns(table_FD))
    launch(
        _row_dot, (ceil_div(n_entries, entries),), left_ND, table_FD, rows_E.contiguous(), indices_E.contiguous(), out,
        n_entries, width, left_ND.stride(0), table_FD.stride(0), SUM=sum_type(table_FD), ENTRIES=entries,
        COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def sparse_adam(
    p_FD: Tensor, m_FD: Tensor, v_FD: Tensor, grad_RD: Tensor, rows_R: Tensor, lr: float, beta1: float, beta2: float,
    eps: float, step: float,
) -> None:  # fmt: skip
    """One update of sparse Adam, in place, with a gradient that is zero outside `rows` (see the plain twin)."""
    n_rows, width = p_FD.shape
    if 0 in (n_rows, width):
        return
    places_F = torch.full((n_rows,), -1, dtype=torch.int32, device=p_FD.device)
    numbers_R = torch.arange(len(rows_R), dtype=torch.int32, device=p_FD.device)
    places_F.scatter_(0, rows_R.long(), numbers_R)
    columns = tile_columns(p_FD)
    rows = max(1, 2048 // columns)
    size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    launch(
        _sparse_adam, (ceil_div(n_rows, rows), ceil_div(width, columns)), p_FD, m_FD, v_FD, grad_RD, places_F, n_rows,
        width, *p_FD.stride(), *m_FD.stride(), *v_FD.stride(), *grad_RD.stride(), size, beta1, 1 - beta1, beta2,
        1 - beta2, eps, SUM=sum_type(p_FD), ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_of(offsets, n_rows, entry):
    """The row that holds an entry: the last one to begin at or before it, found among 64 at a time."""
    row = entry * 0
    span = row + n_rows
    while span > 1:
        span = (span + 63) // 64
        rows = row + tl.arange(0, 64) * span
        begun = tl.load(offsets + rows, mask=rows < n_rows, other=2147483647) <= entry
        row += (tl.sum(begun.to(tl.int32), 0) - 1) * span
    return row


@triton.jit
def _sum_entries(
    weights, indices, table, low, high, columns_c, inside_c, stride, SUM: tl.constexpr, ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """`sum over entries low <= e < high of weights[e] * table[indices[e]]`, `[c]`."""
    sums_ec = tl.zeros((ENTRIES, COLUMNS), SUM)
    for first in range(low, high, ENTRIES):
        entries_e = first + tl.arange(0, ENTRIES)
        here_e = entries_e < high
        weights_e = tl.load(weights + entries_e, mask=here_e, other=0.0).to(SUM)
        starts_e = tl.load(indices + entries_e, mask=here_e, other=0).to(tl.int64) * stride
        mask_ec = here_e[:, None] & inside_c[None, :]
        rows_ec = tl.load(table + starts_e[:, None] + columns_c[None, :], mask=mask_ec, other=0.0)
        sums_ec += weights_e[:, None] * rows_ec.to(SUM)
    return tl.sum(sums_ec, 0)


@triton.jit(do_not_specialize=["n_rows", "n_entries", "chunk"])
def _gather_sum(
    weights, indices, offsets, table, out, pieces, n_rows, n_entries, width, stride, chunk, SUM: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program `(r, tile)` writes a short row, program `(n_rows + piece, tile)` a piece of a long one."""
    program = tl.program_id(0)
    columns_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = columns_c < width
    if program < n_rows:
        low, high = tl.load(offsets + program).to(tl.int32), tl.load(offsets + program + 1).to(tl.int32)
        if high - low <= chunk:
            sums_c = _sum_entries(
                weights, indices, table, low, high, columns_c, inside_c, stride, SUM, ENTRIES, COLUMNS
            )
            tl.store(out + program.to(tl.int64) * width + columns_c, sums_c, mask=inside_c)
    else:
        piece = program - n_rows
        start = piece // 2 * chunk
        stop = tl.minimum(start + chunk, n_entries)
        last = piece % 2 == 1
        row = _row_of(offsets, n_rows, tl.where(last, stop - 1, start))
        low, high = tl.load(offsets + row).to(tl.int32), tl.load(offsets + row + 1).to(tl.int32)
        repeated = last & (low <= start)  # the row with the last entry holds the first one too
        if (high - low > chunk) & (repeated == 0):
            low, high = tl.maximum(low, start), tl.minimum(high, stop)
            sums_c = _sum_entries(
                weights, indices, table, low, high, columns_c, inside_c, stride, SUM, ENTRIES, COLUMNS
            )
            tl.store(pieces + piece.to(tl.int64) * width + columns_c, sums_c, mask=inside_c)


@triton.jit(do_not_specialize=["n_rows", "chunk"])
def _add_pieces(
    offsets, pieces, out, n_rows, width, chunk, SUM: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program `(w, tile)` adds up the long row in which window w is the first to begin, if there is one."""
    window = tl.program_id(0)
    start = window * chunk
    columns_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = columns_c < width
    row = _row_of(offsets, n_rows, start)
    low, high = tl.load(offsets + row).to(tl.int32), tl.load(offsets + row + 1).to(tl.int32)
    if (high - low > chunk) & (low > start - chunk):
        n_windows = (high - start + chunk - 1) // chunk
        sums_pc = tl.zeros((PIECES, COLUMNS), SUM)
        for first in range(0, n_windows, PIECES):
            windows_p = first + tl.arange(0, PIECES)
            mask_pc = (windows_p < n_windows)[:, None] & inside_c[None, :]
            starts_p = (2 * (window + windows_p)).to(tl.int64) * width
            sums_pc += tl.load(pieces + starts_p[:, None] + columns_c[None, :], mask=mask_pc, other=0.0)
        head = pieces + (2 * window.to(tl.int64) - 1) * width
        head_c = tl.load(head + columns_c, mask=inside_c & (low < start), other=0.0)
        tl.store(out + row.to(tl.int64) * width + columns_c, head_c + tl.sum(sums_pc, 0), mask=inside_c)


@triton.jit(do_not_specialize=["n_entries"])
def _row_dot(
    left, table, rows, indices, out, n_entries, width, left_stride, table_stride, SUM: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program makes the products of some neighbouring entries."""
    entries_e = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    here_e = entries_e < n_entries
    left_e = tl.load(rows + entries_e, mask=here_e, other=0).to(tl.int64) * left_stride
    table_e = tl.load(indices + entries_e, mask=here_e, other=0).to(tl.int64) * table_stride
    sums_ec = tl.zeros((ENTRIES, COLUMNS), SUM)
    for first in range(0, width, COLUMNS):
        columns_c = first + tl.arange(0, COLUMNS)
        mask_ec = here_e[:, None] & (columns_c < width)[None, :]
        left_ec = tl.load(left + left_e[:, None] + columns_c[None, :], mask=mask_ec, other=0.0).to(SUM)
        table_ec = tl.load(table + table_e[:, None] + columns_c[None, :], mask=mask_ec, other=0.0).to(SUM)
        sums_ec += left_ec * table_ec
    tl.store(out + entries_e, tl.sum(sums_ec, 1), mask=here_e)


@triton.jit
def _sparse_adam(
    p, m, v, grad, places, n_rows, width, p_row, p_column, m_row, m_column, v_row, v_column, grad_row, grad_column,
    size: tl.float64, beta1: tl.float64, rest1: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    beta2: tl.float64, rest2: tl.float64, eps: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program `(i, tile)` updates some rows; `places[r]` is where row r's gradient is, -1 if it has none."""
    rows_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns_rc = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :].to(tl.int64)
    here_r = rows_r < n_rows
    places_r = tl.load(places + rows_r, mask=here_r, other=-1)
    rows_rc = rows_r[:, None].to(tl.int64)
    mask_rc = here_r[:, None] & (columns_rc < width)
    given_rc = mask_rc & (places_r >= 0)[:, None]
    at_grad_rc = places_r[:, None].to(tl.int64) * grad_row + columns_rc * grad_column
    at_p_rc = p + rows_rc * p_row + columns_rc * p_column
    at_m_rc = m + rows_rc * m_row + columns_rc * m_column
    at_v_rc = v + rows_rc * v_row + columns_rc * v_column
    g_rc = tl.load(grad + at_grad_rc, mask=given_rc, other=0.0).to(SUM)
    m_rc = tl.load(at_m_rc, mask=mask_rc, other=0.0).to(SUM)
    v_rc = tl.load(at_v_rc, mask=mask_rc, other=0.0).to(SUM)
    m_rc = m_rc * tl.full((1, 1), beta1, SUM) + g_rc * tl.full((1, 1), rest1, SUM)
    v_rc = v_rc * tl.full((1, 1), beta2, SUM) + g_rc * g_rc * tl.full((1, 1), rest2, SUM)
    tl.store(at_m_rc, m_rc, mask=mask_rc)
    tl.store(at_v_rc, v_rc, mask=mask_rc)
    p_rc = tl.load(at_p_rc, mask=given_rc, other=0.0).to(SUM)
    move_rc = tl.full((1, 1), size, SUM) * m_rc / (tl.sqrt(v_rc) + tl.full((1, 1), eps, SUM))
    tl.store(at_p_rc, p_rc - tl.where(g_rc != 0, move_rc, 0.0), mask=given_rc)
