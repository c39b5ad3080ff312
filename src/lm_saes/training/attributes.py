"""What a trainer shows of its run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm_saes.metrics.base import Metric
from lm_saes.training.run import Run


class RunAttributes:
    """Attributes that are there once a run has begun."""

    _run: Run | None

    @property
    def total_training_steps(self) -> int:
        """Steps of the whole run (0 until it is known)."""
        return 0 if self._run is None else self._run.plan.total

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, with one named group per parameter."""
        return None if self._run is None else self._run.optimizer

    @property
    def scheduler(self) -> Callable[[int], float] | None:
        """The learning rate's factor as a function of the completed updates."""
        return None if self._run is None else self._run.plan.learning_rate_factor

    @property
    def metrics(self) -> list[Metric]:
        """What is being measured."""
        return [] if self._run is None else self._run.board.metrics

    @property
    def tokens_since_last_activation(self) -> Tensor | None:
        """Valid tokens since each latent was last active."""
        return None if self._run is None else self._run.board.dead.tokens_since_last_activation

    @property
    def is_dead(self) -> Tensor | None:
        """Which latents are dead."""
        return None if self._run is None else self._run.board.dead.is_dead
