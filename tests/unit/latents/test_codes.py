"""Codes by hand: both kinds have the same verbs, and an entry counts if and only if its value is positive."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode

# Row 0 holds latents 1 and 3, row 1 holds nothing, row 2 holds latent 0 with value 0 (padding) and latent 3.
LATENTS = [[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]]
PATTERN = Pattern(torch.tensor([1, 3, 0, 3], dtype=torch.int32), torch.tensor([0, 2, 2, 4], dtype=torch.int32), 4)


def sparse() -> SparseCode:
    return SparseCode(torch.tensor([2.0, 1.0, 0.0, 5.0]), PATTERN)


def dense() -> DenseCode:
    return DenseCode(torch.tensor(LATENTS))


both = pytest.mark.parametrize("make", [sparse, dense])
MakeCode = Callable[[], Code]


@both
def test_shape_and_dense(make: MakeCode) -> None:
    code = make()
    assert (code.n_rows, code.n_latents) == (3, 4)
    assert code.dense().tolist() == LATENTS


@both
def test_sums_of_entries_weighed_by_latent_and_row(make: MakeCode) -> None:
    code = make()
    weighed = code.values * code.at(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert code.sum_rows(weighed).tolist() == [1020.0, 0.0, 5000.0]
    assert code.sum_latents(weighed).tolist() == [0.0, 20.0, 0.0, 6000.0]
    by_row = code.values * code.of_row(torch.tensor([1.0, 10.0, 100.0]))
    assert code.sum_rows(by_row).tolist() == [3.0, 0.0, 500.0]
    assert code.sum_latents(by_row).tolist() == [0.0, 2.0, 0.0, 501.0]


@both
def test_entries_are_the_active_ones_by_row(make: MakeCode) -> None:
    rows, latents, values = make().entries()
    assert (rows.tolist(), latents.tolist(), values.tolist()) == ([0, 0, 2], [1, 3, 3], [2.0, 1.0, 5.0])
    assert (rows.dtype, latents.dtype) == (torch.int64, torch.int64)


@both
@pytest.mark.parametrize(
    ("mask", "want"),
    [(None, [0, 1, 0, 2]), ([True, True, False], [0, 1, 0, 1]), ([False, True, True], [0, 0, 0, 1])],
)
def test_counts_leave_masked_rows_and_padding_out(make: MakeCode, mask: list[bool] | None, want: list[int]) -> None:
    assert make().counts(None if mask is None else torch.tensor(mask)).tolist() == want


@both
def test_decode_by_hand(make: MakeCode) -> None:
    W_FD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    assert make().decode(W_FD).tolist() == [[13.0, 16.0], [0.0, 0.0], [35.0, 40.0]]


def test_the_layout_of_a_sparse_code() -> None:
    code = sparse()
    assert (code.indices.tolist(), code.offsets.tolist()) == ([1, 3, 0, 3], [0, 2, 2, 4])
    assert code.rows.tolist() == [0, 0, 2, 2]


def test_an_empty_code() -> None:
    pattern = Pattern(torch.zeros(0, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), 4)
    values = torch.zeros(0, requires_grad=True)
    code, W_FD = SparseCode(values, pattern), torch.ones(4, 2, requires_grad=True)
    y = code.decode(W_FD)
    assert y.tolist() == [[0.0, 0.0]] * 2
    assert code.counts().tolist() == [0] * 4
    dvalues, dW = torch.autograd.grad(y.sum(), [values, W_FD])
    assert dvalues.shape == (0,)
    assert dW.tolist() == [[0.0, 0.0]] * 4


def random_pattern(n_rows: int, n_latents: int, lengths: list[int]) -> Pattern:
    draw = torch.Generator().manual_seed(0)
    indices = [torch.randperm(n_latents, generator=draw)[:n] for n in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert len(lengths) == n_rows
    return Pattern(torch.cat(indices).to(torch.int32), offsets.to(torch.int32), n_latents)


def gradcheck_inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_gradients_of_decode() -> None:
    pattern = random_pattern(5, 7, [3, 0, 1, 7, 2])
    values, W_FD = gradcheck_inputs((13,), (7, 4))
    assert torch.autograd.gradcheck(lambda v, W: SparseCode(v, pattern).decode(W), (values, W_FD))


def test_gradients_of_the_sums() -> None:
    pattern = random_pattern(4, 6, [2, 0, 5, 1])
    values, v_F, v_N = gradcheck_inputs((8,), (6,), (4,))

    def sums(values: Tensor, v_F: Tensor, v_N: Tensor) -> tuple[Tensor, ...]:
        code = SparseCode(values, pattern)
        entries = torch.tanh(code.values * code.at(v_F) * code.of_row(v_N))
        return code.sum_rows(entries), code.sum_latents(entries), code.dense()

    assert torch.autograd.gradcheck(sums, (values, v_F, v_N))


def test_sparse_and_dense_codes_agree_with_gradients() -> None:
    pattern = random_pattern(6, 9, [4, 1, 0, 9, 2, 3])
    values, W_FD, v_F, target = gradcheck_inputs((19,), (9, 5), (9,), (6, 5))
    code = SparseCode(values.abs(), pattern)
    found = []
    for each in (code, DenseCode(code.dense())):
        y = each.decode(W_FD)
        loss = (y * target).sum() + each.sum_rows(torch.tanh(each.values * each.at(v_F))).square().sum()
        found.append([y, *torch.autograd.grad(loss, [values, W_FD, v_F], retain_graph=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
