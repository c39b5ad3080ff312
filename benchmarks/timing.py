"""What every timing of a training step shares: batches in memory, the clock, the floor, memory. Needs torch alone."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def activations(n_batches: int, n_tokens: int, d_model: int) -> list[Tensor]:
    """Batches `[n_tokens, d_model]` of sparse non-negative mixtures of random directions; their mean is not 0."""
    torch.manual_seed(0)
    mixing = torch.randn(2 * d_model, d_model)
    return [torch.relu(torch.randn(n_tokens, 2 * d_model) - 1.5) @ mixing for _ in range(n_batches)]


class Clock:
    """Serves batches, times what happens between two of them, and the floor at every hand-over.

    The floor is the single encoder product `x[B, d] @ W[d, F]` in float32. Step and floor alternate, so that both see
    the same state of a noisy machine. The first `warm` steps are left out of `times` and `floors`.
    """

    def __init__(self, batches: list[Tensor], d_sae: int, warm: int, steps: int) -> None:
        self.batches, self.warm, self.n_steps = batches, warm, warm + steps
        n_tokens, d_model = batches[0].shape
        self._x, self._W = torch.randn(n_tokens, d_model), torch.randn(d_model, d_sae)
        self._out = torch.mm(self._x, self._W)
        self._floors: list[float] = []
        self._asked: list[float] = []
        self._served: list[float] = []

    def tick(self) -> None:
        """Between two steps: stop the watch, time the floor, start the watch."""
        self._asked.append(time.perf_counter())
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            start = time.perf_counter()
            torch.mm(self._x, self._W, out=self._out)
            self._floors.append(time.perf_counter() - start)
        torch.set_float32_matmul_precision(precision)
        self._served.append(time.perf_counter())

    def batch(self, step: int) -> Tensor:
        """What step number `step` trains on."""
        return self.batches[step % len(self.batches)]

    def __iter__(self) -> Iterator[Tensor]:
        """One batch more than there are timed steps, since a step ends where the next one begins."""
        for step in range(self.n_steps + 1):
            self.tick()
            yield self.batch(step)

    @property
    def times(self) -> list[float]:
        """Seconds of the timed steps."""
        return [end - start for start, end in zip(self._served, self._asked[1:], strict=False)][self.warm :]

    @property
    def floors(self) -> list[float]:
        """Seconds of the floor before each of them."""
        return self._floors[self.warm : self.n_steps]


# -- memory ------------------------------------------------------------------------------------------------------------

_M_MMAP_THRESHOLD = -3  # <malloc.h>


def return_freed_memory() -> None:
    """Let glibc give every freed block that matters back to the system at once: resident is then what is in use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def watch_memory() -> int | None:
    """Forget the peak so far; resident bytes now, or None where a process cannot (other systems than Linux)."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def peak_memory() -> int:
    """Largest number of resident bytes since `watch_memory`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of_process() -> int:
    """Largest number of resident bytes since the process began."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if platform.system() == "Darwin" else size * 1024
