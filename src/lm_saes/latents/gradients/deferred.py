"""Gradients of a large `[N, F]` tensor that its consumers hand over as recipes, not as tensors.

A consumer's backward pass would write a gradient as large as the tensor, and autograd would add these up, pass after
pass through memory. Instead each consumer leaves a recipe that adds its part to one block of latents; the producer's
backward pass runs all of them block by block, while the block lies in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lm_saes.torch_private import backward_pass

Recipe = Callable[[slice, Tensor], None]
"""Adds a consumer's gradient of some latents to their block `[J, N]`, in place."""


class Deferred:
    """The recipes of one backward pass. Consumers take the tensor as an input, so that autograd runs them first."""

    def __init__(self) -> None:
        self._recipes: list[tuple[int, Recipe]] = []

    def add(self, recipe: Recipe) -> None:
        """Leave a recipe; to be called in a consumer's backward pass."""
        self._recipes.append((backward_pass(), recipe))

    def take(self) -> list[Recipe]:
        """The recipes left in this backward pass (not in an earlier one that never reached the producer)."""
        now, recipes = backward_pass(), self._recipes
        self._recipes = []
        return [recipe for when, recipe in recipes if when == now]
