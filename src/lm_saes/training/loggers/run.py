"""A logger around a run object of the caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
