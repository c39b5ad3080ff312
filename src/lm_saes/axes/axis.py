"""Axes: the only place where mathematics meets latents, or tokens, that live in another process.

A run over several processes cuts its latents along one axis, its batches along another and a crosscoder's heads along a
third (DeviceMesh's `"model"`, `"data"` and `"head"`). Dictionaries, losses and metrics ask the axis for what concerns
all of it, and never know whether there is anything elsewhere: the axes of this file have one process each, and
`parallel/` replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

DRAWN_LATENTS = 1024
"""Fresh weights are drawn so many latents at a time, so that a process can skip those that are not its own."""


class Axis:
    """An axis with one process: there is no elsewhere."""

    size: int = 1
    """How many processes share the axis."""
    place: int = 0
    """Which of them this one is."""

    def enter(self, x: Tensor) -> Tensor:
        """Hand a replicated tensor to what is cut along the axis: identity forward, sum of gradients backward."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """Collect what the processes' parts add up to: sum forward, identity backward."""
        return y

    def beside(self, own: Tensor) -> Tensor:
        """The processes' parts, all of one shape, side by side in the first dimension; backward: each its own again."""
        return own

    def total(self, v: Tensor) -> Tensor:
        """Sum over the axis, without a gradient."""
        return v

    def count(self, n: int) -> int:
        """Sum over the axis of a number that the host knows."""
        return n

    def fewest(self, n: int) -> int:
        """Smallest over the axis of a number that the host knows."""
        return n

    def add_up(self, own: Tensor) -> Callable[[], object]:
        """Begin to replace a contiguous tensor by its sum over the axis; calling what is returned waits for the end."""
        return lambda: None

    def smallest(self, v: Tensor) -> Tensor:
        """Smallest value over the axis, without a gradient."""
        return v

    def top(self, candidates_RC: Tensor, k: int, limit: Tensor | None = None) -> Tensor:
        """Which candidates are among the k largest of their row over the axis: bool `[R, C]`, in all exactly k a row
        (or all, if there are fewer). Processes may bring different numbers of candidates.

        With `limit` (0-d) no more than so many, which then nobody has to know but the device.
        """
        if candidates_RC.shape[1] <= k and limit is None:
            return torch.ones_like(candidates_RC, dtype=torch.bool)
        k = min(k, candidates_RC.shape[1])
        chosen = candidates_RC.topk(k, dim=1, sorted=limit is not None).indices
        top_RC = torch.zeros_like(candidates_RC, dtype=torch.bool)
        if limit is None:
            return top_RC.scatter_(1, chosen, True)
        return top_RC.scatter_(1, chosen, (torch.arange(k, device=chosen.device) < limit).expand_as(chosen))

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order of their places."""
        return rows

    def draw(self, out_FX: Tensor, fill: Callable[[Tensor], object], runs: list[int] | None = None) -> None:
        """Fill weights, latents first, with random numbers: the same for a latent however the latents are cut.

        Args:
            fill: draws one block `[at most DRAWN_LATENTS, ...]` in place, from torch's global generator.
            runs: lengths of the stretches of latents that are each cut evenly (a mixture of transforms cuts each rank);
                None: all are one.
        """
        for own_FX in out_FX.split(out_FX.shape[0] if runs is None else [n // self.size for n in runs]):
            n_latents = len(own_FX) * self.size
            for start in range(0, n_latents, DRAWN_LATENTS):
                block = own_FX.new_empty(min(DRAWN_LATENTS, n_latents - start), *own_FX.shape[1:])
                fill(block)
                first = self.place * len(own_FX)
                low, high = max(start, first), min(start + len(block), first + len(own_FX))
                if low < high:
                    own_FX[low - first : high - first] = block[low - start : high - start]


ALONE = Axis()
"""For what is asked without a dictionary, by one process."""


@dataclass(frozen=True)
class Axes:
    """The axes of a dictionary."""

    latents: Axis = field(default_factory=Axis)
    """Along which latents are cut."""
    tokens: Axis = field(default_factory=Axis)
    """Along which batches are cut."""
    sites: Axis = field(default_factory=Axis)
    """Along which the weights of sites are cut; codes, reconstructions and losses are of all sites in each process."""
    batch: Axis = field(default_factory=Axis)
    """The processes whose latents and tokens make up one batch's code: those of `latents` and `tokens`."""
    everywhere: Axis = field(default_factory=Axis)
    """All processes."""

    def of_whole_batches(self) -> Axes:
        """The axes to use while every process sees the whole batch: initialisation, evaluation."""
        return replace(self, tokens=ALONE, batch=self.latents)
