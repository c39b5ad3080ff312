"""Schedules are pure functions of the step: nothing to save, nothing to lose at resume.

`t` is the number of updates completed before the one that a value is for.
"""

from __future__ import annotations

import math

from lm_saes.errors import ConfigError


def as_steps(value: int | float, total: int) -> int:
    """A float in [0, 1] is a fraction of the total; an int is a number of steps."""
    return round(value * total) if isinstance(value, float) else value


def learning_rate_factor(name: str, t: int, total: int, warm_up: int, cool_down: int, end_ratio: float) -> float:
    """The factor of the learning rate at step `t`.

    With w = `warm_up`, c = `cool_down`, r = `end_ratio`, T = `total` (w = 0 or c = 0: no such phase):
    constant `1`; constantwithwarmup `min(1, (t+1)/w, r + (1-r)(T-t)/c)`; linearwarmupdecay `(t+1)/w`, then
    `r + (1-r)(T-t)/(T-w)`; cosineannealing `r + (1-r)(1 + cos(pi t/T))/2`; cosineannealingwarmup `(t+1)/w`, then the
    cosine of `(t-w)/(T-w)`; exponentialwarmup `(t+1)/w`, then `r^((t-w)/(T-w))`.

    Raises:
        ConfigError: an unknown name.
    """

    def cosine(share: float) -> float:
        return end_ratio + (1 - end_ratio) * (1 + math.cos(math.pi * share)) / 2

    if name == "constant":
        return 1.0
    if name == "constantwithwarmup":
        rise = (t + 1) / warm_up if warm_up else 1.0
        fall = end_ratio + (1 - end_ratio) * (total - t) / cool_down if cool_down else 1.0
        return min(1.0, rise, fall)
    if name == "cosineannealing":
        return cosine(t / total)
    if t < warm_up and name in {"linearwarmupdecay", "cosineannealingwarmup", "exponentialwarmup"}:
        return (t + 1) / warm_up
    rest = max(1, total - warm_up)
    if name == "linearwarmupdecay":
        return end_ratio + (1 - end_ratio) * (total - t) / rest
    if name == "cosineannealingwarmup":
        return cosine((t - warm_up) / rest)
    if name == "exponentialwarmup":
        return end_ratio ** ((t - warm_up) / rest)
    raise ConfigError(f"lr_scheduler_name={name!r}: not a schedule")


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
