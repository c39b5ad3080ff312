"""What this machine can do, and how it is used."""

from __future__ import annotations

import ctypes
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

STREAM_PATIENCE_S = 60.0
"""How long a batch is waited for before a warning says what the stream is doing."""
STREAM_END_S = 10.0
"""How long a stream's thread that is to end is waited for; one that never does must not keep the process."""


def waits_cost(device: torch.device | str) -> bool:
    """Whether reading a value that lies on `device` costs time.

    The only place that decides this. Call it as `machine.waits_cost`, so that tests can put another answer in its place
    and run what a GPU runs on a CPU.
    """
    return torch.device(device).type == "cuda"


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of giving them back to the system; returns whether it will.

    A training step frees and takes the same few large blocks again and again. Given back, each would have to be mapped
    and zeroed anew: 7% of a step at d=576, F=9216. Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
