"""The sparse products against loops written out, and that they repeat themselves bit for bit."""

import pytest
import torch
from torch import Tensor

from lm_saes.latents import kernels

# Three rows: the first holds latents 1 and 3, the second nothing, the third latent 1 (twice the row's work by hand).
INDICES = torch.tensor([1, 3, 1], dtype=torch.int32)
OFFSETS = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
ROWS = torch.tensor([0, 0, 2], dtype=torch.int32)
TABLE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])


def random_entries(n_rows: int, n_latents: int, n_entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (ascending), latents and row offsets of random entries; some rows are empty."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.randint(n_rows, (n_entries,), generator=draw).sort().values.to(torch.int32)
    indices = torch.randint(n_latents, (n_entries,), generator=draw).to(torch.int32)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
    return rows, indices, offsets


def test_gather_sum_by_hand() -> None:
    got = kernels.gather_sum(torch.tensor([10.0, 1.0, -1.0]), INDICES, OFFSETS, TABLE)
    assert got.tolist() == [[37.0, 48.0], [0.0, 0.0], [-3.0, -4.0]]


def test_row_dot_by_hand() -> None:
    left = torch.tensor([[1.0, 1.0], [9.0, 9.0], [0.0, 2.0]])
    assert kernels.row_dot(left, TABLE, ROWS, INDICES, OFFSETS).tolist() == [7.0, 15.0, 8.0]


def test_transpose_by_hand() -> None:
    order, offsets = kernels.transpose(INDICES, 4)
    assert order.tolist() == [0, 2, 1]  # stable: latent 1 keeps its rows in order
    assert offsets.tolist() == [0, 0, 2, 2, 3]


def test_no_entries() -> None:
    none, empty = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    offsets = torch.zeros(4, dtype=torch.int32)
    assert kernels.gather_sum(none, empty, offsets, TABLE).tolist() == [[0.0, 0.0]] * 3
    assert kernels.row_dot(torch.ones(3, 2), TABLE, empty, empty, offsets).shape == (0,)
    order, latent_offsets = kernels.transpose(empty, 4)
    assert order.numel() == 0
    assert latent_offsets.tolist() == [0] * 5


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("width", [1, 3, 64, 130])
def test_against_loops(width: int, contiguous: bool) -> None:
    rows, indices, offsets = random_entries(n_rows=17, n_latents=11, n_entries=60)
    draw = torch.Generator().manual_seed(4)
    weights = torch.randn(60, generator=draw, dtype=torch.float64)
    table = torch.randn(11, width, generator=draw, dtype=torch.float64)
    left = torch.randn(17, width, generator=draw, dtype=torch.float64)
    want = torch.zeros(17, width, dtype=torch.float64)
    dots = torch.zeros(60, dtype=torch.float64)
    for e in range(60):
        want[rows[e]] += weights[e] * table[indices[e]]
        dots[e] = (left[rows[e]] * table[indices[e]]).sum()
    if not contiguous:
        table, left = table.T.contiguous().T, left.T.contiguous().T
    torch.testing.assert_close(kernels.gather_sum(weights, indices, offsets, table), want)
    torch.testing.assert_close(kernels.row_dot(left, table, rows, indices, offsets), dots)


def test_the_transpose_lists_every_entry_by_latent_and_then_by_row() -> None:
    rows, indices, _ = random_entries(n_rows=17, n_latents=11, n_entries=60)
    order, offsets = kernels.transpose(indices, 11)
    want = sorted(range(60), key=lambda e: (int(indices[e]), e))
    assert order.tolist() == want
    for latent in range(11):
        segment = order[offsets[latent] : offsets[latent + 1]]
        assert indices[segment].eq(latent).all()
        assert rows[segment].diff().ge(0).all()


def test_the_same_bits_every_time() -> None:
    rows, indices, offsets = random_entries(n_rows=300, n_latents=50, n_entries=4000)
    draw = torch.Generator().manual_seed(5)
    weights, table = torch.randn(4000, generator=draw), torch.randn(50, 96, generator=draw)
    left = torch.randn(300, 96, generator=draw)
    first = kernels.gather_sum(weights, indices, offsets, table)
    dots = kernels.row_dot(left, table, rows, indices, offsets)
    for _ in range(3):
        assert torch.equal(kernels.gather_sum(weights, indices, offsets, table), first)
        assert torch.equal(kernels.row_dot(left, table, rows, indices, offsets), dots)
