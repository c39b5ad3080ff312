"""Mixed precision where the machine is faster with it."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from lm_saes import machine


def mixed_precision(amp_dtype: torch.dtype | None, device: str) -> AbstractContextManager[object]:
    """Autocast to `amp_dtype` on `device`; nothing (and a warning) on a processor without instructions for it."""
    kind = torch.device(device).type
    if amp_dtype is None or amp_dtype == torch.float32:
        return nullcontext()
    if kind == "cpu" and not machine.cpu_computes_in(amp_dtype):
        warnings.warn(
            f"amp_dtype={amp_dtype}: this processor has no instructions for it; computing in float32", stacklevel=2
        )
        return nullcontext()
    return torch.autocast(kind, dtype=amp_dtype)
