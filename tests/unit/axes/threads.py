"""Processes played by threads: an axis whose collectives are a list that all fill and read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lm_saes.axes.axis import Axis


class ThreadAxis(Axis):
    def __init__(self, place: int, said: list[Tensor], barrier: threading.Barrier) -> None:
        self.place, self.size = place, len(said)
        self._said, self._barrier = said, barrier

    def join(self, rows: Tensor) -> Tensor:
        return torch.cat(self._all(rows))

    def fewest(self, n: int) -> int:
        return int(self.smallest(torch.tensor(n)))

    def smallest(self, v: Tensor) -> Tensor:
        return torch.stack(self._all(v)).amin(0)

    def _all(self, own: Tensor) -> list[Tensor]:
        self._said[self.place] = own
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        return said


def together(n: int, act: Callable[[Axis], Any]) -> list[Any]:
    """What `act` gives, or the exception that it raises, on each of `n` processes."""
    said, barrier = [torch.zeros(0)] * n, threading.Barrier(n, timeout=20)

    def attempt(place: int) -> Any:
        try:
            return act(ThreadAxis(place, said, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(attempt, range(n)))
