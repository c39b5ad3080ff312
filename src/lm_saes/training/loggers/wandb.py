"""Weights & Biases, online or offline (`WANDB_MODE=offline`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lm_saes.errors import ConfigError
from lm_saes.training.loggers.base import LoggedRun, LoggerConfig

if TYPE_CHECKING:
    from wandb import Run


class WandbConfig(LoggerConfig):
    """Which W&B run a training run is shown in."""

    name = "wandb"
    by_table_only = True

    wandb_project: str = "gpt2-sae-training"
    """The W&B project."""
    exp_name: str | None = None
    """The name that the run is shown under; None: W&B invents one."""
    wandb_entity: str | None = None
    """The user or team that owns the project; None: your default."""
    wandb_run_id: str | None = None
    """The id of the run; None: W&B draws one. A resumed training run goes on under the id that it had."""
    wandb_resume: Literal["allow", "must", "never", "auto"] = "never"
    """What to do when a run with this id exists: go on in it (allow), insist on it (must), refuse (never), or
    go on in this directory's last run if that crashed (auto)."""

    def make(self, run: LoggedRun) -> WandbLogger:
        return WandbLogger(self, run.settings, run.directory, resume_id=run.resumed_id)


class WandbLogger:
    """Sends every report to one W&B run, and the final metrics into its summary.

    `config` is shown as the run's configuration, `directory` is where W&B keeps its files. With `resume_id`, the id
    of an earlier part of this run, it goes on in that W&B run.

    Raises:
        ConfigError: at `start`, when wandb is not installed or cannot begin the run (no login, no network ...).
    """

    def __init__(
        self, cfg: WandbConfig, config: dict[str, Any], directory: str | Path, resume_id: str | None = None
    ) -> None:
        self.cfg = cfg
        self.config = config
        self.directory = Path(directory)
        self._id = resume_id or cfg.wandb_run_id
        self._resume: Literal["allow", "must", "never", "auto"] = "allow" if resume_id else cfg.wandb_resume
        self._run: Run | None = None

    @property
    def run_id(self) -> str | None:
        """The run's id; None only before `start`, where none was given."""
        return self._id

    def start(self, total_steps: int, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "wandb: Weights & Biases is not installed; run pip install 'lm-saes[wandb]' or leave [wandb] out"
            ) from error
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=self.cfg.wandb_project,
                name=self.cfg.exp_name,
                entity=self.cfg.wandb_entity,
                id=self._id,
                resume=self._resume,
                dir=str(self.directory),
                config=self.config,
                # Without this W&B replaces stdout, and records each frame of the progress bar.
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"wandb: the run cannot begin ({reason}); run wandb login, set WANDB_MODE=offline or leave [wandb] out"
            ) from error
        self._id = self._run.id

    def advance(self, step: int) -> None:
        """Nothing: only reports are sent."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            raise RuntimeError("WandbLogger.report was called before start")
        self._run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=0 if summary else 1)
            self._run = None
