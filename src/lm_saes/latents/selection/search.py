"""One batch's search for what an activation function wants: candidates block by block, then which of them are active.

Each kind of want has its search, which holds what is known of the batch while it lasts.

Letters: N rows, B rows of one block, F latents (of a row), C candidates, E entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.latents.codes import Pattern
from lm_saes.latents.kernels.plain import top_columns
from lm_saes.latents.selection.wants import Above, BestPerToken, Judged, Want

W = TypeVar("W", bound=Want)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch that selection compares: tokens, or (token, site) where each site selects for itself."""

    n_tokens: int
    n_sites: int = 1
    joined: bool = False
    """Whether a row is a token with the latents of all its sites side by side."""
    mask: Tensor | None = None
    """Which tokens count, bool `[tokens]`; None: all."""

    @property
    def per_token(self) -> int:
        """How many rows belong to one token."""
        return 1 if self.joined else self.n_sites

    @property
    def n(self) -> int:
        """How many rows there are."""
        return self.n_tokens * self.per_token

    @cached_property
    def mask_N(self) -> Tensor | None:
        """Which rows count."""
        return self.mask if self.mask is None or self.per_token == 1 else self.mask.repeat_interleave(self.per_token)

    def of(self, tokens: slice) -> slice:
        """The rows of some tokens."""
        return slice(tokens.start * self.per_token, tokens.stop * self.per_token)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The entries of a code, chosen from its candidates."""

    pattern: Pattern
    active_E: Tensor
    """Which of the entries are active."""
    places: Tensor | None = None
    """Which of the candidates the entries are, ascending; None: all of them."""
    in_window_E: Tensor | None = None
    """Entries, active or not, that move their latent's threshold."""

    def of(self, v: Tensor) -> Tensor:
        """What belongs to the entries, of something that each candidate has."""
        return v if self.places is None else v.index_select(0, self.places)


class Search(ABC, Generic[W]):
    """A search through one batch. The patterns that it is shown have a row for each (token, site)."""

    even_sites = False
    """Whether it ends with as many entries of each site as of every other."""

    def __init__(self, want: W, rows: Rows, axes: Axes) -> None:
        self.want, self.rows, self.axes = want, rows, axes

    @property
    def threshold(self) -> tuple[Tensor | None, float]:
        """The logarithm of learnt thresholds, if there are any, and the window of their gradient."""
        return None, 0.0

    @abstractmethod
    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        """Entries of a block that the code may have to hold.

        Bool `[B, F]`; or columns, as many a row, `[B, C]` (int64); or places in the flattened block, ascending, `[X]`.
        """

    def found_enough(self, s_E: Tensor, pattern: Pattern) -> bool:
        """Whether all blocks' candidates hold everything that may be active; if not, it has to look again."""
        return True

    @abstractmethod
    def choose(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        """After the last block: the code's entries among all candidates, and which are active."""

    @abstractmethod
    def active(self, s_NF: Tensor) -> Tensor:
        """The definition: bool `[N, F]`, which entries of the whole batch are active."""


class SearchByToken(Search[BestPerToken]):
    """For the largest of each row."""

    def __init__(self, want: BestPerToken, rows: Rows, axes: Axes) -> None:
        super().__init__(want, rows, axes)
        self.even_sites = not rows.joined

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return top_columns(s_BF, min(self.want.k, s_BF.shape[1]))

    def choose(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        s_NC = s_E.view(self.rows.n, -1)
        best_E = self.axes.latents.top(s_NC, self.want.k).view(-1)
        return Chosen(pattern, best_E & (s_E > self.want.least))

    def active(self, s_NF: Tensor) -> Tensor:
        columns_NC = self.candidates(s_NF, slice(0, len(s_NF)))
        s_NC = s_NF.gather(1, columns_NC)
        best_NC = self.axes.latents.top(s_NC, self.want.k) & (s_NC > self.want.least)
        return torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, columns_NC, best_NC)


class SearchByThreshold(Search[Above]):
    """For what exceeds the threshold of its latent, and while thresholds learn for what lies in their windows."""

    @property
    def threshold(self) -> tuple[Tensor | None, float]:
        return self.want.log_theta, self.want.window

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        if self.want.theta is None:
            return s_BF > 0
        theta_F = self.want.theta.to(s_BF.dtype)
        return s_BF > ((theta_F - self.want.window / 2).clamp(min=0) if self.want.learns else theta_F)

    def choose(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        positive_E = s_E > 0
        if self.want.theta is None:
            return Chosen(pattern, positive_E)
        theta = self.want.theta.to(s_E.dtype)
        theta_E = theta.index_select(0, pattern.indices % len(theta))
        in_window_E = ((s_E - theta_E).abs() < self.want.window / 2) & positive_E
        return Chosen(pattern, positive_E & (s_E > theta_E), in_window_E=in_window_E)

    def active(self, s_NF: Tensor) -> Tensor:
        return s_NF > (0 if self.want.theta is None else self.want.theta.to(s_NF.dtype))


class SearchByRule(Search[Judged]):
    """For what a rule marks."""

    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        return self.want.rule(s_BF, rows)

    def choose(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        return Chosen(pattern, torch.ones_like(s_E, dtype=torch.bool))

    def active(self, s_NF: Tensor) -> Tensor:
        return self.want.rule(s_NF, slice(0, len(s_NF)))
