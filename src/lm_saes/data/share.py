"""A process's share of every batch, and of a stream of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.axes.axis import Axis
from lm_saes.data.batch import Batch
from lm_saes.data.stream import ActivationStream


def share(batch: Batch, place: int, n: int) -> Batch:
    """The rows (tokens, or contexts) of a batch that belong to the process at a place, of n: none twice, none lost.

    Where there are too few for all, a process without one gets the first row with every token masked.
    """
    size = len(batch["tokens"])
    low, high = place * size // n, (place + 1) * size // n
    if 0 < size < n:
        mask = batch["mask"] if batch.get("mask") is not None else torch.ones_like(batch["tokens"], dtype=torch.bool)
        batch = {**batch, "mask": mask if low < high else torch.zeros_like(mask)}
        low, high = (low, high) if low < high else (0, 1)

    def cut(value: Any) -> Any:
        return value[low:high] if isinstance(value, Tensor | list) else value

    return {name: cut(value) for name, value in batch.items()}


class SharedStream:
    """An `ActivationStream` of which each process along an axis gets its share of every batch.

    Every process reads the whole stream, so that batches are those of one process to the bit, and one saved position
    serves all of them, and any other number of them. What a share costs is therefore what the whole costs: the language
    model reads all text in every process, while rows of a cache that are read in order in its own dtype are only mapped
    into memory, and those of others never copied.
    """

    def __init__(self, stream: ActivationStream, tokens: Axis) -> None:
        self._stream, self._tokens = stream, tokens

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._share(next(self._stream))

    def peek(self, n: int) -> list[Batch]:
        """This process's shares of the next `n` batches, which `next` gives afterwards all the same."""
        return [self._share(batch) for batch in self._stream.peek(n)]

    def state_dict(self) -> dict[str, Any]:
        """The position of the whole stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position that any number of processes has saved."""
        self._stream.load_state_dict(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless `state` is of a stream like this one."""
        self._stream.check_state(state)

    def provenance(self) -> dict[str, Any]:
        """That of the whole stream."""
        return self._stream.provenance()

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _share(self, batch: Batch) -> Batch:
        return share(batch, self._tokens.place, self._tokens.size)
