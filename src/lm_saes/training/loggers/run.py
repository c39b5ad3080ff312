"""A logger around a run object of the caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_saes.axes.axis import Axis
from lm_saes.training.loggers.base import Logger, Loggers


class RunLogger:
    """Passes reports to a run that its owner opens and closes: W&B's, or anything with `log(metrics, step=...)`."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.run_id: str | None = getattr(run, "id", None)

    def start(self, total_steps: int, step: int) -> None:
        """Nothing to do: the run is open."""

    def advance(self, step: int) -> None:
        """Nothing to do between reports."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, float]) -> None:
        """Nothing to do: whoever opened the run closes it."""


def joined_loggers(loggers: Logger | None, run: Any, everyone: Axis) -> Loggers:
    """A caller's loggers and W&B run as one logger; none but in the first process.

    A lone logger counts as optional, `Loggers` keep what they require.
    """
    if everyone.place != 0:
        return Loggers([])
    optional = [RunLogger(run)] if run is not None else list[Logger]()
    required = [loggers] if isinstance(loggers, Loggers) else []
    return Loggers(required, optional + ([loggers] if loggers and not required else []))
