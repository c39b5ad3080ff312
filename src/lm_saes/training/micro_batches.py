"""The batches of one optimizer step: taken from the stream, checked, counted, and their gradients summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_saes import waiting
from lm_saes.data.batch import Batch, check_batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import DataError
from lm_saes.latents.axis import Axis
from lm_saes.latents.row_gradients import collecting, storage_order
from lm_saes.losses.objective import objective
from lm_saes.losses.settings import LossSettings
from lm_saes.metrics.board import Pass
from lm_saes.training.dead_latents import DeadLatents
from lm_saes.training.precision import mixed_precision


def widths(cfg: BaseSAEConfig) -> dict[str, int]:
    """How wide the activations of each hook point must be."""
    return dict.fromkeys(cfg.associated_hook_points, cfg.d_model)


def check(sae: AbstractSparseAutoEncoder, batch: Batch) -> Batch:
    """A batch, checked to fit the dictionary. A process's share of one may hold no token that counts."""
    check_batch(batch, widths(sae.cfg), is_share=sae.axes.tokens.size > 1)
    return batch


def valid_tokens(batches: list[Batch], tokens: Axis) -> list[int | Tensor]:
    """How many tokens of each whole batch count: numbers, or (0-d) where reading them from the masks' device costs.

    Raises:
        DataError: of one, none does.
    """
    counts = list[int | Tensor]()
    for batch in batches:
        mask = batch.get("mask")
        if mask is not None and waiting.waits_cost(mask.device):
            counts.append(tokens.total(mask.sum(dtype=torch.int64)))
            continue
        count = tokens.count(batch["tokens"].numel() if mask is None else int(mask.sum()))
        if not count:
            raise DataError("batch: no token of it counts, in any process; leave such batches out")
        counts.append(count)
    return counts


def backward(
    sae: AbstractSparseAutoEncoder,
    batches: list[Batch],
    counts: Sequence[int | Tensor],
    settings: LossSettings,
    dead: DeadLatents,
    amp_dtype: torch.dtype | None,
) -> list[Pass]:
    """Forward, loss and backward of each batch: gradients of sums, divided once by the valid tokens of all together.

    Args:
        counts: what `valid_tokens` says of the batches.
    """
    total: int | Tensor = sum(counts)
    passes: list[Pass] = []
    whole = sae.axes.tokens.size == 1
    with collecting(sae.parameters() if whole else ()):
        for batch, count in zip(batches, counts, strict=True):
            with mixed_precision(amp_dtype, sae.cfg.device):
                record = sae.record(_on_device(batch, sae.cfg.device))
                terms = objective(sae, record, settings, dead.is_dead, dead.room)
            share = (count / total.double()).to(terms["loss"]) if isinstance(total, Tensor) else count / total
            (terms["loss"] * share).backward()
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
