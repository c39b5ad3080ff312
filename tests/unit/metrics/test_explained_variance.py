"""The accumulator of explained variance: worked by hand, in parts, from another origin."""

import pytest
import torch
from torch import Tensor

from lm_saes.metrics.explained_variance import ExplainedVariance

# Two sites, four tokens. Site 0: labels (3,4), (0,0), (6,8), (3,4), mean (3,4), so 0 + 25 + 25 + 0 = 50 about it.
# Site 1: labels (1,0), (1,0), (5,0), (5,0), mean (3,0), so 4 * 4 = 16.
Y = torch.tensor([[[3.0, 4.0], [0, 0], [6, 8], [3, 4]], [[1, 0], [1, 0], [5, 0], [5, 0]]])
ERROR = torch.tensor([[10.0, 0, 5, 5], [4, 4, 8, 8]])
EXPECTED = [1 - 20 / 50, 1 - 24 / 16]


def of(y_GND: Tensor, error_GN: Tensor) -> ExplainedVariance:
    tokens = torch.tensor(float(y_GND.shape[1]))
    return ExplainedVariance.of(tokens, y_GND, y_GND.square().sum(-1), error_GN)


def test_by_hand() -> None:
    whole = of(Y, ERROR)
    assert whole.variation.tolist() == [50, 16]
    assert whole.by_site().tolist() == EXPECTED


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_parts_add_up(cut: int) -> None:
    parts = of(Y[:, :cut], ERROR[:, :cut]) + of(Y[:, cut:], ERROR[:, cut:])
    assert parts.by_site().tolist() == EXPECTED


def test_the_origin_does_not_matter() -> None:
    assert of(Y - torch.tensor([2.0, -1.0]), ERROR).by_site().tolist() == EXPECTED


def test_sums_come_back() -> None:
    sums = dict(of(Y, ERROR).sums()) | {"another": torch.zeros(())}
    assert ExplainedVariance.from_sums(sums).by_site().tolist() == EXPECTED


def test_labels_that_do_not_vary_leave_nothing_to_explain() -> None:
    same = of(torch.ones(1, 3, 2), torch.ones(1, 3))
    assert same.variation.tolist() == [0] and same.by_site().item() < -1e300
