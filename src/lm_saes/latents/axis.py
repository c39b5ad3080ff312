"""The latent axis: the only place where mathematics meets latents that may live in another process."""

from __future__ import annotations

import torch
from torch import Tensor


class LatentAxis:
    """The four operations that involve latents elsewhere. In this default object there is no elsewhere.

    A sharded axis replaces it and sums, or selects, over processes; dictionaries never know which one they hold.
    """

    def enter(self, x: Tensor) -> Tensor:
        """Hand a replicated tensor to the local latents: identity forward, sum of gradients backward."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """Collect what the local latents add up to: sum forward, identity backward."""
        return y

    def total(self, v: Tensor) -> Tensor:
        """Sum of a per-shard total over all shards, for statistics (no gradient)."""
        return v

    def top(self, candidates_RC: Tensor, k: int) -> Tensor:
        """Which candidates are among the k largest of their row over all shards: bool `[R, C]`, exactly min(k, C)."""
        if candidates_RC.shape[1] <= k:
            return torch.ones_like(candidates_RC, dtype=torch.bool)
        chosen = candidates_RC.topk(k, dim=1, sorted=False).indices
        return torch.zeros_like(candidates_RC, dtype=torch.bool).scatter_(1, chosen, True)
