"""What the processes of a run decide together after every step: whether to stop, to save, and to go on."""

from __future__ import annotations

import signal

import torch

from lm_saes.data.batch import Batch
from lm_saes.data.peek import Peekable
from lm_saes.training.config import TrainerConfig
from lm_saes.training.micro_batches import check
from lm_saes.training.run import Run
from lm_saes.training.saving import Timetable


class Pace:
    """Keeps the processes of a run at the same step, by one small collective a step; a single process needs none.

    Told to stop is the run when one process is; the end of the shortest stream is the end of all; saving by the clock
    goes by the first process's.
    """

    def __init__(self, cfg: TrainerConfig, run: Run, stream: Peekable) -> None:
        self._wanted, self._run, self._stream = cfg.gradient_accumulation_steps, run, stream
        self._all = run.dictionary.axes.everywhere
        self._timetable = Timetable(cfg, run)
        self.stopped_by: signal.Signals | None = None
        """The signal that a process was sent: all save this step, and end."""
        self.save = False
        """Whether a checkpoint of this step is due."""
        self._there: int | None = None
        """How many batches every process has for the next step, once that is known."""

    def take(self) -> list[Batch]:
        """The next step's batches, each checked to fit the dictionary; fewer, or none, at the end of the stream."""
        if self._all.size == 1:
            there = self._wanted
        elif self._there is None:
            there = self._all.fewest(self._count())
        else:
            there = self._there
        batches: list[Batch] = []
        while len(batches) < there and (batch := next(self._stream, None)) is not None:
            batches.append(check(self._run.dictionary, batch))
        return batches

    def agree(self, step: int, stopped_by: signal.Signals | None) -> None:
        """Decide what to do after a step: `stopped_by` and `save`.

        Args:
            stopped_by: the signal that this process was sent, if it was.
        """
        overdue = self._timetable.overdue()
        if self._all.size > 1:
            there = self._count() if step < self._run.plan.total and stopped_by is None else 0
            told = torch.tensor([there, -(stopped_by or 0), -int(overdue and self._all.place == 0)])
            self._there, number, clock = self._all.smallest(told).tolist()
            stopped_by, overdue = signal.Signals(-number) if number else None, bool(clock)
        self.stopped_by, self.save = stopped_by, overdue or self._timetable.scheduled(step)

    def saved(self) -> None:
        """A checkpoint was made, or tried: the clock starts again."""
        self._timetable.since = self._run.board.restart_clock()

    def _count(self) -> int:
        return len(self._stream.peek(self._wanted))
