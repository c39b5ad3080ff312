"""Several sources of contexts or of cached activations, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lm_saes.data.batch import Batch
from lm_saes.data.contexts import Context
from lm_saes.data.seeding import generator

_DRAWS = 1024


class Source(Protocol):
    """Gives pieces (a context, or some rows of cached activations) and can go on from a saved place."""

    def draw(self, limit: int) -> Context | Batch | None:
        """The next piece, of at most `limit` rows where it is cached; None when the source has ended."""
        ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Mixer:
    """Draws each piece from a source chosen at random in proportion to `weights`, by `seed` and the number of the draw.

    A source that has ended is dropped; the others keep their proportions.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int):
        self._sources = sources
        self._weights = weights
        self._seed = seed
        self._draws = 0
        self._alive = list(range(len(sources)))
        self._uniforms: tuple[int, list[float]] = (-1, [])

    def draw(self, limit: int) -> Context | Batch | None:
        """The next piece of the mixture; None when every source has ended."""
        while self._alive:
            chosen = self._choose()
            piece = self._sources[chosen].draw(limit)
            if piece is not None:
                return piece
            self._alive.remove(chosen)
        return None

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): source.state_dict() for i, source in enumerate(self._sources)}
        return {"draws": self._draws, "alive": list(self._alive), "sources": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws, self._alive = state["draws"], list(state["alive"])
        for i, source in enumerate(self._sources):
            source.load_state_dict(state["sources"][str(i)])

    def _choose(self) -> int:
        if len(self._alive) == 1:
            return self._alive[0]
        left = self._uniform() * sum(self._weights[i] for i in self._alive)
        for i in self._alive:
            left -= self._weights[i]
            if left < 0:
                return i
        return self._alive[-1]

    def _uniform(self) -> float:
        block, place = divmod(self._draws, _DRAWS)
        if self._uniforms[0] != block:
            random = generator(self._seed, "mixture", block)
            self._uniforms = (block, torch.rand(_DRAWS, generator=random, dtype=torch.float64).tolist())
        self._draws += 1
        return self._uniforms[1][place]
