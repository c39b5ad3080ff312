"""What activation functions want of a batch, as data: `search` finds candidates for it and settles what is active.

Letters: N rows, B rows of one block, S sites, F latents (of a row), P pools.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lm_saes.latents.selection.thresholds import in_units_of_h


@dataclass(frozen=True)
class BestPerToken:
    """The `k` largest `s` of each row; active are those of them that exceed `least`, which is not below 0."""

    k: int
    least: float = 0.0


@dataclass(frozen=True, eq=False)
class BestOfBatch:
    """The `k x rows that count` largest `s` of a batch; active are those of them that exceed `least`, not below 0.

    Rows take turns among the pools, each of which has an equal share of the batch's entries.
    """

    k: int
    known_P: Tensor
    """The smallest `s` that such batches were seen to keep, by pool; 0: not known. It decides where to look first."""
    margin: float = 0.8
    """Candidates are what exceeds this share of it; a miss costs a second look, never exactness."""
    observe: Callable[[Tensor], None] | None = None
    """Told the smallest `s` that is kept of each pool, `[P]` float32; infinite where none is."""
    least: float = 0.0


@dataclass(frozen=True, eq=False)
class Above:
    """What exceeds its latent's threshold `theta = exp(log_theta)`, or 0 without one.

    The gradient of the thresholds is that of a window around them: entries with `|s - theta| < window / 2` and `s > 0`
    move theirs, active or not.
    """

    log_theta: Tensor | None = None
    """`[F]`, or `[S, F]`; float32."""
    window: float = 0.0
    learns: bool = False
    """Whether entries of the window that are not active are wanted too."""

    k = None

    @cached_property
    def theta(self) -> Tensor | None:
        """The thresholds of a row, in the units of `s`."""
        return None if self.log_theta is None else self.log_theta.detach().exp().view(-1)

    @torch.no_grad()
    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where the `h` of each latent is cut (in the type of `like_F`).

        Active is what exceeds the first bound; what lies strictly between the others moves the latent's threshold.
        """
        if self.theta is None:
            return in_units_of_h(torch.zeros_like(like_F), scale_F), None, None
        theta_F, half = self.theta.to(like_F.dtype), self.window / 2
        above, low, high = (
            in_units_of_h(s_F, scale_F) for s_F in (theta_F, (theta_F - half).clamp(min=0), theta_F + half)
        )
        return above, low, high


@dataclass(frozen=True, eq=False)
class Judged:
    """What a rule marks: bool `[B, F]` of a block of `s` and of the numbers of its rows."""

    rule: Callable[[Tensor, slice], Tensor]
    k: float | None = None
    """How many entries of a row that is about, if it is known."""


Want = BestPerToken | BestOfBatch | Above | Judged
"""`k` says how many entries of a row the code has to hold, about; None: that depends on the batch."""


def by_row(value_P: Tensor, s_BF: Tensor) -> Tensor:
    """A value of each pool as one of each row (rows take turns among the pools), or the one value itself."""
    value_P = value_P.to(s_BF.dtype)
    return value_P if value_P.numel() == 1 else value_P.repeat(len(s_BF) // len(value_P))[:, None]
