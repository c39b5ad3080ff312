"""Compile every Triton kernel for a Hopper GPU, as it is launched at real and at odd widths, on a machine without one.

`test_triton.py` runs this file in a process of its own: it stands in for the driver and compiles instead of launching.
Prints one line a kernel: its name, and the bytes of registers that did not fit (spilled to the stack).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from lm_saes.latents.kernels import cuda


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: Any, compiled: dict[str, tuple[str, bytes]]) -> Any:
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[made.hash] = self.fn.__name__, made.asm["cubin"]
        return made

    return run


def launch_all(dtype: torch.dtype, width: int, n_latents: int, k: int) -> None:
    """Call every function once; what comes out was never written and means nothing."""
    n_rows = 80
    table, left = torch.ones(n_latents, width, dtype=dtype), torch.ones(n_rows, width, dtype=dtype)
    indices, offsets = torch.zeros(n_rows * k, dtype=torch.int32), torch.arange(0, n_rows * k + 1, k).int()
    rows, weights = torch.arange(n_rows).int().repeat_interleave(k), torch.ones(n_rows * k, dtype=dtype)
    cuda.gather_sum(weights, indices, offsets, table)
    cuda.row_dot(left, table, rows, indices, offsets)
    cuda.sparse_adam(table, table, table, left, torch.arange(n_rows), 1e-3, 0.9, 0.999, 1e-8, 1)
    product, shift = torch.ones(2, n_latents, dtype=dtype), torch.ones(n_latents)
    cuda.top_of_product(product, shift, shift, k)
    cuda.top_of_product(product, None, shift, k)


def stack_bytes(cubin: bytes) -> int:
    """Bytes of stack that a kernel needs."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"STACK:(\d+)", usage))


def main() -> None:
    compiled: dict[str, tuple[str, bytes]] = {}
    driver.set_active(NoDevice())  # type: ignore[arg-type]
    JITFunction.run = compile_only(JITFunction.run, compiled)  # type: ignore[method-assign]
    launch_all(torch.bfloat16, 4096, 16 * 160, 64)
    launch_all(torch.float64, 133, 16 * 160 + 3, 7)
    for name, cubin in compiled.values():
        print(name, stack_bytes(cubin))


if __name__ == "__main__":
    main()
