"""What processes decide together after a step."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lm_saes import SAEConfig, TrainerConfig
from lm_saes.axes.axis import Axes, Axis
from lm_saes.data.peek import peekable
from lm_saes.training.pace import Pace

from ..axes.threads import together


def pace(axis: Axis, n_batches: int, total: int = 9, since: float = 0.0, **cfg: Any) -> Pace:
    """The pace of a run whose stream has so many batches, and which was last saved at `since`."""
    config = SAEConfig(hook_point_in="a", hook_point_out="a", d_model=2, expansion_factor=2)
    dictionary = SimpleNamespace(axes=Axes(everywhere=axis), cfg=config)
    board = SimpleNamespace(restart_clock=lambda: since)
    run: Any = SimpleNamespace(dictionary=dictionary, board=board, plan=SimpleNamespace(total=total, checkpoints={2}))
    batches = [
        {"a": torch.full((1, 2), float(i)), "tokens": torch.zeros(1, dtype=torch.int64)} for i in range(n_batches)
    ]
    return Pace(TrainerConfig(total_training_tokens=9, **cfg), run, peekable(iter(batches)))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_shortest_stream_is_the_end_of_all(n: int, micro_batches: int) -> None:
    def steps(axis: Axis) -> list[list[float]]:
        given = pace(axis, 3 + axis.place, gradient_accumulation_steps=micro_batches)
        taken = []
        while batches := given.take():
            taken.append([float(batch["a"][0, 0]) for batch in batches])
            given.agree(len(taken), None)
        return taken

    assert together(n, steps) == [[[0.0], [1.0], [2.0]] if micro_batches == 1 else [[0.0, 1.0], [2.0]]] * n


@pytest.mark.parametrize("stopped", [0, 1])
def test_one_that_is_told_to_stop_stops_all(stopped: int) -> None:
    def step(axis: Axis) -> signal.Signals | None:
        given = pace(axis, 3)
        given.take()
        given.agree(1, signal.SIGTERM if axis.place == stopped else None)
        return given.stopped_by

    assert together(2, step) == [signal.SIGTERM] * 2


@pytest.mark.parametrize(("overdue_at", "saves"), [(0, True), (1, False)])
def test_the_clock_of_the_first_decides(overdue_at: int, saves: bool) -> None:
    def step(axis: Axis) -> bool:
        since = 0.0 if axis.place == overdue_at else float("inf")
        given = pace(axis, 3, since=since, save_every_minutes=1e-9)
        given.take()
        given.agree(1, None)
        return given.save

    assert together(2, step) == [saves] * 2


@pytest.mark.parametrize("n", [1, 2])
def test_the_plan_is_kept_without_a_clock(n: int) -> None:
    def saved(axis: Axis) -> list[bool]:
        given, told = pace(axis, 9), list[bool]()
        for step in range(1, 4):
            given.take()
            given.agree(step, None)
            told.append(given.save)
        return told

    assert together(n, saved) == [[False, True, False]] * n


def test_after_the_last_step_nothing_is_read_ahead() -> None:
    read: list[int] = []

    class Watched(Axis):
        size = 2

        def fewest(self, n: int) -> int:
            read.append(n)
            return n

        def smallest(self, v: torch.Tensor) -> torch.Tensor:
            read.append(cast(list[int], v.reshape(-1).tolist())[0])
            return v

    given = pace(Watched(), 3, total=1)
    given.take()
    given.agree(1, None)
    assert read == [1, 0]
