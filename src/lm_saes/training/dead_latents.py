"""How many valid tokens have passed since each latent was last active."""

from __future__ import annotations

import torch
from torch import Tensor


class DeadLatents:
    """Counts, per latent, valid tokens since its last activation; a latent is dead from `threshold` of them on."""

    def __init__(self, shape: tuple[int, ...], threshold: float, device: torch.device | str = "cpu") -> None:
        self.threshold = threshold
        self.tokens_since_last_activation = torch.zeros(shape, dtype=torch.int64, device=device)
        self.is_dead = torch.zeros(shape, dtype=torch.bool, device=device)

    def update(self, fired: Tensor, n_tokens: Tensor | int) -> Tensor:
        """Count one step in which `fired` latents (bool) were active somewhere among `n_tokens` valid tokens."""
        waited = self.tokens_since_last_activation + torch.as_tensor(n_tokens, device=fired.device).to(torch.int64)
        self.tokens_since_last_activation = torch.where(fired, 0, waited)
        return self.refresh()

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
        n_tokens = mask.sum()
        active = active & mask.bool().view(*mask.shape, *[1] * (active.ndim - mask.ndim))
    heads = [i for i, name in enumerate(specs) if name == "heads"]
    return active.any(dim=tokens + heads), n_tokens  # type: ignore[call-overload]
