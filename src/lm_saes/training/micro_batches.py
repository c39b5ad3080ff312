"""The batches of one optimizer step: taken from the stream, checked, counted, and their gradients summed."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.peek import Peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.losses.objective import objective
from lm_saes.losses.settings import LossSettings
from lm_saes.metrics.board import Pass
from lm_saes.training.precision import mixed_precision


def widths(cfg: BaseSAEConfig) -> dict[str, int]:
    """How wide the activations of each hook point must be."""
    return dict.fromkeys(cfg.associated_hook_points, cfg.d_model)


def take(stream: Peekable, n: int, cfg: BaseSAEConfig) -> list[Batch]:
    """The next `n` batches, each checked to fit the dictionary; fewer, or none, at the end of the stream."""
    batches: list[Batch] = []
    while len(batches) < n and (batch := next(stream, None)) is not None:
        check_batch(batch, widths(cfg))
        batches.append(batch)
    return batches


def valid_tokens(batch: Batch) -> int:
    """How many tokens count."""
    mask = batch.get("mask")
    return int(batch["tokens"].numel() if mask is None else mask.sum())


def backward(
    sae: AbstractSparseAutoEncoder,
    batches: list[Batch],
    settings: LossSettings,
    is_dead: Tensor,
    amp_dtype: torch.dtype | None,
) -> list[Pass]:
    """Forward, loss and backward of each batch: gradients of sums, divided once by the valid tokens of all together."""
    counts = [valid_tokens(batch) for batch in batches]
    passes: list[Pass] = []
    for batch, count in zip(batches, counts, strict=True):
        with mixed_precision(amp_dtype, sae.cfg.device):
            record = sae.record(_on_device(batch, sae.cfg.device))
            terms = objective(sae, record, settings, is_dead)
        (terms["loss"] * (count / sum(counts))).backward()
        passes.append((record, {name: value.detach() for name, value in terms.items()}))
    return passes


def _on_device(batch: Batch, device: str) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
