"""From mixed sources to batches, in the consumer's thread; each producer's state says exactly where it is.

`light`: the state is a few numbers, so it can be taken after every batch. Otherwise it holds a shuffle buffer's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lm_saes.data.activity import Activity
from lm_saes.data.batch import Batch
from lm_saes.data.contexts import Context
from lm_saes.data.rows import copy_rows
from lm_saes.data.shuffle import ShuffleBuffer
from lm_saes.data.sources import Mixer
from lm_saes.errors import DataError

if TYPE_CHECKING:
    from lm_saes.models.base import LanguageModel

_NO_LIMIT = 2**62
_EMPTY_READS = 1000
"""Reads in a row without a token that counts, after which there will be none: sources may have no end."""


class Producer(Protocol):
    """Makes one batch after another."""

    light: bool

    def next(self) -> Batch | None:
        """The next batch; None when there are no more."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Reader:
    """Draws up to `n_draws` pieces at a time and turns those that are text into activations, in one forward pass.

    The pieces of a pass are drawn afresh for it, so the same place in the sources gives the same model batch again:
    activations repeat bit for bit only then. Without hook points it gives tokens and masks only, and needs no model.
    """

    def __init__(
        self,
        mixer: Mixer,
        model: LanguageModel | None,
        hook_points: Sequence[str],
        n_draws: int,
        activity: Activity,
        max_norm_ratio: float | None = None,
    ):
        self._mixer = mixer
        self._model = model
        self._hook_points = hook_points
        self._n_draws = n_draws
        self._activity = activity
        self._max_norm_ratio = max_norm_ratio

    def read(self, limit: int) -> list[Batch]:
        """Batches of at most `limit` rows together; none at the end. Contexts drawn as text come in one, first."""
        contexts: list[Context] = []
        cached: list[Batch] = []
        rows = 0
        for _ in range(self._n_draws):
            if rows >= limit:
                break
            with self._activity.doing("mixing sources"):
                piece = self._mixer.draw(limit - rows)
            if piece is None:
                break
            if isinstance(piece, Context):
                contexts.append(piece)
                rows += 1
            else:
                cached.append(piece)
                rows += piece["tokens"].shape[0]
        if not contexts:
            return cached
        with self._activity.doing("running the language model"):
            return [self._forward(contexts), *cached]

    def state_dict(self) -> dict[str, Any]:
        return self._mixer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mixer.load_state_dict(state)

    def _forward(self, contexts: list[Context]) -> Batch:
        tokens = torch.stack([context.tokens for context in contexts])
        mask = torch.stack([context.mask for context in contexts])
        batch: Batch = {"tokens": tokens, "mask": mask, "meta": [context.meta for context in contexts]}
        if self._model is not None and self._hook_points:
            device = self._model.device
            lengths = torch.tensor([context.length for context in contexts])
            real = torch.arange(tokens.shape[1]) < lengths[:, None]
            attention_mask = None if bool(real.all()) else real.to(device)
            activations = self._model.activations(tokens.to(device), self._hook_points, attention_mask)
            if self._max_norm_ratio is not None:
                for x in activations.values():
                    batch["mask"] = batch["mask"] & _within_norm(x, mask, self._max_norm_ratio)
            batch |= activations
        return batch


def _within_norm(x: Tensor, mask: Tensor, ratio: float) -> Tensor:
    norms = x.float().norm(dim=-1).cpu()
    return norms <= ratio * norms[mask].median() if bool(mask.any()) else mask


class ContextBatches:
    """Batches of whole contexts, or of their tokens only. The last batch may be short."""

    light = True

    def __init__(self, reader: Reader, batch_size: int, dtype: torch.dtype):
        self._reader = reader
        self._batch_size = batch_size
        self._dtype = dtype

    def next(self) -> Batch | None:
        blocks: list[Batch] = []
        n = 0
        while n < self._batch_size and (read := self._reader.read(self._batch_size - n)):
            blocks += read
            n += sum(block["tokens"].shape[0] for block in read)
        if not blocks:
            return None
        batch = _join(blocks, n, self._dtype, [key for key in blocks[0] if key != "meta"])
        metas = [meta for block in blocks for meta in block.get("meta", [{}] * block["tokens"].shape[0])]
        return batch | {"meta": metas} if any(metas) else batch

    def state_dict(self) -> dict[str, Any]:
        return self._reader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reader.load_state_dict(state)


