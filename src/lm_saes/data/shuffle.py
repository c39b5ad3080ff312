"""Shuffling in a buffer of fixed size: allocated once, filled in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_saes.data.batch import Batch
from lm_saes.data.rows import take_rows
from lm_saes.data.seeding import permutation


class ShuffleBuffer:
    """A buffer of `size` rows. While it is full, batches are taken from it at random and new rows take their places.

    A round is a random half of the buffer, taken one batch after another; rows that come in during a round wait for the
    next one. So a row stays for two rounds on average, and memory is constant: nothing of the buffer's size is copied.
    """

    def __init__(self, size: int, batch_size: int, dtype: torch.dtype, seed: int, device: str | None = None):
        self.size = size
        self.rows: dict[str, Tensor] = {}
        self._batch_size = batch_size
        self._dtype = dtype
        self._seed = seed
        self._device = device
        self._round = 0
        self._free = torch.arange(size)
        self._order = torch.empty(0, dtype=torch.int64)
        self._draining = False

    @property
    def n_free(self) -> int:
        """How many rows have to be put in before a batch can be taken."""
        return self._free.numel()

    def put(self, block: Batch, start: int) -> int:
        """Copy rows of `block` from `start` on into free places; how many it took."""
        if not self.rows:
            for name, x in block.items():
                dtype = self._dtype if x.is_floating_point() else x.dtype
                self.rows[name] = torch.empty(self.size, *x.shape[1:], dtype=dtype)
        taken = min(self.n_free, block["tokens"].shape[0] - start)
        slots, self._free = self._free[:taken], self._free[taken:]
        for name, held in self.rows.items():
            held.index_copy_(0, slots, block[name][start : start + taken].to(device="cpu", dtype=held.dtype))
        return taken

    def take(self, dtype: torch.dtype | None = None) -> Batch:
        """Take `batch_size` rows out of a full buffer, floating-point ones in `dtype` (None: the buffer's).

        After `drain`: of what is left, at the end fewer or none.
        """
        if not self._draining and self._order.numel() < self._batch_size:
            n_batches = max(1, self.size // 2 // self._batch_size)
            self._order = self._next_order(self.size)[: n_batches * self._batch_size]
        slots, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        if not self._draining:
            self._free = slots.sort().values
        return {name: take_rows(held, slots, dtype) for name, held in self.rows.items()}

    def drain(self) -> None:
        """No more rows will come: from now on `take` empties the buffer in random order."""
        if not self._draining:
            held = torch.ones(self.size, dtype=torch.bool)
            held[self._free] = False
            slots = held.nonzero().squeeze(1)
            self._order = slots[self._next_order(slots.numel())]
            self._draining = True

    def state_dict(self) -> dict[str, Any]:
        """Everything, the rows included (a copy of the buffer)."""
        return {
            "round": self._round,
            "draining": self._draining,
            "free": self._free.clone(),
            "order": self._order.clone(),
            "rows": {name: held.clone() for name, held in self.rows.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round, self._draining = state["round"], state["draining"]
        self._free, self._order = state["free"].clone(), state["order"].clone()
        self.rows = {name: held.clone() for name, held in state["rows"].items()}

    def _next_order(self, n: int) -> Tensor:
        self._round += 1
        return permutation(n, self._seed, "buffer", self._round, device=self._device)
