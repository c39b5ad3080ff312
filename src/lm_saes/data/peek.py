"""Looking at the next batches of a stream without using them up."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from lm_saes.data.batch import Batch

_SEEN: WeakKeyDictionary[Any, deque[Batch]] = WeakKeyDictionary()
"""Batches that were peeked at and not used yet, by one-shot iterator: what the initializer looked at in a caller's
generator is still there when the trainer is given the same generator. (State of the generator, kept beside it.)"""


@runtime_checkable
class Peekable(Protocol):
    """An iterator over batches that can show what comes next."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def peek(self, n: int) -> list[Batch]: ...


class PeekableStream:
    """Any iterable of batches, with `peek`; wrappers around the same one-shot iterator share what was peeked at."""

    def __init__(self, stream: Iterable[Batch]):
        self._batches = iter(stream)
        self._seen: deque[Batch] = deque()
        if (self._batches is stream and hasattr(stream, "__weakref__")) or isinstance(stream, Generator):
            self._seen = _SEEN.setdefault(stream, self._seen)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._seen.popleft() if self._seen else next(self._batches)

    def peek(self, n: int) -> list[Batch]:
        """The next `n` batches, fewer at the end; they are still given by `next` afterwards."""
        while len(self._seen) < n and (batch := next(self._batches, None)) is not None:
            self._seen.append(batch)
        return [self._seen[i] for i in range(min(n, len(self._seen)))]


def peekable(stream: Iterable[Batch]) -> Peekable:
    """`stream` itself if it can be peeked at (an `ActivationStream` can), else a `PeekableStream` around it."""
    return stream if isinstance(stream, Peekable) else PeekableStream(stream)