class Rows:
    """The tokens that count, one after another: a block read from the sources, and how much of it is used.

    The state is the place where the block was begun, and the rows used: going on from it makes the block again.
    """

    def __init__(self, reader: Reader, dtype: torch.dtype):
        self._reader = reader
        self._dtype = dtype
        self._block: Batch | None = None
        self._used = 0
        self._begun: dict[str, Any] = {}

    def current(self) -> tuple[Batch, int] | None:
        """The block being used and the first row of it that is not; None at the end."""
        empty = 0
        while self._block is None or self._used == self._block["tokens"].shape[0]:
            if empty == _EMPTY_READS:
                raise DataError(
                    f"activation_factory: no token counts in {_EMPTY_READS} model batches in a row; see to "
                    "ignore_token_ids and max_norm_ratio"
                )
            empty += 1
            self._begun, self._used = self._reader.state_dict(), 0
            read = self._reader.read(_NO_LIMIT)
            if not read:
                self._block = None
                return None
            self._block = _flatten(read, self._dtype)
        return self._block, self._used

    def advance(self, n: int) -> None:
        """Count `n` more rows of the current block as used."""
        self._used += n

    def state_dict(self) -> dict[str, Any]:
        if self._block is None or self._used == self._block["tokens"].shape[0]:
            return {"begun": self._reader.state_dict(), "used": 0}
        return {"begun": self._begun, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reader.load_state_dict(state["begun"])
        self._block = None
        if state["used"]:
            self.current()
            self._used = state["used"]


class RowBatches:
    """Batches of single tokens in the order of the sources. A short last batch is dropped unless it is the only one."""

    light = True

    def __init__(self, rows: Rows, batch_size: int, dtype: torch.dtype):
        self._rows = rows
        self._batch_size = batch_size
        self._dtype = dtype
        self._given = 0

    def next(self) -> Batch | None:
        batch: Batch = {}
        filled = 0
        while filled < self._batch_size and (current := self._rows.current()):
            block, used = current
            if not filled and not used and self._is_batch(block):
                self._rows.advance(self._batch_size)
                self._given += 1
                return block
            if not batch:
                batch = _empty_like(block, self._batch_size, self._dtype)
            taken = min(self._batch_size - filled, block["tokens"].shape[0] - used)
            for key, out in batch.items():
                copy_rows(out[filled : filled + taken], block[key][used : used + taken])
            self._rows.advance(taken)
            filled += taken
        if not filled or (filled < self._batch_size and self._given):
            return None
        self._given += 1
        return {key: out[:filled] for key, out in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows.state_dict(), "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state["rows"])
        self._given = state["given"]

    def _is_batch(self, block: Batch) -> bool:
        if block["tokens"].shape[0] != self._batch_size:
            return False
        return all(x.dtype == self._dtype and x.is_cpu for x in block.values() if x.is_floating_point())


class ShuffledRowBatches:
    """Batches of single tokens taken at random from a buffer. The last batch as in `RowBatches`.

    The state holds the buffer's rows.
    """

    light = False

    def __init__(self, rows: Rows, buffer: ShuffleBuffer, batch_size: int, dtype: torch.dtype, activity: Activity):
        self._rows = rows
        self._buffer = buffer
        self._activity = activity
        self._batch_size = batch_size
        self._dtype = dtype
        self._given = 0

    def next(self) -> Batch | None:
        while self._buffer.n_free:
            current = self._rows.current()
            with self._activity.doing("shuffling"):
                if current is None:
                    self._buffer.drain()
                    break
                self._rows.advance(self._buffer.put(*current))
        with self._activity.doing("shuffling"):
            batch = self._buffer.take(self._dtype)
        n = batch["tokens"].shape[0] if batch else 0
        if not n or (n < self._batch_size and self._given):
            return None
        self._given += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows.state_dict(), "buffer": self._buffer.state_dict(), "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state["rows"])
        self._buffer.load_state_dict(state["buffer"])
        self._given = state["given"]


def _flatten(blocks: Sequence[Batch], dtype: torch.dtype) -> Batch:
    """The tokens of `blocks` that count, as one block of rows; in `dtype` where they come from several."""
    flat: list[Batch] = []
    for block in blocks:
        if "mask" in block:
            counts = block["mask"].flatten().nonzero().squeeze(1)
            tensors = {key: x for key, x in block.items() if key not in ("mask", "meta")}
            block = {key: x.flatten(0, 1).index_select(0, counts.to(x.device)) for key, x in tensors.items()}
        flat.append(block)
    return flat[0] if len(flat) == 1 else _join(flat, sum(len(block["tokens"]) for block in flat), dtype, flat[0])


def _join(blocks: Sequence[Batch], n: int, dtype: torch.dtype, keys: Iterable[str]) -> Batch:
    joined = _empty_like({key: blocks[0][key] for key in keys}, n, dtype)
    start = 0
    for block in blocks:
        end = start + block["tokens"].shape[0]
        for key, out in joined.items():
            copy_rows(out[start:end], block[key])
        start = end
    return joined


def _empty_like(block: Batch, n: int, dtype: torch.dtype) -> Batch:
    """Room on the CPU for `n` rows like those of `block`, floating-point ones in `dtype`."""
    return {
        key: torch.empty(n, *x.shape[1:], dtype=dtype if x.is_floating_point() else x.dtype) for key, x in block.items()
    }
