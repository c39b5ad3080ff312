"""The stream of batches that trainers read: runs ahead in one thread, can be peeked at, and can be gone on with."""

from __future__ import annotations

import json
import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lm_saes import machine
from lm_saes.axes.differences import differences
from lm_saes.data.activity import Activity
from lm_saes.data.batch import Batch
from lm_saes.data.producers import Producer
from lm_saes.data.stalls import Watch
from lm_saes.errors import CheckpointError, DataError

_Item = tuple[Batch, dict[str, Any] | None]
"""A batch, and the state after it where that is cheap to take."""
_LOG = logging.getLogger(__name__)


class _Ahead:
    """Makes batches in the background, at most `depth` ahead; with `depth` 0, when they are asked for.

    The lock `moving` is held while the producer moves and until its batch is in the queue, so whoever holds it sees
    the two in agreement.
    """

    def __init__(self, producer: Producer, depth: int, activity: Activity):
        self.watch = Watch(machine.STREAM_PATIENCE_S, activity)
        self.producer = producer
        self.ready: deque[_Item] = deque()
        self.moving = threading.Lock()
        self._depth = depth
        self._activity = activity
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._ended = False
        self._error: BaseException | None = None

    def get(self) -> _Item | None:
        """The next batch, or None at the end. What went wrong in the thread is raised here, with its traceback."""
        with self.watch.waiting():
            return self._get()

    def _get(self) -> _Item | None:
        if self._depth == 0:
            return self._make()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="activations", daemon=True)
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._ended or self._error)
            if self.ready:
                item = self.ready.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None:
            raise self._error
        return None

    def stop(self, timeout: float | None = None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.watch.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            if self._thread.is_alive():
                _LOG.warning("the stream does not end; it is %s, and is left behind", str(self._activity))

    def _make(self) -> _Item | None:
        with self._activity.doing("making a batch"):
            batch = self.producer.next()
            return None if batch is None else (batch, self.producer.state_dict() if self.producer.light else None)

    def _run(self) -> None:
        try:
            while not self._ended:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self.ready) < self._depth)
                    if self._stopped:
                        return
                with self.moving:
                    item = self._make()
                    with self._changed:
                        if item is None:
                            self._ended = True
                        else:
                            self.ready.append(item)
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


class ActivationStream:
    """An iterator over batches on the CPU, made by `ActivationFactory.process`.

    With `depth` > 0 one background thread keeps that many batches ready; what goes wrong in it is raised by `next`.
    The saved state is the one after the last batch that `next` returned, however many have been prepared or peeked at.
    While `next` waits for longer than a minute, warnings say what the stream is doing.
    """

    def __init__(
        self,
        producer: Producer,
        depth: int,
        settings: dict[str, Any],
        provenance: dict[str, Any],
        activity: Activity,
    ):
        self._ahead = _Ahead(producer, depth, activity)
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._provenance = provenance
        self._peeked: deque[_Item] = deque()
        self._begun = self._closed = False
        self._state = producer.state_dict() if producer.light else None
        weakref.finalize(self, _Ahead.stop, self._ahead, machine.STREAM_END_S)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._peeked.popleft() if self._peeked else self._get()
        if item is None:
            raise StopIteration
        batch, self._state = item
        return batch

    def peek(self, n: int) -> list[Batch]:
        """The next `n` batches (fewer at the end), which `next` gives afterwards all the same."""
        while len(self._peeked) < n and (item := self._get()) is not None:
            self._peeked.append(item)
        return [self._peeked[i][0] for i in range(min(n, len(self._peeked)))]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that `next` returned: JSON values and tensors in nested dicts.

        A few numbers, unless tokens are shuffled in a buffer: then also a copy of the buffer's rows, and the batches
        that were prepared but not used.
        """
        if self._state is not None:
            return {"settings": self._settings, "position": self._state}
        with self._ahead.watch.waiting(), self._ahead.moving:
            waiting = [*self._peeked, *self._ahead.ready]
            pending = {str(i): dict(batch) for i, (batch, _) in enumerate(waiting)}
            return {"settings": self._settings, "pending": pending, "position": self._ahead.producer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bit for bit, where `state` was taken. Call it before the first batch.

        Raises:
            CheckpointError: batches have been read already, or the state is of a stream with other settings or data.
        """
        if self._begun:
            raise CheckpointError("the stream has given batches already; load its state before the first one")
        self.check_state(state)
        producer = self._ahead.producer
        producer.load_state_dict(state["position"])
        self._peeked = deque((batch, None) for _, batch in sorted(state.get("pending", {}).items(), key=_position))
        self._state = producer.state_dict() if producer.light else None

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `CheckpointError`, with every difference, unless `state` is of a stream like this one."""
        if "settings" not in state or "position" not in state:
            raise CheckpointError(f"not the state of an ActivationStream: it has {', '.join(map(repr, state))}")
        if found := list(differences(state["settings"], self._settings)):
            raise CheckpointError(
                f"the saved position belongs to a stream with other settings ({'; '.join(found)}); resume with the same"
            )

    def close(self) -> None:
        """End the background thread; no more batches can be read. The state can still be taken."""
        self._closed = True
        self._ahead.stop(machine.STREAM_END_S)

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def provenance(self) -> dict[str, Any]:
        """The factory's settings and seed, the model, and every source with a hash of its data."""
        return self._provenance

    def origin(self) -> dict[str, Any]:
        """What decides the numbers in the batches: `provenance` without what only decides when they are made."""
        factory = {key: value for key, value in self._provenance["factory"].items() if key != "num_workers"}
        return {**self._provenance, "factory": factory}

    def _get(self) -> _Item | None:
        if self._closed:
            raise DataError("the stream was closed; make another with ActivationFactory.process")
        self._begun = True
        return self._ahead.get()


def _position(entry: tuple[str, Batch]) -> int:
    return int(entry[0])
