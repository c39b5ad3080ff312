"""All that a run measures: its metrics, its dead latents and its pace, over windows that end at reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_saes.axes.axis import ALONE, Axis
from lm_saes.latents.record import Record
from lm_saes.metrics.base import Metric, StepFacts
from lm_saes.training.dead_latents import DeadLatents

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder

Pass = tuple[Record, dict[str, Tensor]]
"""One forward pass and its loss terms."""
_WAITED = "tokens_since_last_activation"
_LOSS_ONLY = frozenset({"Losses"})


class Board:
    """Metrics of a run. With `measuring` off it keeps the loss and the rate alone."""

    def __init__(
        self,
        dictionary: AbstractSparseAutoEncoder,
        *,
        measuring: bool,
        tracking: bool,
        window: int,
        dead_threshold: float,
    ) -> None:
        self.measuring, self.tracking = measuring, tracking
        self.dictionary = dictionary
        self.dead = DeadLatents(dictionary.dead_shape, dead_threshold, dictionary.cfg.device)
        kinds = [m for m in Metric.registry if m.applies(dictionary) and (measuring or m.__name__ in _LOSS_ONLY)]
        self.metrics = [kind(dictionary, window) for kind in kinds]
        self._since = time.perf_counter()
        self._tokens: int | Tensor = 0
        self._any_step: bool | Tensor = False

    def step(
        self,
        passes: list[Pass],
        tokens: int | Tensor,
        gradient_norm: Tensor,
        clipped_norm: Tensor,
        taken: Tensor | None = None,
    ) -> None:
        """Take in one optimizer step of `tokens` valid tokens, and its gradient norms before and after clipping.

        Args:
            taken: whether it was taken (0-d bool), where only the device knows: one that was not leaves no trace.
        """
        if taken is None:
            self._any_step = True
        else:
            self._any_step = self._any_step is True or taken | self._any_step
            tokens = torch.where(taken, tokens, 0)
        self._tokens = self._tokens + tokens
        zero, one = gradient_norm.new_zeros(()), gradient_norm.new_ones(())
        facts = StepFacts(gradient_norm, clipped_norm, one * tokens, zero, zero, one)
        if self.tracking:
            fired = torch.stack([self.dictionary.latent_counts(record) for record, _ in passes]).sum(0)
            fired = self.dictionary.axes.tokens.total(fired)
            fired = fired if taken is None else torch.where(taken, fired, 0)
            facts = replace(facts, n_dead=self.dead.update(fired > 0, tokens).sum(-1), fired_counts=fired)
        for metric in self.metrics:
            metric.taken = taken
            for record, terms in passes:
                metric.observe(record, terms)
            metric.step(facts)

    def report(self) -> dict[str, float]:
        """The metrics of the window that ends now. May wait for the device, so what is known late is refreshed too."""
        self._forget_idle_window()
        self._any_step = False
        self.dead.make_room()
        self.dictionary.density.refresh()
        tokens = float(self._tokens)
        values = {"details/tokens_per_second": tokens / max(time.perf_counter() - self._since, 1e-9)}
        for metric in self.metrics:
            if metric.totals:
                values |= metric.report()
                metric.end_window()
        self.restart_clock()
        return values

    def _forget_idle_window(self) -> None:
        """If no step of this window was taken, its totals say nothing."""
        if not self._any_step:
            for metric in self.metrics:
                metric.end_window()

    def restart_clock(self) -> float:
        """Leave the time until now, and the tokens, out of the rate; the time now, in seconds of `perf_counter`."""
        self._since, self._tokens = time.perf_counter(), 0
        return self._since

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps."""
        self._forget_idle_window()
        yield _WAITED, self.dead.tokens_since_last_activation
        for metric in self.metrics:
            for name, total in metric.state_dict().items():
                yield f"metrics.{type(metric).__name__}.{name}", total

    def adds_over(self, name: str) -> Axis | None:
        """The axis over which processes' tensors of a checkpoint add up; None: each has those of its latents, last."""
        kind, _, total = name.removeprefix("metrics.").partition(".")
        metric = next((metric for metric in self.metrics if type(metric).__name__ == kind), None)
        if metric is None:
            return None if name == _WAITED else ALONE
        return None if total in metric.by_latent else metric.adds_over(total)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        device = self.dead.tokens_since_last_activation.device
        self.dead.tokens_since_last_activation = tensors[_WAITED].to(device)
        self.dead.refresh()
        self.dead.make_room()
        for metric in self.metrics:
            prefix = f"metrics.{type(metric).__name__}."
            metric.load_state_dict(
                {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            )
        self._any_step = any(metric.totals for metric in self.metrics)
