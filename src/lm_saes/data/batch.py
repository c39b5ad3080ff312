"""What flows from a stream to the trainer, and the checks that it is what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.errors import DataError

Batch = dict[str, Any]
"""Hook point -> activations `[batch, d]` or `[batch, seq, d]`; `tokens` (int64) and optional `mask` (True = counts)
of shape `[batch]` or `[batch, seq]`; optional `meta`, a list with one dict per context."""


def check_batch(batch: Mapping[str, Any], widths: Mapping[str, int], *, is_share: bool = False) -> None:
    """Check that `batch` holds finite activations of the given width for every hook point, with tokens to match.

    Values are looked at only where that costs no wait for a device: on the CPU, before a batch is copied.

    Args:
        is_share: it is one process's share of a batch, of which no token needs to count.

    Raises:
        DataError: naming what is wrong, the shape seen and the shape wanted.
    """
    tokens = batch.get("tokens")
    if not isinstance(tokens, Tensor):
        raise DataError(f"batch: 'tokens' is missing; give int64 [batch] or [batch, seq]; it has {_keys(batch)}")
    shape = tuple(tokens.shape)
    if tokens.ndim not in (1, 2) or tokens.is_floating_point():
        raise DataError(f"batch: 'tokens' is {tokens.dtype} {list(shape)}; give int64 [batch] or [batch, seq]")
    if tokens.numel() == 0:
        raise DataError(f"batch: 'tokens' of shape {list(shape)} is empty; give at least one token")
    _check_mask(batch.get("mask"), shape, is_share)
    for hook_point, width in widths.items():
        _check_activations(hook_point, batch.get(hook_point), (*shape, width), batch)


def _check_mask(mask: Any, shape: tuple[int, ...], is_share: bool) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        raise DataError(f"batch: 'mask' is {_seen(mask)}; give it the shape of 'tokens', {list(shape)}")
    if not is_share and not machine.waits_cost(mask.device) and not bool(mask.any()):
        raise DataError(
            f"batch: 'mask' of shape {list(shape)} masks every token; leave such batches out or see to ignore_token_ids"
        )


def _check_activations(hook_point: str, x: Any, wanted: tuple[int, ...], batch: Mapping[str, Any]) -> None:
    if not isinstance(x, Tensor):
        raise DataError(
            f"batch: hook point {hook_point!r} is missing; wanted {list(wanted)}, but it has {_keys(batch)}; add it"
        )
    if tuple(x.shape) != wanted:
        only_width = tuple(x.shape[:-1]) == wanted[:-1]
        remedy = f"set d_model={x.shape[-1]} or name another hook point" if only_width else "give one row a token"
        raise DataError(f"batch: hook point {hook_point!r} has shape {list(x.shape)}; wanted {list(wanted)}; {remedy}")
    if not x.is_floating_point():
        raise DataError(f"batch: hook point {hook_point!r} holds {x.dtype}; give floating-point activations")
    # A sum is finite unless an entry is not, or the sum overflows: cheap, with a second look only in those cases.
    if not machine.waits_cost(x.device) and not bool(x.sum(dtype=torch.float32).isfinite()):
        bad = int((~x.isfinite()).sum())
        if bad:
            raise DataError(
                f"batch: hook point {hook_point!r} of shape {list(x.shape)} holds {bad} non-finite values; read it in "
                "a wider dtype, or generate the activations again"
            )


def _keys(batch: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, batch)) or "nothing"


def _seen(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
