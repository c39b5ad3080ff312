"""Telling what a stream is doing when no batch comes for long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lm_saes.data.activity import Activity

_LOG = logging.getLogger(__name__)


class Watch:
    """Warns, from a thread of its own, while somebody waits for longer than `patience` seconds; then ever less often.

    A warning tells the stage that the stream's parts say they are at.
    """

    def __init__(self, patience: float, activity: Activity):
        self._patience = patience
        self._activity = activity
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
                _LOG.warning("no batch for %.3g s; the stream is %s", waited, str(self._activity))
