"""Matrix products in the type that autocast asks for, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 20 << 20
"""Size of one block of pre-activations on a CPU: small enough for the cache, large enough for an efficient product."""
DEVICE_BLOCK_BYTES = 1 << 30
"""The same on other devices."""


def rows_at_once(device: torch.device, row_bytes: int) -> int:
    """How many rows a block has."""
    return max(1, (BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES) // row_bytes)


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


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this machine's processor has instructions for products in a half-precision type."""
    can = torch.cpu.get_capabilities()
    names = {torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"), torch.float16: ("amx_fp16", "avx512_fp16", "fphp")}
    return any(can.get(name) for name in names.get(dtype, ()))
