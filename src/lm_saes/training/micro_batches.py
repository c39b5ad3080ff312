"""The batches of one optimizer step: taken from the stream, checked, counted, and their gradients summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import Axis
from lm_saes.data.batch import Batch, check_batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import DataError
from lm_saes.latents.gradients.rows import collecting, storage_order
from lm_saes.losses.objective import objective
from lm_saes.losses.settings import LossSettings
from lm_saes.training.board import Pass
from lm_saes.training.dead_latents import DeadLatents
from lm_saes.training.precision import mixed_precision


def check(sae: AbstractSparseAutoEncoder, batch: Batch) -> Batch:
    """A batch, checked to fit the dictionary. A process's share of one may hold no token that counts."""
    check_batch(batch, sae.cfg.widths, is_share=sae.axes.tokens.size > 1)
    return batch


def valid_tokens(batches: list[Batch], tokens: Axis) -> list[int | Tensor]:
    """How many tokens of each whole batch count: numbers, or (0-d) where reading them from the masks' device costs.

    Raises:
        DataError: of one, none does.
    """
    counts = list[int | Tensor]()
    for batch in batches:
        mask = batch.get("mask")
        if mask is not None and machine.waits_cost(mask.device):
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
            is_last = len(passes) + 1 == len(batches)
            with adding_up_gradients(sae) if is_last else nullcontext():
                (terms["loss"] * share).backward()
            passes.append((record, {name: value.detach() for name, value in terms.items()}))
    return passes


@contextmanager
def adding_up_gradients(sae: AbstractSparseAutoEncoder) -> Iterator[None]:
    """Around the last backward pass of a step: every process then has the gradients of the whole batch.

    The sum of a gradient begins as soon as it and those of all later parameters are there, while the pass goes on with
    the others: in one order, as passes over different rows need not finish their gradients in the same.
    """
    tokens, missing = sae.axes.tokens, list(sae.parameters())
    if tokens.size == 1:
        yield
        return
    there, sums = set[Tensor](), list[Callable[[], object]]()

    def begin(p: Tensor) -> None:
        if p.grad is not None:
            sums.append(tokens.add_up(p.grad.permute(storage_order(p.grad))))

    def begin_in_order(p: Tensor) -> None:
        there.add(p)
        while missing and missing[-1] in there:
            begin(missing.pop())

    hooks = [p.register_post_accumulate_grad_hook(begin_in_order) for p in missing]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for p in reversed(missing):
        begin(p)
    for wait in sums:
        wait()


def _on_device(batch: Batch, device: str) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
