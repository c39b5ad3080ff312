"""Sparse or dense: the one rule for when dense products are faster than the sparse path."""

from __future__ import annotations

from torch import Tensor

SPARSE_BELOW = 0.06
"""Share of latents per token under which the sparse path wins (measured at d=576 on two cores, see docs/LOG.md)."""


def sparse_pays(entries: float, places: float) -> bool:
    """Whether `entries` out of `places` possible ones are few enough for the sparse path."""
    return entries <= SPARSE_BELOW * places


class DensityMemory:
    """Says whether the sparse path pays where waiting to know the density of a training batch would cost time.

    The answer is that of the last `refresh`, and no before the first: dense products wait for nothing.
    """

    def __init__(self) -> None:
        self._pays = False
        self._latest: tuple[Tensor, float] | None = None

    def sparse_paid(self, entries: Tensor, places: float) -> bool:
        """Whether entries were few enough when that was last looked at; `entries` (0-d) out of `places` are now."""
        self._latest = entries, places
        return self._pays

    def refresh(self) -> None:
        """Read what the latest batch was like; may wait."""
        if self._latest is not None:
            entries, places = self._latest
            self._pays, self._latest = sparse_pays(float(entries), places), None
