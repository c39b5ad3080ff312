"""Matrix products in the type that autocast asks for, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes import machine


def rows_at_once(device: torch.device, row_bytes: int) -> int:
    """How many rows a block has."""
    return max(1, (machine.PRODUCT_BLOCK_BYTES if device.type == "cpu" else machine.DEVICE_BLOCK_BYTES) // row_bytes)


def product_dtype(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: autocast's type for float32 activations, else that of `x`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a b` written to `out`; a product in half precision is brought to the type of `out`."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.mm(a, b))


def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a b` added to `out`, as `product` writes it."""
    with torch.autocast(a.device.type, enabled=False):
        return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b))
