"""What the language model loses when it reads the dictionary's reconstruction instead of its own activation.

Letters: B contexts, S tokens in a context, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_saes import machine
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.models.base import LanguageModel


class DownstreamLoss:
    """Next-token cross-entropy with the original, the reconstructed and a zeroed activation, and the KL divergence
    KL(original || reconstructed) of the predictions.

    All hook points that the dictionary writes are replaced together, at valid positions only. A position counts if its
    token and the next one are valid: the model predicts the next token there from a replaced activation. Padding is on
    the right, so causal attention never reads it.
    """

    def __init__(self, sae: AbstractSparseAutoEncoder, model: LanguageModel) -> None:
        self.sae = sae
        self.model = model
        self.n_positions = 0
        self.original = self.reconstructed = self.ablated = self.kl = 0.0

    def add(self, tokens_BS: Tensor, mask_BS: Tensor) -> None:
        """Run the model on a batch of contexts three times and add up its losses."""
        counted = mask_BS[:, :-1] & mask_BS[:, 1:]
        used = counted.any(1)
        if not used.any():
            return
        n_contexts = max(1, machine.TOKENS_PER_FORWARD // tokens_BS.shape[1])
        for tokens, mask in zip(tokens_BS[used].split(n_contexts), mask_BS[used].split(n_contexts), strict=True):
            self._add_group(tokens.to(self.model.device), mask.to(self.model.device))

    def _add_group(self, tokens_BS: Tensor, mask_BS: Tensor) -> None:
        seen: dict[str, Tensor] = {}

        def watch(hook: str) -> Callable[[Tensor], Tensor]:
            def keep(activation: Tensor) -> Tensor:
                seen[hook] = activation
                return activation

            return keep

        def put(value: Tensor | float) -> Callable[[Tensor], Tensor]:
            return lambda activation: torch.where(mask_BS[..., None], torch.as_tensor(value).to(activation), activation)

        cfg = self.sae.cfg
        original = self.model.logits(tokens_BS, replace={hook: watch(hook) for hook in cfg.hook_points_read})
        parameter = next(self.sae.parameters())
        batch = {
            **{hook: activation.to(parameter) for hook, activation in seen.items()},
            "tokens": tokens_BS.to(parameter.device),
            "mask": mask_BS.to(parameter.device),
        }
        y_hat = self.sae.reconstruct(batch)
        sites = y_hat if y_hat.ndim > batch[cfg.hook_points_read[0]].ndim else y_hat[None]
        replaced = {hook: put(y) for hook, y in zip(cfg.hook_points_written, sites, strict=True)}
        reconstructed = self.model.logits(tokens_BS, replace=replaced)
        ablated = self.model.logits(tokens_BS, replace={hook: put(0.0) for hook in cfg.hook_points_written})
        counted = mask_BS[:, :-1] & mask_BS[:, 1:]
        for i, positions in enumerate(counted):
            targets = tokens_BS[i, 1:][positions]
            log_p, log_q, log_zero = (
                logits[i, :-1][positions].float().log_softmax(-1) for logits in (original, reconstructed, ablated)
            )
            self.n_positions += len(targets)
            self.original += F.nll_loss(log_p, targets, reduction="sum").item()
            self.reconstructed += F.nll_loss(log_q, targets, reduction="sum").item()
            self.ablated += F.nll_loss(log_zero, targets, reduction="sum").item()
            self.kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()

    def metrics(self) -> dict[str, float]:
        """The downstream metrics, in nats per position. A ratio without a denominator is NaN."""
        n = self.n_positions or math.nan
        original, reconstructed, ablated = self.original / n, self.reconstructed / n, self.ablated / n
        return {
            "metrics/downstream_loss_original": original,
            "metrics/downstream_loss_reconstructed": reconstructed,
            "metrics/downstream_loss_ablated": ablated,
            "metrics/downstream_loss_ratio": (ablated - original) / (ablated - reconstructed or math.nan),
            "metrics/downstream_loss_recovered": (ablated - reconstructed) / (ablated - original or math.nan),
            "metrics/downstream_kl": self.kl / n,
        }
