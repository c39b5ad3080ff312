"""Sparse or dense: the one rule for when dense products are faster than the sparse path."""

from __future__ import annotations

SPARSE_BELOW = 0.06
"""Share of latents per token under which the sparse path wins (measured at d=576 on two cores, see docs/LOG.md)."""


def sparse_pays(entries: float, places: float) -> bool:
    """Whether `entries` out of `places` possible ones are few enough for the sparse path."""
    return entries <= SPARSE_BELOW * places
