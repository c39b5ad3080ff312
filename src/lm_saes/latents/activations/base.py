"""What every activation function is: a dense definition and, for the sparse path, candidates block by block.

A code's rows are tokens, or (token, site) where a dictionary has several sites (layers, heads). Most activation
functions look at rows; those that let sites compete (`joins_sites`) see one row per token with all sites side by side.

Letters: N rows, B rows of one block, S sites, F latents (of a row), C candidates, E entries.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lm_saes.axes.axis import Axes
from lm_saes.latents.activations.thresholds import scaled
from lm_saes.latents.codes import Pattern
from lm_saes.latents.selection.density import DensityMemory

if TYPE_CHECKING:
    from lm_saes.dictionaries.config import BaseSAEConfig


@dataclass(frozen=True, eq=False)
class Chosen:
    """The entries of a code, chosen from its candidates."""

    places: Tensor | None
    """Which of the candidates, ascending; None: all of them."""
    pattern: Pattern
    kept_E: Tensor
    """Which of the entries are active."""
    in_window_E: Tensor | None
    """Entries, active or not, that move their latent's threshold."""

    def of(self, v: Tensor) -> Tensor:
        """What belongs to the entries, of something that each candidate has."""
        return v if self.places is None else v.index_select(0, self.places)


class ActivationFunction(nn.Module, ABC):
    """Base of all activation functions: a dense definition and, for the sparse path, candidates block by block."""

    name: ClassVar[str]
    registry: ClassVar[dict[str, type[ActivationFunction]]] = {}
    config_fields: ClassVar[frozenset[str]] = frozenset()
    """The dictionary-config fields that only this kind of activation function reads."""
    log_threshold: Tensor | None = None
    """Logarithm of a learnt threshold per latent, if there is one; its gradient is that of a window around it."""
    window: float = 0.0
    """Width of that window, in the units of `s`."""
    joins_sites: bool = False
    """Whether a row is a token with the latents of all its sites, rather than one (token, site)."""
    judges_entries: ClassVar[bool] = False
    """Whether an entry is active or not by itself, where `h` exceeds its latent's bound: a class that has `bounds`."""
    even_sites: bool = False
    """Whether the code of a batch holds as many entries of each site as of every other."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.judges_entries = "bounds" in vars(cls)
        if not inspect.isabstract(cls):
            ActivationFunction.registry[cls.name] = cls

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__()
        self.axes = Axes()
        self.density = DensityMemory()

    @abstractmethod
    def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
        """The definition: bool `[N, F]`, which entries of the whole batch are active."""

    def dense(self, h_RF: Tensor, scale_SF: Tensor | None, mask: Tensor | None, n_sites: int = 1) -> Tensor:
        """Latents `[R, F]` of a dense batch (R = tokens x sites), differentiable in `h`; `mask` is by token."""
        with torch.no_grad():
            per_token = self.rows_per_token(n_sites)
            s_NF = scaled(h_RF, scale_SF).view(len(h_RF) // n_sites * per_token, -1)
            kept = self.keep(s_NF, self.mask_rows(mask, n_sites))
        return torch.where(kept.view_as(h_RF), h_RF, 0.0)

    def bounds(self, like_F: Tensor, scale_F: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where an activation function that `judges_entries` cuts the `h` of each latent (in the type of `like_F`).

        Active is what exceeds the first bound; what lies strictly between the others moves the latent's threshold.
        """
        raise NotImplementedError(f"{type(self).__name__}: compares entries with each other")

    def rows_per_token(self, n_sites: int) -> int:
        """How many of the rows that selection looks at belong to one token."""
        return 1 if self.joins_sites else n_sites

    def mask_rows(self, mask: Tensor | None, n_sites: int) -> Tensor | None:
        """Which of those rows count, given which tokens do."""
        per_token = self.rows_per_token(n_sites)
        return mask if mask is None or per_token == 1 else mask.repeat_interleave(per_token)

    @abstractmethod
    def expected_entries(self, n_latents: int, n_sites: int = 1) -> float | None:
        """Entries per token and site that the sparse path has to hold; None if that depends on the batch."""

    def begin(self, mask_N: Tensor | None, n_rows: int) -> None:
        """Called before the blocks of a batch are looked at on the sparse path."""

    @abstractmethod
    def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
        """Entries of a block that the code may have to hold.

        Bool `[B, F]`; or columns, as many a row, `[B, C]` (int64); or places in the flattened block, ascending, `[X]`.
        """

    def choose(self, s_E: Tensor, pattern: Pattern) -> Chosen:
        """After the last block: the code's entries among all candidates, and which are active; may raise `Missed`."""
        places, kept_E = self.settle(s_E, pattern)
        pattern, in_window_E = pattern if places is None else pattern.take(places), None
        if self.log_threshold is not None:
            s_E = s_E if places is None else s_E.index_select(0, places)
            theta = self.log_threshold.exp().to(s_E.dtype).view(-1)
            theta_E = theta.index_select(0, pattern.indices % len(theta))
            kept_E = kept_E & (s_E > theta_E)
            in_window_E = ((s_E - theta_E).abs() < self.window / 2) & (s_E > 0)
        return Chosen(places, pattern, kept_E, in_window_E)

    def settle(self, s_E: Tensor, pattern: Pattern) -> tuple[Tensor | None, Tensor]:
        """Which candidates the code holds (places, ascending; None: all), and which of these compete successfully.

        The pattern's rows are (token, site). Of those that do, an entry is active if `s` is above its threshold.
        """
        return None, s_E > 0

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Follow a rescaling of all `s` by `factor`, so that the same entries stay selected."""
        if self.log_threshold is not None:
            self.log_threshold.add_(factor.log())


class Missed(Exception):
    """The candidates of a batch did not contain everything that may be active: look again with the new floor."""
