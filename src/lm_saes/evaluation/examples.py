"""The snippets of text on which latents fire most strongly, collected in one pass over the text.

Letters: B contexts in a batch, S tokens in a context, T latents tracked, K snippets of each, W tokens of a snippet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from lm_saes.axes.axis import Axis

MAX_TRACKED_LATENTS = 8192
"""Snippets are kept for at most this many latents, evenly spaced by index; a wider dictionary is sampled."""

_NO_TOKEN = -1


class Snippet(TypedDict):
    """A piece of text around one peak of one latent."""

    tokens: list[str]
    activations: list[float]
    peak: int


class LatentExample(TypedDict):
    """A latent, how often and how strongly it fires, and where it fires most strongly (best first)."""

    latent: int
    frequency: float
    max_activation: float
    snippets: list[Snippet]


class SnippetCollector:
    """Keeps each latent's strongest activation in each of its `n_snippets` best contexts.

    Memory is `T x K x W`, whatever the length of the text. Equal peaks are settled in favour of the earlier one,
    so the result does not depend on how contexts are grouped into batches.

    Args:
        latents: the numbers, among `d_sae`, of the latents that are here.
    """

    def __init__(self, latents: Tensor, d_sae: int, n_snippets: int, context_tokens: int) -> None:
        device = latents.device
        tracked = latents % -(-d_sae // MAX_TRACKED_LATENTS) == 0
        self.latents = latents[tracked]
        """The number of the latent of each slot."""
        self.slots = torch.where(tracked, tracked.cumsum(0) - 1, -1)
        n_tracked = len(self.latents)
        self.offsets = torch.arange(-context_tokens, context_tokens + 1, device=device)
        width = len(self.offsets)
        self.peaks = torch.zeros(n_tracked, n_snippets, device=device)
        self.tokens = torch.full((n_tracked, n_snippets, width), _NO_TOKEN, device=device)
        self.activations = torch.zeros(n_tracked, n_snippets, width, device=device)

    def add(self, entries: tuple[Tensor, Tensor, Tensor], tokens_BS: Tensor, mask_BS: Tensor) -> None:
        """Take in a batch: `entries` are the active (row, latent, value) triples, row = context * S + position, latents
        by their places among those that are here."""
        n_contexts, length = tokens_BS.shape
        n_tracked, n_kept = self.peaks.shape
        rows, latents, values = entries
        slots = self.slots[latents]
        counts = mask_BS.flatten()[rows] & (slots >= 0)
        rows, values = rows[counts], values[counts].float()
        context, position = rows // length, rows % length
        pair = slots[counts] * n_contexts + context
        if len(pair) == 0:
            return

        peak = torch.zeros(n_tracked * n_contexts, device=values.device).scatter_reduce(0, pair, values, "amax")
        at_peak = values == peak[pair]
        peak_position = torch.full_like(peak, length, dtype=torch.int64)
        peak_position = peak_position.scatter_reduce(0, pair[at_peak], position[at_peak], "amin")

        ranked = torch.cat([self.peaks, peak.view(n_tracked, n_contexts)], dim=1)
        order = ranked.argsort(dim=1, descending=True, stable=True)[:, :n_kept]
        self.peaks = ranked.gather(1, order)
        kept = order.clamp(max=n_kept - 1)[..., None].expand_as(self.tokens)
        self.tokens, self.activations = self.tokens.gather(1, kept), self.activations.gather(1, kept)

        slot, place = ((order >= n_kept) & (self.peaks > 0)).nonzero(as_tuple=True)
        context = order[slot, place] - n_kept
        pair_key = slot * n_contexts + context
        window = peak_position[pair_key][:, None] + self.offsets
        last = length - 1 - mask_BS.flip(1).int().argmax(1)
        inside = (window >= 0) & (window <= last[context][:, None])
        self.tokens[slot, place] = torch.where(
            inside, tokens_BS[context[:, None], window.clamp(0, length - 1)], _NO_TOKEN
        )
        keys, by_key = (pair * length + position).sort()
        wanted = pair_key[:, None] * length + window.clamp(0, length - 1)
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        fires = inside & (keys[found] == wanted)
        self.activations[slot, place] = values[by_key][found] * fires

    def join(self, axis: Axis) -> None:
        """Take in the latents of the other processes, so that all have all, in order of their numbers."""
        order = axis.join(self.latents).argsort()
        for name in ("latents", "peaks", "tokens", "activations"):
            setattr(self, name, axis.join(getattr(self, name))[order])

    def examples(
        self, frequency: Tensor, n_latents: int, decode: Callable[[list[int]], list[str]]
    ) -> list[LatentExample]:
        """At most `n_latents` of the latents that fired, at even ranks of firing frequency, most frequent first."""
        fired = (self.peaks[:, 0] > 0).nonzero().flatten()
        ranked = fired[frequency[self.latents[fired]].argsort(descending=True, stable=True)]
        n_shown = min(n_latents, len(ranked))
        shown = ranked[torch.linspace(0, len(ranked) - 1, n_shown, dtype=torch.float64).round().long()]
        return [
            LatentExample(
                latent=latent,
                frequency=_short(frequency[latent].item()),
                max_activation=_short(self.peaks[slot, 0].item()),
                snippets=[self._snippet(slot, k, decode) for k in range(int((self.peaks[slot] > 0).sum()))],
            )
            for slot, latent in zip(shown.tolist(), self.latents[shown].tolist(), strict=True)
        ]

    def _snippet(self, slot: int, k: int, decode: Callable[[list[int]], list[str]]) -> Snippet:
        inside = self.tokens[slot, k] != _NO_TOKEN
        return Snippet(
            tokens=decode(self.tokens[slot, k][inside].tolist()),
            activations=[_short(value) for value in self.activations[slot, k][inside].tolist()],
            peak=int(inside[: len(self.offsets) // 2].sum()),
        )


def _short(value: float) -> float:
    """`value` to four significant digits: what a person reads, in a file that stays small."""
    return float(f"{value:.4g}")
