"""A process's share of every batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lm_saes.data.batch import Batch
from lm_saes.parallel.mesh import axes_of


def share(batch: Batch, place: int, n: int) -> Batch:
    """The rows (tokens, or contexts) of a batch that belong to the process at a place, of n: none twice, none lost."""
    size = len(batch["tokens"])
    low, high = place * size // n, (place + 1) * size // n

    def cut(value: Any) -> Any:
        return value[low:high] if isinstance(value, Tensor | list) else value

    return {name: cut(value) for name, value in batch.items()}


def share_of(batches: Iterable[Batch], mesh: DeviceMesh | None) -> Iterator[Batch]:
    """This process's shares of whole batches."""
    if mesh is None:
        yield from batches
        return
    tokens = axes_of(mesh).tokens
    for batch in batches:
        yield share(batch, tokens.place, tokens.size)
