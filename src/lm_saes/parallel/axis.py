"""Axes with several processes: collectives over a process group of torch.distributed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lm_saes.axes.axis import Axis
from lm_saes.errors import LostProcessError


class SharedAxis(Axis):
    """An axis that the processes of `group` share, in order of their ranks in it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.place = dist.get_world_size(group), dist.get_rank(group)
        self.traffic: Counter[str] = Counter()
        """Bytes that this process has handed to each kind of collective."""

    def enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self) if x.requires_grad else x  # type: ignore[return-value]

    def leave(self, y: Tensor) -> Tensor:
        return _Leave.apply(y, self)  # type: ignore[return-value]

    def beside(self, own: Tensor) -> Tensor:
        return _Beside.apply(own, self)  # type: ignore[return-value]

    def total(self, v: Tensor) -> Tensor:
        return self.reduce(v.detach().clone(memory_format=torch.contiguous_format))

    def count(self, n: int) -> int:
        return int(self.reduce(torch.tensor(n)))

    def fewest(self, n: int) -> int:
        return int(self.reduce(torch.tensor(n), dist.ReduceOp.MIN))

    def add_up(self, own: Tensor) -> Callable[[], object]:
        self.traffic["all_reduce"] += own.nbytes
        with answers():
            sum_begun = dist.all_reduce(own, group=self.group, async_op=True)

        def wait() -> None:
            with answers():
                sum_begun.wait()  # type: ignore[union-attr]

        return wait

    def smallest(self, v: Tensor) -> Tensor:
        return self.reduce(v.detach().clone(memory_format=torch.contiguous_format), dist.ReduceOp.MIN)

    def top(self, candidates_RC: Tensor, k: int, limit: Tensor | None = None) -> Tensor:
        """Each process offers its k best; equal values are taken in the order of places."""
        n_rows, n_own = candidates_RC.shape
        width = min(k, -self.fewest(-n_own))
        offered_RK = candidates_RC.new_full((n_rows, width), -torch.inf)
        best = candidates_RC.topk(min(width, n_own), dim=1)
        offered_RK[:, : best.values.shape[1]] = best.values
        all_RX = self.gather(offered_RK).transpose(0, 1).flatten(1)
        order_RX = all_RX.argsort(dim=1, descending=True, stable=True)[:, :k]
        within = torch.arange(order_RX.shape[1], device=order_RX.device) < (k if limit is None else limit)
        chosen_RX = torch.zeros_like(all_RX, dtype=torch.bool).scatter_(1, order_RX, within.expand_as(order_RX))
        mine_RK = chosen_RX[:, self.place * width : self.place * width + best.indices.shape[1]]
        return torch.zeros_like(candidates_RC, dtype=torch.bool).scatter_(1, best.indices, mine_RK)

    def join(self, rows: Tensor) -> Tensor:
        lengths = self.gather(torch.tensor([len(rows)])).flatten().tolist()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        flags = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
        parts = [part[:n] for part, n in zip(self.gather(flags), lengths, strict=True)]
        return torch.cat(parts).to(rows.dtype)

    def reduce(self, own: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a contiguous tensor over the axis, in place."""
        self.traffic["all_reduce"] += own.nbytes
        with answers():
            dist.all_reduce(own, op, self.group)
        return own

    def gather(self, own: Tensor) -> Tensor:
        """The processes' tensors, all of one shape, stacked in order of their places."""
        self.traffic["all_gather"] += own.nbytes
        out = own.new_empty(self.size, *own.shape)
        with answers():
            dist.all_gather(list(out.unbind()), own.contiguous(), self.group)
        return out


@contextmanager
def answers() -> Iterator[None]:
    """Turn the failure of a collective into the error that it nearly always means."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).partition(". This is typically")[0]
        raise LostProcessError(f"another process of the run has ended or does not answer ({reason})") from error


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: SharedAxis) -> Tensor:  # type: ignore[override]
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):  # type: ignore[override]
        return ctx.axis.total(dx), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, axis: SharedAxis) -> Tensor:  # type: ignore[override]
        return axis.total(y)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        return dy, None


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, axis: SharedAxis) -> Tensor:  # type: ignore[override]
        ctx.axis = axis
        return axis.gather(own).flatten(0, 1)

    @staticmethod
    def backward(ctx, dall: Tensor):  # type: ignore[override]
        return dall.chunk(ctx.axis.size)[ctx.axis.place], None
