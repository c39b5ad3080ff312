"""The training loop: `fit` says when, `_update` says what. `cur_step` counts completed updates, everywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.peek import Peekable, peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import ConfigError, TrainingError
from lm_saes.losses.objective import objective
from lm_saes.metrics.base import Metric, StepFacts
from lm_saes.metrics.board import Board, Pass
from lm_saes.training import checkpoint
from lm_saes.training.config import TrainerConfig
from lm_saes.training.dead_latents import fired_latents
from lm_saes.training.loggers.base import Logger, Loggers
from lm_saes.training.loggers.run import RunLogger
from lm_saes.training.optim import build_optimizer, clip_gradients, gradient_norm
from lm_saes.training.plan import Plan, check_settings, make_plan
from lm_saes.training.precision import mixed_precision

__all__ = ["Trainer", "TrainerConfig"]
log = logging.getLogger(__name__)

EvalFn = Callable[[AbstractSparseAutoEncoder], Mapping[str, float] | None]


class Trainer:
    """Trains a dictionary on a stream of activations.

    The order of a step: forward, loss and backward of each micro-batch, clip, optimizer, count, metrics; then report,
    evaluate, save. Schedules are functions of the number of updates completed before the step.
    """

    def __init__(self, cfg: TrainerConfig) -> None:
        self.cfg = cfg
        self.cur_step = self.cur_tokens = self.skipped_steps = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.wandb_run_id: str | None = None
        self.stream_state: dict[str, Any] | None = None
        self._plan: Plan | None = None
        self._board: Board | None = None

    # -- the loop --------------------------------------------------------------------------------------------------

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
            eval_fn: called every `eval_frequency` steps, with the dictionary in evaluation mode; what it returns is logged.
            wandb_logger: a W&B run (anything with `log(metrics, step=...)`).
            loggers: where progress and reports go.

        Returns:
            Whether the stream ended before the last step (a resumable checkpoint is saved all the same).

        Raises:
            ConfigError: settings that do not fit this dictionary or stream.
            DataError: a batch that is not what it should be.
            TrainingError: a loss or gradient that is not finite.
        """
        stream = peekable(activation_stream)
        plan, board = self._prepare(sae, stream)
        loggers = Loggers([loggers] if loggers else [], [RunLogger(wandb_logger)] if wandb_logger is not None else [])
        loggers.start(plan.total, self.cur_step)
        self.wandb_run_id = loggers.run_id or self.wandb_run_id
        try:
            summary = self._loop(sae, stream, plan, board, eval_fn, loggers)
        except BaseException:
            loggers.close({})
            raise
        ended_early = self.cur_step < plan.total
        if ended_early:
            log.warning("the stream ended at step %d of %d; with more data it can be resumed", self.cur_step, plan.total)
        if ended_early or self.cfg.n_checkpoints:
            self.save_checkpoint(sae, self.cfg.exp_result_path)
        sae.eval().save_pretrained(self.cfg.exp_result_path)
        loggers.close(summary)
        return ended_early

    def _loop(
        self,
        sae: AbstractSparseAutoEncoder,
        stream: Peekable,
        plan: Plan,
        board: Board,
        eval_fn: EvalFn | None,
        loggers: Loggers,
    ) -> dict[str, float]:
        """Step, report, evaluate and save until the end; the last value of everything that was reported."""
        summary: dict[str, float] = {}
        saved = time.monotonic()
        board.restart_clock()
        sae.train()
        while self.cur_step < plan.total and (batches := self._next(stream)):
            self._update(sae, batches, plan, board)
            self.stream_state = stream.state_dict() if hasattr(stream, "state_dict") else None  # type: ignore[attr-defined]
            loggers.advance(self.cur_step)
            report = board.report() | self._details(plan) if self._due(self.cfg.log_frequency) else {}
            if eval_fn is not None and self._due(self.cfg.eval_frequency):
                report |= eval_fn(sae.eval()) or {}
                sae.train()
                board.restart_clock()
            if report:
                loggers.report(self.cur_step, report)
                summary |= report
            if self.cur_step in plan.checkpoints or self._overdue(saved):
                self.save_checkpoint(sae, self.cfg.exp_result_path)
                saved = time.monotonic()
                board.restart_clock()
        return summary

    def _due(self, frequency: int) -> bool:
        return self.cur_step % frequency == 0 or self.cur_step == self.total_training_steps

    def _overdue(self, saved: float) -> bool:
        return self.cfg.save_every_minutes is not None and time.monotonic() - saved > 60 * self.cfg.save_every_minutes

    def _next(self, stream: Peekable) -> list[Batch]:
        """The micro-batches of one step; fewer, or none, at the end of the stream."""
        batches: list[Batch] = []
        while len(batches) < self.cfg.gradient_accumulation_steps and (batch := next(stream, None)) is not None:
            check_batch(batch, self._widths)
            batches.append(batch)
        return batches

    def _update(self, sae: AbstractSparseAutoEncoder, batches: list[Batch], plan: Plan, board: Board) -> None:
        """One optimizer step: gradients of sums over the micro-batches, divided once by the step's valid tokens."""
        assert self.optimizer is not None
        t = self.cur_step
        settings = plan.loss_settings(t)
        if sae.current_k is not None:
            sae.set_current_k(plan.k(t, sae.cfg.top_k))
        counts = [int(b["tokens"].numel() if b.get("mask") is None else b["mask"].sum()) for b in batches]
        passes: list[Pass] = []
        for batch, count in zip(batches, counts, strict=True):
            on_device = {
                k: v.to(sae.cfg.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
            }
            with mixed_precision(self.cfg.amp_dtype, sae.cfg.device):
                record = sae.record(on_device)
                terms = objective(sae, record, settings, board.dead.is_dead)
            (terms["loss"] if len(batches) == 1 else terms["loss"] * (count / sum(counts))).backward()
            passes.append((record, {name: value.detach() for name, value in terms.items()}))
        before = (
            gradient_norm(sae) if board.measuring or self.cfg.clip_grad_norm else passes[0][1]["loss"].new_zeros(())
        )
        after = clip_gradients(sae, before, self.cfg.clip_grad_norm) if self.cfg.clip_grad_norm else before
        finite = self._check_finite(passes, before, batches)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * plan.learning_rate_factor(t)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.cur_step += 1
        self.cur_tokens += sum(counts)
        if finite:
            zero = before.new_zeros(())
            board.step(passes, StepFacts(before, after, before.new_tensor(sum(counts)), zero, zero), sum(counts))

    def _check_finite(self, passes: list[Pass], norm: Tensor, batches: list[Batch]) -> bool:
        """Whether the step may be taken; if not, stop the run or count the step as skipped."""
        values = {name: value for _, terms in passes for name, value in terms.items()} | {"gradient norm": norm}
        bad = [name for name, value in values.items() if not bool(torch.isfinite(value))]
        if not bad:
            return True
        if self.cfg.on_non_finite == "stop":
            hook = next(iter(self._widths))
            x = torch.cat([b[hook].float().flatten() for b in batches])
            raise TrainingError(
                f"step {self.cur_step + 1}: {', '.join(bad)} not finite; {hook} has mean {x.mean():.4g}, std {x.std():.4g}, "
                f"largest {x.abs().max():.4g}; lower lr, set clip_grad_norm, or set on_non_finite='skip'"
            )
        self.skipped_steps += 1
        return False

    def _details(self, plan: Plan) -> dict[str, float]:
        t = self.cur_step - 1
        settings = plan.loss_settings(t)
        rate = max(group["base_lr"] for group in self.optimizer.param_groups) if self.optimizer else 0.0
        skipped = {"details/skipped_steps": float(self.skipped_steps)} if self.skipped_steps else {}
        return {
            "details/current_learning_rate": rate * plan.learning_rate_factor(t),
            "details/n_training_tokens": float(self.cur_tokens),
            "details/l1_coefficient": settings.l1_coefficient if settings.sparsity_loss_type else 0.0,
            "details/lp_coefficient": settings.lp_coefficient,
            "details/auxk_coefficient": settings.auxk_coefficient,
            **skipped,
        }

    # -- set-up and state ------------------------------------------------------------------------------------------

    def _prepare(self, sae: AbstractSparseAutoEncoder, stream: Peekable) -> tuple[Plan, Board]:
        self._widths = dict.fromkeys(sae.cfg.associated_hook_points, sae.cfg.d_model)
        check_settings(self.cfg, sae)
        if self.cfg.from_pretrained_path is not None and self.optimizer is None:
            self._resume(sae, self.cfg.from_pretrained_path)
        if self.stream_state is not None and hasattr(stream, "load_state_dict"):
            stream.load_state_dict(self.stream_state)  # type: ignore[attr-defined]
        elif self.cur_step:
            log.warning("resuming at step %d from a plain iterable: it must yield the remaining batches", self.cur_step)
        if self._plan is None:
            first = stream.peek(1)
            if not first:
                raise ConfigError("activation_stream: yields no batch to train on")
            check_batch(first[0], self._widths)
            self._plan = make_plan(self.cfg, first[0]["tokens"].numel() * self.cfg.gradient_accumulation_steps)
        return self._plan, self._set_up(sae)

    def _set_up(self, sae: AbstractSparseAutoEncoder) -> Board:
        if self.optimizer is None or self._board is None:
            self.optimizer = build_optimizer(self.cfg, sae)
            measuring = not self.cfg.skip_metrics_calculation
            self._board = Board(
                sae,
                measuring=measuring,
                tracking=measuring or bool(self.cfg.auxk_coefficient),
                window=self.cfg.feature_sampling_window,
                dead_threshold=self.cfg.dead_threshold,
            )
        return self._board

    def _resume(self, sae: AbstractSparseAutoEncoder, path: str | Path) -> None:
        directory = checkpoint.find_checkpoint(path)
        progress = checkpoint.read_json(directory / "trainer.json")
        self._plan = Plan(self.cfg, progress["total_training_steps"])
        self.cur_step, self.cur_tokens = progress["cur_step"], progress["cur_tokens"]
        self.skipped_steps = progress["skipped_steps"]
        board = self._set_up(sae)
        assert self.optimizer is not None
        checkpoint.read_tensors(directory, sae, board, self.optimizer)
        self.stream_state, self.wandb_run_id = checkpoint.read_stream(directory), checkpoint.read_run_id(directory)

    def save_checkpoint(self, sae: AbstractSparseAutoEncoder, path: Path | str) -> None:
        """Save everything that training goes on from to `path/checkpoints/step_{cur_step}/`, whole or not at all."""
        plan, board, optimizer = self._plan, self._board, self.optimizer
        if plan is None or board is None or optimizer is None:
            raise ConfigError("save_checkpoint: nothing was trained yet; call fit first")
        directory = checkpoint.checkpoint_directory(path, self.cur_step)
        if not (directory / "manifest.json").exists():
            progress = {"cur_step": self.cur_step, "cur_tokens": self.cur_tokens, "skipped_steps": self.skipped_steps,
                        "total_training_steps": plan.total, "cfg": self.cfg.to_json()}  # fmt: skip
            checkpoint.write(directory, sae, board, optimizer, progress, self.stream_state, self.wandb_run_id)
        if self.cfg.keep_last is not None:
            checkpoint.prune(path, plan.checkpoints, self.cfg.keep_last)

    @classmethod
    def from_checkpoint(cls, sae: AbstractSparseAutoEncoder, checkpoint_path: str | Path) -> Self:
        """A trainer that goes on where a checkpoint was made, its settings and the dictionary's weights restored.

        Args:
            sae: a dictionary of the run's config, not folded (`from_pretrained(..., fold_activation_scale=False)`).
            checkpoint_path: a step's directory, or a run's directory for its newest step.
        """
        directory = checkpoint.find_checkpoint(checkpoint_path)
        trainer = cls(TrainerConfig.model_validate(checkpoint.read_json(directory / "trainer.json")["cfg"]))
        trainer.cfg.from_pretrained_path = str(directory)
        trainer._resume(sae, directory)
        return trainer

    def update_dead_statistics(self, feature_acts: Tensor, mask: Tensor | None, specs: tuple[str, ...]) -> Tensor:
        """Count dense latents as one step; returns which latents are dead now.

        Args:
            feature_acts: latents, `specs` naming their dimensions (of `batch context layers heads sae`).
            mask: valid tokens.
        """
        if self._board is None:
            raise ConfigError("update_dead_statistics: nothing was trained yet; call fit first")
        return self._board.dead.update(*fired_latents(feature_acts, mask, specs))

    @property
    def total_training_steps(self) -> int:
        """Steps of the whole run (0 until it is known)."""
        return 0 if self._plan is None else self._plan.total

    @property
    def scheduler(self) -> Callable[[int], float] | None:
        """The learning rate's factor as a function of the completed updates."""
        return None if self._plan is None else self._plan.learning_rate_factor

    @property
    def metrics(self) -> list[Metric]:
        """What is being measured."""
        return [] if self._board is None else self._board.metrics

    @property
    def tokens_since_last_activation(self) -> Tensor | None:
        """Valid tokens since each latent was last active."""
        return None if self._board is None else self._board.dead.tokens_since_last_activation

    @property
    def is_dead(self) -> Tensor | None:
        """Which latents are dead."""
        return None if self._board is None else self._board.dead.is_dead
