"""Where the entries of each row begin, in lists that hold entries row by row. Letters: N rows, E entries."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets_of_lengths(lengths_N: Tensor) -> Tensor:
    """`[N + 1]` int32, from how many entries each row has."""
    offsets = torch.zeros(len(lengths_N) + 1, dtype=torch.int32, device=lengths_N.device)
    offsets[1:] = lengths_N.cumsum(0)
    return offsets


def offsets_of_rows(rows_E: Tensor, n_rows: int) -> Tensor:
    """`[N + 1]` int32, from the row of each entry, ascending."""
    rows = torch.arange(n_rows + 1, dtype=rows_E.dtype, device=rows_E.device)
    return torch.searchsorted(rows_E, rows, out_int32=True)


def places_of_columns(columns_BC: Tensor, n_columns: int) -> Tensor:
    """Columns of each row as places in the flattened block of rows with so many columns."""
    first_B = torch.arange(0, len(columns_BC) * n_columns, n_columns, device=columns_BC.device)
    return (columns_BC + first_B[:, None]).view(-1)
