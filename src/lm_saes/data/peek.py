"""Looking at the next batches of a stream without using them up."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from lm_saes.data.batch import Batch

State = dict[str, Any]
_Seen = deque[tuple[Batch, State | None]]
"""Batches and, where the stream has one, the position before each."""

_SEEN: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()
"""What was peeked at and not used yet, by one-shot iterator: what the initializer looked at in a caller's generator is
still there when the trainer is given the same generator. (State of the generator, kept beside it.)"""
_KEPT: dict[int, tuple[Iterator[Batch], _Seen]] = {}
"""The same for iterators that cannot be referenced weakly (`iter(list)`, `map`), by id, until what was seen is used."""


@runtime_checkable
class Peekable(Protocol):
    """An iterator over batches that can show what comes next."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def peek(self, n: int) -> list[Batch]: ...


@runtime_checkable
class Stateful(Protocol):
    """A stream whose position, after the last batch that was used, can be saved and gone back to."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class StatefulIterable(Stateful, Protocol):
    """Batches to iterate over, from a position."""

    def __iter__(self) -> Iterator[Batch]: ...


class PeekableStream:
    """Any iterable of batches, with `peek`; wrappers around the same one-shot iterator share what was peeked at."""

    def __init__(self, stream: Iterable[Batch]):
        self._stream = stream
        self._batches: Iterator[Batch] | None = None
        self._seen: _Seen = deque()
        if isinstance(stream, Generator) or (isinstance(stream, Iterator) and hasattr(stream, "__weakref__")):
            self._seen = _SEEN.setdefault(stream, self._seen)
        elif isinstance(stream, Iterator):
            self._seen = _KEPT.setdefault(id(stream), (stream, self._seen))[1]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._seen:
            return self._pull()
        batch, _ = self._seen.popleft()
        if not self._seen:
            _KEPT.pop(id(self._stream), None)
        return batch

    def peek(self, n: int) -> list[Batch]:
        """The next `n` batches, fewer at the end; they are still given by `next` afterwards."""
        while len(self._seen) < n:
            before = self._position()
            try:
                self._seen.append((self._pull(), before))
            except StopIteration:
                break
        return [self._seen[i][0] for i in range(min(n, len(self._seen)))]

    def _pull(self) -> Batch:
        if self._batches is None:  # not before a position may have been loaded
            self._batches = iter(self._stream)
        return next(self._batches)

    def _position(self) -> State | None:
        return None


class StatefulPeekableStream(PeekableStream):
    """The same around a stream with a position of its own; what was only peeked at does not count as used."""

    def __init__(self, stream: StatefulIterable):
        super().__init__(stream)
        self._source = stream

    def state_dict(self) -> State:
        """The stream's position after the last batch that `next` gave."""
        before = self._seen[0][1] if self._seen else None
        return before if before is not None else self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on at a saved position."""
        self._seen.clear()
        self._batches = None
        self._source.load_state_dict(state)

    def _position(self) -> State:
        return self._source.state_dict()


def peekable(stream: Iterable[Batch]) -> Peekable:
    """`stream` itself if it can be peeked at (an `ActivationStream` can), else a `PeekableStream` around it."""
    if isinstance(stream, Peekable):
        return stream
    return StatefulPeekableStream(stream) if isinstance(stream, Stateful) else PeekableStream(stream)
