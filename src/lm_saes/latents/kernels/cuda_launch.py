"""How Triton kernels are launched: on which device, with tiles of what size, adding up in which type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from lm_saes import machine

P = ParamSpec("P")
T = TypeVar("T")

SUM_TYPES = {tl.float32: torch.float32, tl.float64: torch.float64}
"""Types that sums are made in, as Triton's and as torch's."""


def on_its_device(
    function: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """Make a function launch its kernels where its first tensor is, whatever the current device."""

    @wraps(function)
    def there(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(first) if first.is_cuda else nullcontext():
            return function(first, *args, **kwargs)

    return there


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **sizes: object) -> None:
    """Launch a Triton kernel (whose types no checker follows) on a grid of programs."""
    kernel[grid](*arguments, **sizes)


def ceil_div(n: int, size: int) -> int:
    """How many parts of a size it takes to cover `n`."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def sum_type(table: Tensor) -> tl.dtype:
    """What sums over a table's rows are made in."""
    return tl.float64 if table.dtype == torch.float64 else tl.float32


def rows_together(x: Tensor) -> Tensor:
    """The same matrix with each row contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def tile_columns(table: Tensor) -> int:
    """Columns of a tile: the widest that covers no more than an eighth above what the best choice covers."""
    width, most = table.shape[1], machine.TILE_BYTES // table.element_size()
    if width <= 128:
        return power_of_two(width)
    choices = [columns for columns in (1024, 512, 256, 128) if columns <= most]
    covered = {columns: ceil_div(width, columns) * columns for columns in choices}
    return next(columns for columns in choices if 8 * covered[columns] <= 9 * min(covered.values()))


def tile_warps(columns: int, table: Tensor) -> int:
    """Warps of a program that reads rows of so many columns: each thread reads 16 bytes of a row."""
    return max(1, columns * table.element_size() // 512)
