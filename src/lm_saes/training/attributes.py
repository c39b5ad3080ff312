"""What a trainer shows of its run, and lets others count in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.metrics.base import Metric
from lm_saes.training.dead_latents import fired_latents
from lm_saes.training.run import Run


class RunAttributes:
    """What is there once a run has begun."""

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

    def update_dead_statistics(self, feature_acts: Tensor, mask: Tensor | None, specs: tuple[str, ...]) -> Tensor:
        """Count dense latents as one step; returns which latents are dead now.

        Args:
            feature_acts: latents, `specs` naming their dimensions (of `batch context layers heads sae`).
            mask: valid tokens.
        """
        return self._begun("update_dead_statistics").board.dead.update(*fired_latents(feature_acts, mask, specs))

    def _begun(self, what: str) -> Run:
        if self._run is None:
            raise ConfigError(f"{what}: nothing was trained yet; call fit first")
        return self._run
