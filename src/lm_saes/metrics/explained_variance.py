"""Explained variance from sums that add up: one accumulator for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExplainedVariance:
    """`1 - sum ||y_hat - y||^2 / sum ||y - mean y||^2` of each of G sites, as sums over tokens.

    Values add up over batches and processes. Labels may all be given from another origin, which changes nothing but
    rounding: one among them loses no digits where the mean is large against the spread.
    """

    tokens: Tensor
    """How many tokens count (0-d)."""
    label: Tensor
    """`sum y`: `[G, D]`."""
    label_square: Tensor
    """`sum ||y||^2`: `[G]`."""
    error: Tensor
    """`sum ||y_hat - y||^2`: `[G]`."""

    @classmethod
    def of(cls, n_tokens: Tensor, y_GND: Tensor, square_GN: Tensor, error_GN: Tensor) -> Self:
        """One batch: labels, `||y||^2` and `||y_hat - y||^2`, all zero where a token does not count."""
        return cls(n_tokens, y_GND.sum(1), square_GN.double().sum(1), error_GN.double().sum(1))

    @classmethod
    def from_sums(cls, sums: Mapping[str, Tensor]) -> Self:
        """The value with these sums; others are ignored."""
        return cls(**{field.name: sums[field.name] for field in fields(cls)})

    def sums(self) -> Iterator[tuple[str, Tensor]]:
        """The sums under their names."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    def __add__(self, other: Self) -> Self:
        return type(self)(*(mine + theirs for (_, mine), (_, theirs) in zip(self.sums(), other.sums(), strict=True)))

    @property
    def variation(self) -> Tensor:
        """`sum ||y - mean y||^2` of each site, `[G]`; 0 where labels are all the same, rounding aside."""
        return self.label_square - self.label.square().sum(1) / self.tokens

    def by_site(self) -> Tensor:
        """The explained variance of each site, `[G]`."""
        return 1 - self.error / self.variation.clamp(min=torch.finfo(torch.float64).tiny)
