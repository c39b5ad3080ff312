"""What selection looks at, before it is computed, in blocks, and at the entries that were found.

Letters: N tokens, B tokens of a block, S sites, D width, F latents, E entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.latents.codes import Pattern
from lm_saes.latents.offsets import offsets_of_lengths, offsets_of_rows, places_of_columns
from lm_saes.latents.selection.search import Search


@dataclass(frozen=True, eq=False)
class Scores:
    """`s = (x W + b) * scale` of every token and latent of one site, as a value: nothing is computed yet."""

    x_ND: Tensor
    W_DF: Tensor
    """Best stored latent-major."""
    b_F: Tensor
    scale_F: Tensor | None
    """None: 1."""

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return len(self.b_F)

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

    @property
    def plain(self) -> Sequence[Scores]:
        """Those of each site, where they are nothing but products with weights of its own; else none."""
        return ()

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

    def pattern(self, n_latents: int) -> Pattern:
        """Where they are, among so many latents (of all sites)."""
        return Pattern(self.indices, offsets_of_lengths(self.lengths), n_latents)


def look(block: Block, search: Search, tokens: slice) -> Found:
    """Read one block at the candidates of a search."""
    n_tokens, n_sites, n_latents = block.s_BSF.shape
    per_token = search.rows.per_token
    width = n_sites * n_latents // per_token
    candidates = search.candidates(block.s_BSF.view(n_tokens * per_token, -1), search.rows.of(tokens))
    if candidates.dtype == torch.bool:
        flat = candidates.view(-1).nonzero().squeeze(1)
        lengths = candidates.view(-1, n_latents).sum(1)
    elif candidates.ndim == 1 or per_token < n_sites:
        flat = candidates if candidates.ndim == 1 else places_of_columns(candidates.sort(1).values, width)
        offsets = offsets_of_rows(flat // n_latents, n_tokens * n_sites)
        lengths = offsets[1:] - offsets[:-1]
    else:
        flat = places_of_columns(candidates, width)
        lengths = torch.full((n_tokens * n_sites,), candidates.shape[1], device=candidates.device)
    indices = flat % (n_sites * n_latents)
    shared = block.product_BSF.shape[1] < n_sites
    source = flat // (n_sites * n_latents) * n_latents + flat % n_latents if shared else flat
    product_E = block.product_BSF.reshape(-1).index_select(0, source)
    gate_E = None if block.gate_BSF is None else block.gate_BSF.reshape(-1).index_select(0, source)
    return Found(lengths, indices.to(torch.int32), block.s_BSF.view(-1).index_select(0, flat), product_E, gate_E)


def joined(found: Sequence[Found]) -> Found:
    """The candidates of all blocks."""
    lengths, indices, s_E, product_E = (
        torch.cat(parts) for parts in zip(*((f.lengths, f.indices, f.s_E, f.product_E) for f in found), strict=True)
    )
    gates = [f.gate_E for f in found if f.gate_E is not None]
    return Found(lengths, indices, s_E, product_E, torch.cat(gates) if gates else None)
