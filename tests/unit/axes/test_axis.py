"""The local latent axis: nothing is elsewhere, and the top is exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lm_saes.axes.axis import Axis

AXIS = Axis()


@pytest.mark.parametrize("operation", [AXIS.enter, AXIS.leave, AXIS.total])
def test_with_one_process_nothing_changes(operation: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = operation(x)
    assert torch.equal(y, x)
    assert torch.autograd.grad((y * torch.tensor([3.0, 4.0])).sum(), x)[0].tolist() == [3.0, 4.0]


def test_top_by_hand() -> None:
    got = AXIS.top(torch.tensor([[3.0, 1.0, 2.0], [-1.0, -3.0, -2.0]]), 2)
    assert got.tolist() == [[True, False, True], [True, False, True]]


@pytest.mark.parametrize("k", [3, 4, 100])
def test_fewer_candidates_than_k_are_all_chosen(k: int) -> None:
    assert AXIS.top(torch.tensor([[3.0, -1.0, 2.0]]), k).all()


@pytest.mark.parametrize("k", [1, 5, 63])
def test_ties_are_broken_the_same_way_every_time_and_exactly_k_are_chosen(k: int) -> None:
    candidates = torch.tensor([1.0, 1.0, 2.0, 0.0]).repeat(3, 16)
    first = AXIS.top(candidates, k)
    assert first.sum(1).tolist() == [k] * 3
    for _ in range(3):
        assert torch.equal(AXIS.top(candidates, k), first)
    assert torch.equal(first[0], first[1])  # a row's choice depends on that row alone
    smallest_kept = torch.where(first, candidates, torch.inf).amin(1)
    assert (torch.where(first, -torch.inf, candidates).amax(1) <= smallest_kept).all()


@pytest.mark.parametrize("limit", [0, 2, 3, 9])
def test_a_limit_that_only_the_device_knows(limit: int) -> None:
    candidates = torch.tensor([[3.0, 1.0, 2.0, 5.0], [-1.0, -3.0, -2.0, -5.0]])
    got = AXIS.top(candidates, 3, torch.tensor(limit))
    assert torch.equal(got, AXIS.top(candidates, min(3, limit)) if limit else torch.zeros_like(got))
    assert got.sum(1).tolist() == [min(3, limit)] * 2
    assert AXIS.top(candidates, 9, torch.tensor(limit)).sum(1).tolist() == [min(4, limit)] * 2
