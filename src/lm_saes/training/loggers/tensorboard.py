"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lm_saes.errors import ConfigError
from lm_saes.training.loggers.base import LoggedRun, LoggerConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoardConfig(LoggerConfig):
    """TensorBoard's event files, in the run's directory."""

    name = "tensorboard"

    def make(self, run: LoggedRun) -> TensorBoardLogger:
        return TensorBoardLogger(run.directory / "tensorboard")


class TensorBoardLogger:
    """Writes every metric as a scalar into `directory`; a resumed run hides what stood after its step.

    Raises:
        ConfigError: at `start`, when TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._writer: SummaryWriter | None = None

    def start(self, total_steps: int, step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "loggers: 'tensorboard' needs TensorBoard, which is not installed; "
                "run pip install 'lm-saes[tensorboard]' or leave it out"
            ) from error
        self._writer = SummaryWriter(str(self.directory), purge_step=step + 1 if step > 0 else None)

    def advance(self, step: int) -> None:
        """Nothing: only reports are written."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            raise RuntimeError("TensorBoardLogger.report was called before start")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, summary: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
