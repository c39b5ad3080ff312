"""Gradients of weights as rows: those of the latents that a batch touches, without the zeros of all others.

Matrices carry a `RowGradients`. While a step collects gradients, latents chosen by AuxK (on a CPU) and, for an
optimizer that works with rows, sparse codes add theirs to it and give autograd nothing for the parameter. Whatever
else reaches it (a dense batch, decoder norms) arrives in `p.grad` as usual and takes the rows in when all is
collected: after it a parameter has a `grad`, or rows for an optimizer that works with them. Outside of such a step
everything arrives in `p.grad`.

Rows are those of the parameter as it lies in memory, cut into as many equal parts as the code numbers latents.

Letters: U touched rows, D width of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lm_saes import machine

_CARRIED = "row_gradients"


class RowGradients:
    """The rows of one parameter's gradient that are not zero, summed up over the backward passes of a step."""

    def __init__(self, dtype: torch.dtype, suffice: bool = True) -> None:
        self.dtype = dtype
        self.suffice = suffice
        """Whether the optimizer needs nothing but rows."""
        self.open = False
        """Whether rows are taken now."""
        self.clear()

    @staticmethod
    def of(p: Tensor) -> RowGradients | None:
        """The one that a parameter carries."""
        return getattr(p, _CARRIED, None)

    @staticmethod
    def instead_of_grad(p: Tensor) -> RowGradients | None:
        """The one that holds a parameter's gradient; None: it is in `p.grad`, if there is any."""
        carried = RowGradients.of(p)
        return carried if p.grad is None and carried is not None and carried.n_rows else None

    def clear(self) -> None:
        """Forget all rows."""
        self.n_rows = 0
        """How many rows the whole parameter has; 0: nothing was added."""
        self.ids_U = torch.empty(0, dtype=torch.int32)
        """Which of them these are, ascending."""
        self.values_UD = torch.empty(0, 0, dtype=self.dtype)

    def add(self, n_rows: int, ids_U: Tensor, values_UD: Tensor) -> None:
        """Add the rows numbered `ids` (ascending, int32) out of `n_rows`."""
        values_UD = values_UD.to(self.dtype)
        if self.n_rows:
            known, rows_UD = len(self.ids_U), self.values_UD
            ids_U, places = torch.cat([self.ids_U, ids_U]).unique(return_inverse=True)
            sums_UD = rows_UD.new_zeros(len(ids_U), rows_UD.shape[1]).index_copy_(0, places[:known], rows_UD)
            values_UD = sums_UD.index_add_(0, places[known:], values_UD)
        self.n_rows, self.ids_U, self.values_UD = n_rows, ids_U, values_UD

    def join(self, p: Tensor) -> None:
        """Move the rows to the parameter's `grad`, if it has one or needs one."""
        if self.n_rows and p.grad is None and not self.suffice:
            p.grad = torch.zeros_like(p)
        if p.grad is not None and self.n_rows:
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
            p.grad.permute(storage_order(p)).view(self.n_rows, -1).index_add_(0, self.ids_U, self.values_UD)
            self.clear()


def carry_row_gradients(parameters: Iterable[Tensor], suffice: bool) -> None:
    """Let matrices among the parameters carry a `RowGradients`, whose rows suffice their optimizer or do not."""
    for p in parameters:
        setattr(p, _CARRIED, RowGradients(p.dtype, suffice) if p.ndim > 1 else None)


def receiver(p: Tensor, rows_FD: Tensor) -> RowGradients | None:
    """Who takes a parameter's gradient as rows at this moment, `rows_FD` being the parameter by rows; None: nobody."""
    carried = _taker(p, rows_FD)
    return carried if carried is not None and carried.suffice else None


def chosen_rows(p: Tensor, rows_FD: Tensor, latents: Tensor) -> Tensor:
    """`rows[latents]` (ascending) of a parameter by rows, with their gradient taken as rows where it can be."""
    taken_by = None if machine.waits_cost(p.device) else _taker(p, rows_FD)  # there latents may be listed twice, too
    if taken_by is None:
        return rows_FD.index_select(0, latents)
    return _Chosen.apply(rows_FD, latents, taken_by)  # type: ignore[return-value]


def _taker(p: Tensor, rows_FD: Tensor) -> RowGradients | None:
    carried = RowGradients.of(p)
    if carried is None or not carried.open or not p.requires_grad:
        return None
    as_stored = rows_FD.is_contiguous() and rows_FD.data_ptr() == p.data_ptr() and rows_FD.numel() == p.numel()
    return carried if as_stored else None


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_FD, latents, taken_by):  # type: ignore[override]
        ctx.latents, ctx.taken_by, ctx.n_rows = latents, taken_by, len(rows_FD)
        return rows_FD.index_select(0, latents)

    @staticmethod
    def backward(ctx, drows_XD):  # type: ignore[override]
        ctx.taken_by.add(ctx.n_rows, ctx.latents.to(torch.int32), drows_XD.flatten(1))
        return None, None, None


@contextmanager
def collecting(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Backward passes within add to the rows of those parameters that carry some."""
    carried = {p: rows for p in parameters if (rows := RowGradients.of(p)) is not None}
    for rows in carried.values():
        rows.clear()
        rows.open = True
    try:
        yield
    finally:
        for rows in carried.values():
            rows.open = False
    for p, rows in carried.items():
        rows.join(p)


def storage_order(p: Tensor) -> list[int]:
    """The dimensions of a tensor in the order that they are stored in."""
    return sorted(range(p.ndim), key=p.stride, reverse=True)
