"""Telling what a stream is doing when no batch comes for long."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOG = logging.getLogger(__name__)
_HERE = {Path(__file__).parent, Path(__file__).parents[1] / "models"}
_STAGES = {
    "text": "reading text",
    "contexts": "making contexts",
    "sources": "mixing sources",
    "cache": "reading cached activations",
    "pretrained": "running the language model",
    "huggingface": "running the language model",
    "transformer_lens": "running the language model",
    "shuffle": "shuffling",
    "producers._forward": "running the language model",
    "producers": "making a batch",
}
"""What the modules here, and some of their functions, do."""


class Watch:
    """Warns, from a thread of its own, while somebody waits for longer than `patience` seconds; then ever less often.

    `worker` gives the identity of the thread that is waited for: where it stands names the stage.
    """

    def __init__(self, patience: float, worker: Callable[[], int | None]):
        self._patience = patience
        self._worker = worker
        self._since: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time spent within counts as waiting."""
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._look, name="activations-watch", daemon=True)
            self._thread.start()
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def stop(self) -> None:
        self._ended.set()

    def _look(self) -> None:
        told: tuple[float, float] = (0.0, 0.0)
        while not self._ended.wait(self._patience / 4):
            since = self._since
            if since is None:
                continue
            due = told[1] if told[0] == since else self._patience
            waited = time.monotonic() - since
            if waited >= due:
                told = (since, 2 * waited)
                _LOG.warning("no batch for %.3g s; the stream is %s", waited, self.stage())

    def stage(self) -> str:
        """What the thread that is waited for is doing, and where in the source."""
        frame = sys._current_frames().get(self._worker() or 0)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            name = frame.f_code.co_name
            stage = _STAGES.get(f"{file.stem}.{name}", _STAGES.get(file.stem))
            if file.parent in _HERE and stage is not None:
                return f"{stage} ({file.name}:{frame.f_lineno}, {name})"
            frame = frame.f_back
        return "between batches"
