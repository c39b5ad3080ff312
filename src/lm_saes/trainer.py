"""The training loop: `_loop` says when, `update` says what. `cur_step` counts completed updates, everywhere."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from lm_saes.data.batch import Batch
from lm_saes.data.peek import Peekable, Stateful, peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import ConfigError, Interrupted
from lm_saes.storage.provenance import record, started_from
from lm_saes.training import checkpoint, resume, saving
from lm_saes.training.attributes import RunAttributes
from lm_saes.training.config import TrainerConfig
from lm_saes.training.loggers.base import Logger
from lm_saes.training.loggers.run import joined_loggers
from lm_saes.training.micro_batches import check
from lm_saes.training.pace import Pace
from lm_saes.training.run import Run
from lm_saes.training.update import update

__all__ = ["Trainer", "TrainerConfig"]
log = logging.getLogger(__name__)

_PROGRESS = ("cur_step", "cur_tokens", "skipped_steps", "reported")
EvalFn = Callable[[AbstractSparseAutoEncoder], Mapping[str, float] | None]


class Trainer(RunAttributes):
    """Trains a dictionary on a stream of activations.

    The order of a step: forward, loss and backward of each micro-batch, clip, optimizer, count, metrics; then report,
    evaluate, save. Schedules are functions of the number of updates completed before the step.
    """

    def __init__(self, cfg: TrainerConfig) -> None:
        self.cfg = cfg
        self.cur_step = self.cur_tokens = self.skipped_steps = 0
        self.reported: dict[str, float] = {}
        self.wandb_run_id: str | None = None
        self._run: Run | None = None
        self._stream: Peekable | None = None
        self._stream_state: dict[str, Any] | None = None
        self._saved: Path | None = None
        self._source: Path | None = None
        self._stopped_by: signal.Signals | None = None

    def fit(
        self,
        sae: AbstractSparseAutoEncoder,
        activation_stream: Iterable[Batch],
        eval_fn: EvalFn | None = None,
        wandb_logger: Any = None,
        loggers: Logger | None = None,
    ) -> bool:
        """Train until `total_training_tokens`, or until the stream ends; then save the dictionary.

        Args:
            eval_fn: called every `eval_frequency` steps, with the dictionary in evaluation mode; its result is logged.
            wandb_logger: a W&B run (anything with `log(metrics, step=...)`).
            loggers: where progress and reports go. Of several processes only the first shows any.

        Returns:
            Whether the stream ended before the last step (a resumable checkpoint is saved all the same).

        Raises:
            ConfigError: settings that do not fit this dictionary or stream.
            DataError: a batch that is not what it should be.
            TrainingError: a loss or gradient that is not finite.
            Interrupted: `stop` was called, and the run has been saved.
        """
        stream = self._stream = peekable(activation_stream)
        run = self._prepare(sae, stream)
        saving.announce(self.cfg, run, self.cur_step, self._position)
        logger = joined_loggers(loggers, wandb_logger, sae.axes.everywhere)
        logger.start(run.plan.total, self.cur_step)
        self.wandb_run_id = logger.run_id or self.wandb_run_id
        try:
            pace = Pace(self.cfg, run, stream)
            summary = self._loop(run, pace, eval_fn, logger)
            ended_early = self._finish(run, pace.stopped_by)
        except BaseException:
            logger.close({})
            raise
        logger.close(summary)
        return ended_early

    def _loop(self, run: Run, pace: Pace, eval_fn: EvalFn | None, logger: Logger) -> dict[str, float]:
        """Step, report, evaluate and save until the end; the last value of everything that was reported."""
        cfg, sae, summary = self.cfg, run.dictionary.train(), dict[str, float]()
        while self.cur_step < run.plan.total and (batches := pace.take()):
            update(run, cfg, self.cur_step, batches)
            self.cur_step += 1
            if not run.ledger.defers:
                self._settle(run)
            logger.advance(self.cur_step)
            report = self._report(run) if self._due(cfg.log_frequency) else {}
            if eval_fn is not None and self._due(cfg.eval_frequency):
                report |= eval_fn(sae.eval()) or {}
                sae.train()
                run.board.restart_clock()
            if report:
                logger.report(self.cur_step, report)
                summary |= report
                self.reported |= report
            pace.agree(self.cur_step, self._stopped_by)
            if pace.stopped_by is not None:
                break
            if pace.save:
                self._try_to_save(run)
                pace.saved()
        return summary

    def _settle(self, run: Run) -> None:
        """Count tokens, and steps that were left out, that are not counted yet: before reports and saves at the latest.

        Raises:
            TrainingError: a step was not finite, and `on_non_finite="stop"`.
        """
        tokens, skipped = run.ledger.settle()
        self.cur_tokens += tokens
        self.skipped_steps += skipped

    def _due(self, frequency: int) -> bool:
        return self.cur_step % frequency == 0 or self.cur_step == self.total_training_steps

    def _report(self, run: Run) -> dict[str, float]:
        self._settle(run)
        skipped = {"details/skipped_steps": float(self.skipped_steps)} if self.skipped_steps else {}
        return run.board.report() | run.details(self.cur_step - 1, self.cur_tokens) | skipped

    def stop(self, by: signal.Signals) -> None:
        """Let a running `fit` finish its step, save a checkpoint, and raise `Interrupted`. Safe in a signal handler."""
        self._stopped_by = by

    def _prepare(self, sae: AbstractSparseAutoEncoder, stream: Peekable) -> Run:
        everyone = sae.axes.everywhere
        if self._run is None or self._source is not None:
            start = resume.where_to_begin(self.cfg, sae.cfg, everyone, found=self._source)
            if self._run is None and start is not None:
                self.go_on_from(sae, start)
            self._source = None
        checkpoint.sweep(self.cfg.exp_result_path, everyone)
        if self._stream_state is not None and isinstance(stream, Stateful):
            stream.load_state_dict(self._stream_state)
        elif self.cur_step:
            log.warning("resuming at step %d from a plain iterable: it must yield the remaining batches", self.cur_step)
        if self._run is None:
            first = stream.peek(1)
            if not everyone.fewest(len(first)):
                raise ConfigError("activation_stream: yields no batch to train on")
            n_tokens = check(sae, first[0])["tokens"].numel()
            self._run = Run.begin(self.cfg, sae, sae.axes.tokens.count(n_tokens))
            sae.provenance = started_from(sae.provenance)
        if self._run.dictionary is not sae:
            raise ConfigError("fit: this trainer has trained another dictionary; make a new Trainer for this one")
        return self._run

    def _finish(self, run: Run, stopped_by: signal.Signals | None) -> bool:
        """Save the dictionary and, unless none are wanted, a last checkpoint; whether the stream ended early."""
        self._settle(run)
        ended_early = self.cur_step < run.plan.total
        if ended_early and stopped_by is None:
            log.warning("the stream ended at step %d of %d; resume with more data", self.cur_step, run.plan.total)
        saved = self._try_to_save(run) if ended_early or self.cfg.n_checkpoints else False
        if stopped_by is None or not ended_early:
            self._sign(run.dictionary)
            run.dictionary.eval().save_pretrained(self.cfg.exp_result_path)
        if stopped_by is not None:
            self._stopped_by = None
            told = "saved, go on with --resume" if saved else "this step could not be saved"
            message = f"{stopped_by.name}: stopped after step {self.cur_step} of {run.plan.total}; {told}"
            raise Interrupted(message, stopped_by)
        return ended_early

    def go_on_from(self, sae: AbstractSparseAutoEncoder, directory: Path) -> None:
        """Put trainer and dictionary back to a checkpoint that has been verified: it is not verified again."""
        found = resume.load(self.cfg, sae, directory)
        self._source = directory
        self._run, self._stream_state, self.wandb_run_id = found.run, found.stream_state, found.wandb_run_id
        for name in _PROGRESS:
            setattr(self, name, found.progress.get(name, getattr(self, name)))

    def _try_to_save(self, run: Run) -> bool:
        """Save a checkpoint; what the disk has against it is logged, and does not end the run."""
        try:
            self.save_checkpoint(run.dictionary, self.cfg.exp_result_path)
        except OSError as error:
            log.error("step %d: the checkpoint could not be saved (%s); older ones are kept", self.cur_step, error)
            return False
        return True

    def save_checkpoint(self, sae: AbstractSparseAutoEncoder, path: Path | str) -> None:
        """Save everything that training goes on from to `path/checkpoints/step_{cur_step}/`, whole or not at all."""
        run = self._begun("save_checkpoint")
        self._settle(run)
        directory = checkpoint.checkpoint_directory(path, self.cur_step)
        if directory != self._saved:
            progress = {name: getattr(self, name) for name in _PROGRESS}
            progress |= {"batch_tokens": run.plan.batch_tokens, "cfg": self.cfg.to_json()}
            self._sign(sae)
            checkpoint.write(directory, sae, run.board, run.optimizer, progress, self._position(), self.wandb_run_id)
            self._saved = directory
        if self.cfg.keep_last is not None:
            checkpoint.prune(path, run.plan.checkpoints, self.cfg.keep_last, sae.axes.everywhere)

    def _sign(self, sae: AbstractSparseAutoEncoder) -> None:
        """Write down in the dictionary what it has been trained on so far."""
        sae.provenance = record(sae.provenance, self._stream, self.cfg, self.cur_step, self.cur_tokens, self.reported)

    def _position(self) -> dict[str, Any] | None:
        return self._stream.state_dict() if isinstance(self._stream, Stateful) else self._stream_state

    @classmethod
    def from_checkpoint(cls, sae: AbstractSparseAutoEncoder, checkpoint_path: str | Path) -> Self:
        """A trainer that goes on where a checkpoint was made, its settings and the dictionary's weights restored.

        Args:
            sae: a dictionary of the run's config, not folded (`from_pretrained(..., fold_activation_scale=False)`).
            checkpoint_path: a step's directory, or a run's directory for its newest step.
        """
        directory = checkpoint.find_checkpoint(checkpoint_path, sae.axes.everywhere)
        trainer = cls(resume.saved_config(directory).model_copy(update={"from_pretrained_path": str(directory)}))
        trainer.go_on_from(sae, directory)
        return trainer
