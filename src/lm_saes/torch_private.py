"""torch's private interfaces, each behind a function that says why, and what takes its place when it goes.

Nothing else in the package names one: when torch changes, this is the file that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def backward_pass() -> int:
    """Number of the backward pass that runs now; -1 outside of one.

    Why: what a consumer left in an earlier pass that never reached its producer must not count in a later one.
    Instead: a counter that whoever calls `backward` raises.
    """
    return torch._C._current_graph_task_id()


def zero_where_inactive_(gradient: Tensor, active: Tensor) -> Tensor:
    """`gradient` set to 0, in place, where `active` is not above 0.

    Why: one pass through memory, without a mask. Instead: `gradient.mul_(active > 0)`.
    """
    return torch.ops.aten.threshold_backward.grad_input(gradient, active, 0, grad_input=gradient)


def row_dots(left_ND: Tensor, table_FD: Tensor, rows_E: Tensor, columns_E: Tensor, offsets: Tensor) -> Tensor:
    """`out[e] = <left[rows[e]], table[columns[e]]>`; `offsets` has one more entry than `left` has rows.

    Why: it gathers no `[E, D]` tensor. Instead: the gradient by `per_sample_weights` of `embedding_bag`, whose
    backward pass this is, or products of gathered rows a block at a time.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_ND, table_FD, columns_E, offsets[:-1], rows_E, 0
    )


def fused_adam_(
    p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: Tensor, *, lr: float, beta1: float, beta2: float,
    eps: float,
) -> None:  # fmt: skip
    """One update of Adam on contiguous tensors, in place; `step` (0-d, float32) is the number of this update.

    Why: one pass through memory for a block that lies in the cache. Instead: `torch.optim.Adam(fused=True)` on the
    whole parameter, or `m`, `v` and `p` one after the other.
    """
    torch.ops.aten._fused_adam_(
        [p], [gradient], [m], [v], [], [step],
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, amsgrad=False, maximize=False,
    )  # fmt: skip


class AdamOfViews(torch.optim.Adam):
    """Adam that lets a subclass hand other views to the update than parameters, gradients and moments as they are.

    Why: the fused kernel wants contiguous tensors, and a parameter may be contiguous in another order of dimensions.
    Instead: parameters that are views already.
    """

    def views(self, params: list[Tensor], others: Sequence[list[Tensor]]) -> None:
        """Put views in the place of `params` and of `others` (gradients, first and second moments), in the lists."""
        raise NotImplementedError

    def _init_group(
        self, group: Any, params_with_grad: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, max_exp_avg_sqs: Any,
        state_steps: Any,
    ) -> Any:  # fmt: skip
        found = super()._init_group(group, params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        self.views(params_with_grad, (grads, exp_avgs, exp_avg_sqs))
        return found


def step_if(optimizer: Optimizer, taken: Tensor) -> None:
    """Let a fused optimizer step; with `taken` (0-d bool) false, the device leaves weights, moments and counts alone.

    Why: the host need not wait to know. This is how torch's gradient scaler tells fused optimizers of overflow.
    Instead: `torch.amp.GradScaler` with a scale of 1, or to wait for `taken`.
    """
    optimizer.found_inf = (~taken).to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
