"""What a logger is, and the one that passes everything on to several."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lm_saes.choices import Choice

_log = logging.getLogger(__name__)


class Logger(Protocol):
    """Receives the numbers of one run. `step` counts completed updates."""

    def start(self, total_steps: int, step: int) -> None:
        """Begin a run of `total_steps` updates of which `step` are done (more than 0: the run is resumed)."""
        ...

    def advance(self, step: int) -> None:
        """Update number `step` is done. Called after every update: must be cheap."""
        ...

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the window that ends with update number `step`."""
        ...

    def close(self, summary: Mapping[str, float]) -> None:
        """End the run with its final metrics; empty for a run that failed. May come without `start`."""
        ...


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of its run before it starts."""

    directory: Path
    settings: dict[str, Any]
    """All of the run's, as JSON values."""
    resumed_id: str | None = None
    """The W&B run that an earlier part of a resumed run went to."""


class LoggerConfig(Choice):
    """A logger that `loggers` may name; its settings stand in a table of its name, which alone switches it on, too."""

    registry: ClassVar[dict[str, type[LoggerConfig]]] = {}
    noun = "logger"
    by_table_only: ClassVar[bool] = False
    """Whether its table alone switches it on."""

    @abstractmethod
    def make(self, run: LoggedRun) -> Logger:
        """The logger of a run."""


class Loggers:
    """Several loggers as one.

    What goes wrong in a required logger ends the run. An optional one (W&B, TensorBoard) that fails after it has
    started is reported once as a warning and dropped. That it cannot start is an error of a new run, for then nothing
    is lost yet; a resumed run goes on without it.
    """

    def __init__(self, required: Sequence[Logger], optional: Sequence[Logger] = ()) -> None:
        self._required = tuple(required)
        self._optional = list(optional)

    @property
    def run_id(self) -> str | None:
        """Id of the W&B run that one of the loggers writes to, if one does."""
        found = (getattr(logger, "run_id", None) for logger in (*self._required, *self._optional))
        return next((run_id for run_id in found if run_id), None)

    def start(self, total_steps: int, step: int) -> None:
        for logger in tuple(self._optional):
            if step:
                self._try(logger, lambda logger: logger.start(total_steps, step))
            else:
                logger.start(total_steps, step)
        for logger in self._required:
            logger.start(total_steps, step)

    def advance(self, step: int) -> None:
        self._each(lambda logger: logger.advance(step))

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda logger: logger.report(step, metrics))

    def close(self, summary: Mapping[str, float]) -> None:
        """Close every logger, then raise the first error of a required one."""
        errors: list[Exception] = []
        for logger in self._required:
            try:
                logger.close(summary)
            except Exception as error:
                errors.append(error)
        for logger in tuple(self._optional):
            self._try(logger, lambda logger: logger.close(summary))
        if errors:
            raise errors[0]

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in self._required:
            action(logger)
        for logger in tuple(self._optional):
            self._try(logger, action)

    def _try(self, logger: Logger, action: Callable[[Logger], None]) -> None:
        try:
            action(logger)
        except Exception as error:
            self._optional.remove(logger)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _log.warning("%s failed and is left out from here on: %s", type(logger).__name__, reason)
