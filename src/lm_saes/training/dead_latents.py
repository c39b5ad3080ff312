"""How many valid tokens have passed since each latent was last active."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes import machine


class DeadLatents:
    """Counts, per latent, valid tokens since its last activation; a latent is dead from `threshold` of them on.

    Where waiting for the device costs time, how many are dead is known at reports only. Until the next one AuxK has
    room for so many and a quarter more, by layer: which latents are dead is exact at every step, and those beyond the
    room wait for the report.
    """

    def __init__(self, shape: tuple[int, ...], threshold: float, device: torch.device | str = "cpu") -> None:
        self.threshold = threshold
        self.tokens_since_last_activation = torch.zeros(shape, dtype=torch.int64, device=device)
        self.is_dead = torch.zeros(shape, dtype=torch.bool, device=device)
        self.room: list[int] | None = None
        """Places in AuxK's list of dead latents, of each layer; None: as many as there are."""
        self.make_room()

    def update(self, fired: Tensor, n_tokens: Tensor | int) -> Tensor:
        """Count one step in which `fired` latents (bool) were active somewhere among `n_tokens` valid tokens."""
        waited = self.tokens_since_last_activation + n_tokens
        self.tokens_since_last_activation = torch.where(fired, 0, waited)
        return self.refresh()

    def make_room(self) -> None:
        """Let AuxK's list have places for all that are dead now, and some more; may wait."""
        if machine.waits_cost(self.is_dead.device):
            rows = self.is_dead.view(-1, self.is_dead.shape[-1])
            self.room = [min(rows.shape[1], n + max(machine.SPARE_DEAD_LATENTS, n // 4)) for n in rows.sum(1).tolist()]

    def refresh(self) -> Tensor:
        """Recompute which latents are dead from the counts."""
        self.is_dead = self.tokens_since_last_activation >= self.threshold
        return self.is_dead


def fired_latents(feature_acts: Tensor, mask: Tensor | None, specs: tuple[str, ...]) -> tuple[Tensor, Tensor | int]:
    """Which latents are active on a valid token, and how many valid tokens there are.

    Args:
        feature_acts: dense latents; `specs` names its dimensions (of `batch context layers heads sae`).
        mask: valid tokens `[batch]` or `[batch, context]`.
    """
    tokens = [i for i, name in enumerate(specs) if name in ("batch", "context")]
    active = feature_acts > 0
    n_tokens: Tensor | int = 1
    if mask is None:
        for i in tokens:
            n_tokens *= feature_acts.shape[i]
    else:
        n_tokens = mask.sum(dtype=torch.int64)
        active = active & mask.bool().view(*mask.shape, *[1] * (active.ndim - mask.ndim))
    heads = [i for i, name in enumerate(specs) if name == "heads"]
    return active.any(dim=tokens + heads), n_tokens  # type: ignore[call-overload]
