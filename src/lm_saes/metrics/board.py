"""All that a run measures: its metrics, its dead latents and its pace, over windows that end at reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_saes.dictionaries.record import Record
from lm_saes.metrics.base import Metric, StepFacts
from lm_saes.training.dead_latents import DeadLatents

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder

Pass = tuple[Record, dict[str, Tensor]]
"""One forward pass and its loss terms."""
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
        self._tokens = 0

    def step(self, passes: list[Pass], tokens: int, gradient_norm: Tensor, clipped_norm: Tensor) -> None:
        """Take in one optimizer step of `tokens` valid tokens, and its gradient norms before and after clipping."""
        self._tokens += tokens
        zero = gradient_norm.new_zeros(())
        facts = StepFacts(gradient_norm, clipped_norm, gradient_norm.new_tensor(tokens), zero, zero)
        if self.tracking:
            fired = torch.stack([self.dictionary.latent_counts(record) for record, _ in passes]).sum(0)
            fired = self.dictionary.axes.tokens.total(fired)
            facts = replace(facts, n_dead=self.dead.update(fired > 0, tokens).sum(-1), fired_counts=fired)
        for metric in self.metrics:
            for record, terms in passes:
                metric.observe(record, terms)
            metric.step(facts)

    def report(self) -> dict[str, float]:
        """The metrics of the window that ends now."""
        now = time.perf_counter()
        values = {"details/tokens_per_second": self._tokens / max(now - self._since, 1e-9)}
        for metric in self.metrics:
            if metric.totals:
                values |= metric.report()
                metric.end_window()
        self.restart_clock()
        return values

    def restart_clock(self) -> float:
        """Leave the time until now, and the tokens, out of the rate; the time now, in seconds of `perf_counter`."""
        self._since, self._tokens = time.perf_counter(), 0
        return self._since

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps."""
        yield "tokens_since_last_activation", self.dead.tokens_since_last_activation
        for metric in self.metrics:
            for name, total in metric.state_dict().items():
                yield f"metrics.{type(metric).__name__}.{name}", total

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        device = self.dead.tokens_since_last_activation.device
        self.dead.tokens_since_last_activation = tensors["tokens_since_last_activation"].to(device)
        self.dead.refresh()
        for metric in self.metrics:
            prefix = f"metrics.{type(metric).__name__}."
            metric.load_state_dict(
                {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            )
