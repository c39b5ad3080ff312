"""Each wrapper around a private interface of torch against what its docstring says takes its place."""

import pytest
import torch
from torch import Tensor

from lm_saes.torch_private import AdamOfViews, backward_pass, fused_adam_, row_dots, step_if, zero_where_inactive_


class Watched(torch.autograd.Function):
    seen: list[int]

    @staticmethod
    def forward(ctx, x, seen):  # type: ignore[override]
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, dx):  # type: ignore[override]
        ctx.seen.append(backward_pass())
        return dx, None


def test_every_backward_pass_has_a_number_of_its_own() -> None:
    assert backward_pass() == -1
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        y: Tensor = Watched.apply(Watched.apply(x, seen), seen)  # type: ignore[assignment]
        y.sum().backward()
    assert seen[0] == seen[1] != seen[2] == seen[3] and -1 not in seen


def test_zero_where_inactive() -> None:
    gradient = torch.tensor([1.0, 2.0, -3.0, 4.0])
    assert zero_where_inactive_(gradient, torch.tensor([0.0, 0.5, 2.0, -1.0])) is gradient
    assert gradient.tolist() == [0, 2, -3, 0]


def test_row_dots() -> None:
    g = torch.Generator().manual_seed(0)
    left, table = torch.randn(3, 4, generator=g), torch.randn(5, 4, generator=g)
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([4, 1, 1])
    found = row_dots(left, table, rows, columns, torch.tensor([0, 2, 2, 3]))
    torch.testing.assert_close(found, (left[rows] * table[columns]).sum(1))


def test_fused_adam_is_adam() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(3, 4, generator=g)
    ours, theirs = p.clone(), p.clone().requires_grad_()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    for step in (1, 2, 3):
        gradient = torch.randn(3, 4, generator=g)
        fused_adam_(ours, gradient, m, v, torch.tensor(float(step)), lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
        theirs.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(ours, theirs.detach())


class Transposed(AdamOfViews):
    def views(self, params, others) -> None:  # type: ignore[override]
        for tensors in (params, *others):
            tensors[:] = [t.T for t in tensors]


@pytest.mark.parametrize("taken", [True, False])
def test_adam_of_views_steps_if_it_is_taken(taken: bool) -> None:
    g = torch.Generator().manual_seed(0)
    stored, gradient = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    p, plain = stored.T.requires_grad_(), stored.clone().requires_grad_()
    p.grad, plain.grad = gradient.T, gradient
    expected = stored.clone()
    optimizer = Transposed([p], lr=0.1, fused=True)
    step_if(optimizer, torch.tensor(taken))
    if taken:
        torch.optim.Adam([plain], lr=0.1).step()
        expected = plain.detach()
    torch.testing.assert_close(p.detach().T, expected)
    assert not hasattr(optimizer, "found_inf")
