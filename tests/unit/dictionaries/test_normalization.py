"""Average norms and the geometric median, by hand and against a general minimiser."""

import pytest
import torch

from lm_saes.dictionaries.normalization import average_norms, geometric_median

from .twin import IN, distances, least_distance


def test_average_norms_weigh_tokens_not_batches() -> None:
    one = {IN: torch.tensor([[[3.0, 4.0], [30, 40]]]), "tokens": torch.zeros(1, 2), "mask": torch.tensor([[1, 0]])}
    two = {IN: torch.tensor([[[0.0, 1.0], [1, 0]], [[2, 0], [0, 3]]]), "tokens": torch.zeros(2, 2)}
    assert average_norms([one, two], [IN]) == {IN: pytest.approx((5 + 1 + 1 + 2 + 3) / 5)}


@pytest.mark.parametrize(("n", "d"), [(5, 2), (40, 3), (200, 8), (300, 64)])
def test_geometric_median_is_where_a_general_minimiser_ends(n: int, d: int) -> None:
    x_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64) ** 3
    x_ND[: n // 5] += 30  # a fifth of outliers, which a mean follows
    got = geometric_median(x_ND)
    best = distances(least_distance(x_ND), x_ND)
    assert float(distances(got, x_ND)) == pytest.approx(float(best), rel=1e-6)
    assert float(distances(x_ND.mean(0), x_ND)) > 1.02 * float(best)


@pytest.mark.parametrize(
    ("points", "want"),
    [
        ([[0.0], [1.0], [10.0]], [1.0]),
        ([[2.0, 3.0]], [2.0, 3.0]),
        ([[2.0, 3.0]] * 4, [2.0, 3.0]),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0, 0.0]),
        ([[0.0, 0.0]] * 5 + [[9.0, 0.0], [0.0, 7.0], [-3.0, 1.0]], [0.0, 0.0]),  # more than half lie in one point
        ([[0.0]] * 3 + [[3.0], [-1.0], [-1.0], [-1.0]], [0.0]),  # their mean is one of them
    ],
)
def test_geometric_median_by_hand(points: list[list[float]], want: list[float]) -> None:
    assert geometric_median(torch.tensor(points)).tolist() == pytest.approx(want, abs=1e-4)
