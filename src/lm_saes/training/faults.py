"""Steps whose numbers are not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lm_saes.data.batch import Batch
from lm_saes.errors import TrainingError


def not_finite(values: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those 0-d tensors that are not finite; one wait for the device."""
    names, tensors = zip(*values, strict=True)
    finite = torch.stack([tensor.double() for tensor in tensors]).isfinite().tolist()
    return list(dict.fromkeys(name for name, fine in zip(names, finite, strict=True) if not fine))


def explain(step: int, bad: list[str], hook_point: str, batches: list[Batch]) -> TrainingError:
    """What went wrong, what the batches of that step looked like, and what may help."""
    x = torch.cat([batch[hook_point].float().flatten() for batch in batches])
    return TrainingError(
        f"step {step}: {', '.join(bad)} not finite; {hook_point} has mean {x.mean():.4g}, std {x.std():.4g}, "
        f"largest {x.abs().max():.4g}; lower lr, set clip_grad_norm, or set on_non_finite='skip'"
    )
