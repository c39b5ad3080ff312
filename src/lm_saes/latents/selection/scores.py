"""What selection looks at, before it is computed, in blocks, and at the entries that were found.

Letters: N tokens, B tokens of a block, S sites, D width, F latents, E entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """`s = (x W + b) * scale` of every token and latent of one site, as a value: nothing is computed yet."""

    x_ND: Tensor
    W_DF: Tensor
    """Best stored latent-major."""
    b_F: Tensor
    scale_F: Tensor | None
    """None: 1."""

    def of(self, tokens: Tensor) -> Scores:
        """Those of some tokens."""
        return Scores(self.x_ND[tokens], self.W_DF, self.b_F, self.scale_F)


@dataclass(frozen=True, eq=False)
class Block:
    """The computed scores of some tokens, and what `h` is made of (the product without its bias, the gate).

    Sites that share a product have it as `[B, 1, F]`.
    """

    s_BSF: Tensor
    product_BSF: Tensor
    gate_BSF: Tensor | None


class BatchScores(ABC):
    """Those of a batch, of all sites."""

    n_tokens: int
    n_sites: int
    n_latents: int
    """Latents of a site."""
    device: torch.device

    plain: Sequence[Scores] = ()
    """Those of each site, where they are nothing but products with weights of its own; else none."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[slice, Block]]:
        """Blocks of tokens, each of which may be overwritten by the next."""

    @abstractmethod
    def probe(self) -> Block:
        """Some tokens, that tell how dense the batch is."""


@dataclass(frozen=True, eq=False)
class Found:
    """Candidates, row by row."""

    lengths: Tensor
    """Entries of each row (token, site)."""
    indices: Tensor
    """`site * F + latent` of each entry, int32."""
    s_E: Tensor
    product_E: Tensor
    """`x W` without the bias."""
    gate_E: Tensor | None = None
