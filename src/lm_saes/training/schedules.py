"""Schedules are pure functions of the step: nothing to save, nothing to lose at resume.

`t` is the number of updates completed before the one that a value is for.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from lm_saes.choices import Choice
from lm_saes.config import BaseConfig

Steps = int | float
"""A float in [0, 1] is a fraction of all steps; an int is a number of steps."""


def as_steps(value: Steps, total: int) -> int:
    """A float in [0, 1] is a fraction of the total; an int is a number of steps."""
    return round(value * total) if isinstance(value, float) else value


class RateSchedule(Choice):
    """The learning rate's factor as a function of the step. Its fields are its settings."""

    registry: ClassVar[dict[str, type[RateSchedule]]] = {}
    noun = "rate schedule"

    @abstractmethod
    def factor(self, t: int, total: int) -> float:
        """The factor at step `t` of `total`."""


class EndSettings(BaseConfig):
    """What schedules that fall have in common."""

    lr_end_ratio: float = Field(default=1 / 32, ge=0, le=1)
    """What the learning rate ends at, as a share of the full rate."""


class WarmUpSettings(BaseConfig):
    """What schedules that rise first have in common."""

    lr_warm_up_steps: Steps = 5000
    """Steps over which the learning rate rises."""


class CoolDownSettings(BaseConfig):
    """What schedules that fall at the end alone have in common."""

    lr_cool_down_steps: Steps = 0.2
    """Steps over which it falls at the end."""


class Constant(RateSchedule):
    """1."""

    name = "constant"

    def factor(self, t: int, total: int) -> float:
        return 1.0


class ConstantWithWarmUp(CoolDownSettings, WarmUpSettings, EndSettings, RateSchedule):
    """`min(1, (t+1)/w, r + (1-r)(T-t)/c)`: T steps, of which w rise and c fall (0: none), to the end ratio r."""

    name = "constantwithwarmup"

    def factor(self, t: int, total: int) -> float:
        w, c = as_steps(self.lr_warm_up_steps, total), as_steps(self.lr_cool_down_steps, total)
        rise = (t + 1) / w if w else 1.0
        fall = self.lr_end_ratio + (1 - self.lr_end_ratio) * (total - t) / c if c else 1.0
        return min(1.0, rise, fall)


class CosineAnnealing(EndSettings, RateSchedule):
    """`r + (1-r)(1 + cos(pi t/T))/2`."""

    name = "cosineannealing"

    def factor(self, t: int, total: int) -> float:
        return _cosine(t / total, self.lr_end_ratio)


class _RiseAndFall(WarmUpSettings, EndSettings, RateSchedule):
    """`(t+1)/w` for w steps, then a way down."""

    @abstractmethod
    def fall(self, gone: int, steps: int) -> float:
        """The factor when so many of the steps down are gone."""

    def factor(self, t: int, total: int) -> float:
        w = as_steps(self.lr_warm_up_steps, total)
        return (t + 1) / w if t < w else self.fall(t - w, max(1, total - w))


class LinearWarmUpDecay(_RiseAndFall):
    """`(t+1)/w`, then `r + (1-r)(T-t)/(T-w)`."""

    name = "linearwarmupdecay"

    def fall(self, gone: int, steps: int) -> float:
        return self.lr_end_ratio + (1 - self.lr_end_ratio) * (steps - gone) / steps


class CosineAnnealingWarmUp(_RiseAndFall):
    """`(t+1)/w`, then the cosine of `(t-w)/(T-w)`."""

    name = "cosineannealingwarmup"

    def fall(self, gone: int, steps: int) -> float:
        return _cosine(gone / steps, self.lr_end_ratio)


class ExponentialWarmUp(_RiseAndFall):
    """`(t+1)/w`, then `r^((t-w)/(T-w))`."""

    name = "exponentialwarmup"

    def fall(self, gone: int, steps: int) -> float:
        return self.lr_end_ratio ** (gone / steps)


def _cosine(share: float, end_ratio: float) -> float:
    return end_ratio + (1 - end_ratio) * (1 + math.cos(math.pi * share)) / 2


def coefficient(target: float | None, t: int, warm_up: int) -> float:
    """The sparsity coefficient: from 0 to `target` in `warm_up` steps, linearly; None: constant 1."""
    if target is None:
        return 1.0
    return target * min(1.0, t / warm_up) if warm_up else target


def active_k(
    t: int, top_k: int, initial_k: float | None, cold: int, warm_up: int, kind: str = "linear", factor: float = 3.0
) -> int:
    """The k of the top-k family: `initial_k` for `cold` steps, then down to `top_k` in `warm_up` steps; rounded up.

    With u = min(1, (t - cold)/warm_up): linear `k0 + (k - k0) u`; exponential
    `k0 - (k0 - k)(1 - e^(-a u))/(1 - e^(-a))` with a = `factor`.
    """
    if initial_k is None:
        return top_k
    if t < cold:
        return max(top_k, math.ceil(initial_k))
    u = min(1.0, (t - cold) / warm_up) if warm_up else 1.0
    share = u if kind == "linear" else (1 - math.exp(-factor * u)) / (1 - math.exp(-factor))
    value = initial_k - (initial_k - top_k) * share
    return max(top_k, math.ceil(value - 1e-9))


def checkpoint_steps(n: int, total: int, mode: str) -> list[int]:
    """At which steps to save besides the end: `ceil(T^(i/n))` ("log") or `floor(iT/n)` ("linear"), i = 1..n-1."""
    if mode == "log":
        steps = {math.ceil(total ** (i / n) - 1e-9) for i in range(1, n)}
    else:
        steps = {i * total // n for i in range(1, n)}
    return sorted(step for step in steps if 0 < step < total)
