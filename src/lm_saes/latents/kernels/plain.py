"""Sparse products in plain torch operations.

Letters: N rows (tokens), F latents, D width, E entries of the code. All sums run in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def gather_sum(weights_E: Tensor, indices_E: Tensor, offsets: Tensor, table_XD: Tensor) -> Tensor:
    """`out[r] = sum over entries e of row r of weights[e] * table[indices[e]]`; one offset more than rows."""
    if weights_E.numel() == 0:
        return table_XD.new_zeros(offsets.numel() - 1, table_XD.shape[1])
    return nnf.embedding_bag(
        indices_E, table_XD, offsets, mode="sum", per_sample_weights=weights_E, include_last_offset=True
    )


def row_dot(left_ND: Tensor, table_FD: Tensor, rows_E: Tensor, indices_E: Tensor, offsets: Tensor) -> Tensor:
    """`out[e] = <left[rows[e]], table[indices[e]]>` without gathering `[E, D]` tensors."""
    if indices_E.numel() == 0:
        return left_ND.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_ND, table_FD, indices_E, offsets[:-1], rows_E, 0
    )


def transpose(indices_E: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Order of the entries by latent (stable: rows stay ascending within one) and each latent's segment offsets."""
    ids_E, order_E = torch.sort(indices_E, stable=True)
    latents = torch.arange(n_latents + 1, dtype=ids_E.dtype, device=ids_E.device)
    return order_E, torch.searchsorted(ids_E, latents, out_int32=True)
