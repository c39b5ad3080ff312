"""Moving rows between tensors in pieces too small for torch to start its own threads.

The run-ahead thread works beside training. With torch's threads it would compete for the same cores: measured on two
busy cores, one 2048 x 576 batch then took 14 ms instead of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes import machine


def take_rows(x: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x[index]`, floating-point values in `dtype` (None: as they are)."""
    taken = torch.empty(index.numel(), *x.shape[1:], dtype=dtype if dtype and x.is_floating_point() else x.dtype)
    n = _rows_at_a_time(x)
    for out, some in zip(taken.split(n), index.split(n), strict=True):
        out.copy_(x.index_select(0, some))
    return taken


def copy_rows(target: Tensor, x: Tensor) -> None:
    """`target[:] = x`, from any device and dtype (in one go from another device)."""
    n = _rows_at_a_time(target) if x.is_cpu else max(1, target.shape[0])
    for out, some in zip(target.split(n), x.split(n), strict=True):
        out.copy_(some)


def _rows_at_a_time(x: Tensor) -> int:
    return max(1, (machine.SINGLE_THREAD_ELEMENTS - 1) // max(1, x[:1].numel()))
