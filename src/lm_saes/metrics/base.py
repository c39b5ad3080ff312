"""The contract between a metric and the trainer."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lm_saes.axes.axis import ALONE, Axes, Axis
from lm_saes.latents.record import Record


class MeasuredSettings(Protocol):
    """Of a dictionary's settings, what metrics ask for."""

    @property
    def hook_points_written(self) -> Sequence[str]:
        """The hook points that are reconstructed, one a site."""
        ...


class MeasuredActivation(Protocol):
    """Of an activation function, what metrics ask for."""

    @property
    def log_threshold(self) -> Tensor | None:
        """Logarithms of learnt thresholds, if there are any."""
        ...


class Measured(Protocol):
    """What metrics ask of a dictionary."""

    latent_dimensions: ClassVar[tuple[str, ...]]
    """Names of the dimensions of dense latents after those of tokens."""
    averages_sites: ClassVar[bool]
    """Whether several sites of one latent are averaged over, not added up, in L0."""
    has_encoder_norm: ClassVar[bool]
    """Whether each latent has an encoder direction."""

    @property
    def cfg(self) -> MeasuredSettings:
        """Its settings."""
        ...

    @property
    def axes(self) -> Axes:
        """What its latents and batches are parts of."""
        ...

    @property
    def activation_function(self) -> MeasuredActivation:
        """What makes latents of pre-activations."""
        ...

    @property
    def current_k(self) -> int | None:
        """The k in force, where there is one."""
        ...

    def encoder_norm(self) -> Tensor:
        """Norm of each latent's encoder direction."""
        ...

    def decoder_norm(self) -> Tensor:
        """Norm of each latent's decoder direction."""
        ...

    def decoder_bias_norm(self) -> Tensor:
        """Norm of the decoder bias."""
        ...


@dataclass(frozen=True)
class StepFacts:
    """What an optimizer step knows beyond its records."""

    gradient_norm_before_clipping: Tensor
    gradient_norm: Tensor
    n_tokens: Tensor
    """Valid tokens of this step."""
    n_dead: Tensor
    """How many of these latents are dead after it (0-d; of a cross-layer transcoder `[L]`, by layer)."""
    fired_counts: Tensor
    """On how many valid tokens each of these latents was active in this step, `[F]` (`[L, F]`)."""
    one: Tensor
    """1, to count steps with (0-d, where the other numbers are)."""


class Metric(ABC):
    """Totals in float64, updated on the device without waiting for it; read only at a report.

    `observe` sees this process's part of the batch and of the latents, and adds up over that; `step` is told facts of
    the whole batch (still of these latents).
    """

    of_tokens: ClassVar[bool] = True
    """Whether totals are sums over tokens (those of `observe`), not facts of whole batches (those of `step`)."""
    of_latents: ClassVar[frozenset[str]] = frozenset()
    """Totals that are sums over latents."""
    by_latent: ClassVar[frozenset[str]] = frozenset()
    """Totals of `step` that have an entry for each latent, in their last dimension."""
    registry: ClassVar[list[type[Metric]]] = []

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            Metric.registry.append(cls)

    def __init__(self, dictionary: Measured, window: int) -> None:
        self.dictionary, self.window = dictionary, window
        self.totals: dict[str, Tensor] = {}
        self.taken: Tensor | None = None
        """Whether the step that is being taken in counts (0-d bool), where only the device knows; None: it does."""

    @classmethod
    def applies(cls, dictionary: Measured) -> bool:
        """Whether the metric makes sense for this dictionary."""
        return True

    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take in one forward pass."""

    def step(self, facts: StepFacts) -> None:  # noqa: B027
        """Take in one optimizer step."""

    @abstractmethod
    def report(self) -> dict[str, float]:
        """The values of the window that ends now; only called if something was taken in."""

    def collected(self) -> dict[str, Tensor]:
        """The totals, over the whole batches and all latents. Every process has to ask."""
        return {name: self.adds_over(name).total(total) for name, total in self.totals.items()}

    def adds_over(self, name: str) -> Axis:
        """The axis over which the processes' values of a total add up to the whole."""
        axes = self.dictionary.axes
        if name in self.of_latents:
            return axes.batch if self.of_tokens else axes.latents
        return axes.tokens if self.of_tokens else ALONE

    def end_window(self) -> None:
        """Begin the next window; called after every report."""
        self.totals = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add to a running total; a step that was left out adds nothing."""
        value = self._taken(value.detach().to(torch.float64), 0.0)
        known = self.totals.get(name)
        self.totals[name] = value.clone() if known is None else known.to(value.device) + value

    def largest(self, name: str, value: Tensor) -> None:
        """Keep the largest of a window, steps that were left out aside."""
        value = self._taken(value.detach().to(torch.float64), -math.inf)
        known = self.totals.get(name)
        self.totals[name] = value.clone() if known is None else torch.maximum(known.to(value.device), value)

    def _taken(self, value: Tensor, otherwise: float) -> Tensor:
        return value if self.taken is None else torch.where(self.taken, value, otherwise)

    def state_dict(self) -> dict[str, Tensor]:
        """The totals, for a checkpoint."""
        return dict(self.totals)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved totals; each moves to the device that it is added up on."""
        self.totals = dict(state)
