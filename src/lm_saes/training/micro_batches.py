"""The batches of one optimizer step: taken from the stream, checked, counted, and their gradients summed."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.peek import Peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.latents.axis import Axis
from lm_saes.losses.objective import objective
from lm_saes.losses.settings import LossSettings
from lm_saes.metrics.board import Pass
from lm_saes.training.optim import storage_order
from lm_saes.training.precision import mixed_precision


def widths(cfg: BaseSAEConfig) -> dict[str, int]:
    """How wide the activations of each hook point must be."""
    return dict.fromkeys(cfg.associated_hook_points, cfg.d_model)


def take(stream: Peekable, n: int, sae: AbstractSparseAutoEncoder) -> list[Batch]:
    """The next `n` batches, each checked to fit the dictionary; fewer, or none, at the end of the stream.

    Where several processes each have a stream, all get as many as the one with the fewest.
    """
    batches: list[Batch] = []
    while len(batches) < n and (batch := next(stream, None)) is not None:
        check_batch(batch, widths(sae.cfg))
        batches.append(batch)
    return batches[: int(sae.axes.everywhere.smallest(torch.tensor(len(batches))))]


def valid_tokens(batches: list[Batch], tokens: Axis) -> list[int]:
    """How many tokens of each whole batch count."""
    counts = [batch["tokens"].numel() if batch.get("mask") is None else int(batch["mask"].sum()) for batch in batches]
    return tokens.total(torch.tensor(counts)).tolist()


def backward(
    sae: AbstractSparseAutoEncoder,
    batches: list[Batch],
    counts: list[int],
    settings: LossSettings,
    is_dead: Tensor,
    amp_dtype: torch.dtype | None,
) -> list[Pass]:
    """Forward, loss and backward of each batch: gradients of sums, divided once by the valid tokens of all together.

    Args:
        counts: what `valid_tokens` says of the batches.
    """
    passes: list[Pass] = []
    for batch, count in zip(batches, counts, strict=True):
        with mixed_precision(amp_dtype, sae.cfg.device):
            record = sae.record(_on_device(batch, sae.cfg.device))
            terms = objective(sae, record, settings, is_dead)
        (terms["loss"] * (count / sum(counts))).backward()
        passes.append((record, {name: value.detach() for name, value in terms.items()}))
    add_up_gradients(sae)
    return passes


def add_up_gradients(sae: AbstractSparseAutoEncoder) -> None:
    """Give every process the gradients of the whole batch."""
    for p in sae.parameters():
        if p.grad is not None:
            sae.axes.tokens.add_up(p.grad.permute(storage_order(p.grad)))


def _on_device(batch: Batch, device: str) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
