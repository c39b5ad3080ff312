"""What a stream is doing at the moment, said by its parts."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Activity:
    """The stages that are under way in the pipelines of one stream. Said and read from any thread."""

    def __init__(self) -> None:
        self._stages: dict[int, str] = {}
        self._changing = threading.Lock()

    @contextmanager
    def doing(self, stage: str) -> Iterator[None]:
        """Within the context this thread is at `stage`; an inner stage is told instead of the one around it."""
        thread = threading.get_ident()
        with self._changing:
            around = self._stages.get(thread)
            self._stages[thread] = stage
        try:
            yield
        finally:
            with self._changing:
                if around is None:
                    del self._stages[thread]
                else:
                    self._stages[thread] = around

    def drawing(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; getting each of them is a stage."""
        iterator = iter(items)
        while True:
            with self.doing(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def __str__(self) -> str:
        with self._changing:
            stages = list(dict.fromkeys(self._stages.values()))
        return " and ".join(stages) or "between batches"
