"""Selection and sparse Adam in torch operations: by hand, and against the definition."""

import pytest
import torch

from lm_saes import machine
from lm_saes.latents.kernels import plain, sparse_adam, top_of_product
from lm_saes.training.optimizers import SparseAdam


def test_selection_by_hand() -> None:
    product = torch.tensor([[1.0, 2.0, 3.0, -4.0], [0.0, 0.0, 1.0, -1.0]])
    scale, shift = torch.tensor([10.0, 1.0, 0.0, -1.0]), torch.tensor([0.0, 0.5, 0.0, 0.25])
    # s: [10, 2.5, 0, 4.25], [0, 0.5, 0, 1.25]
    assert top_of_product(product, scale, shift, 2).sort(1).values.tolist() == [[0, 3], [1, 3]]
    # without a scale: [1, 2.5, 3, -3.75], [0, 0.5, 1, -0.75]
    assert top_of_product(product, None, shift, 1).tolist() == [[2], [2]]


@pytest.mark.parametrize(("n_rows", "n_latents", "k"), [(1, 5, 5), (7, 1000, 9), (40, 333, 1), (0, 40, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_that_of_one_topk(
    n_rows: int, n_latents: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CORE_CACHE_BYTES", 5000)  # a few rows at a time
    draw = torch.Generator().manual_seed(n_latents)
    product = torch.randn(n_rows, n_latents, generator=draw).to(dtype)
    scale, shift = torch.rand(n_latents, generator=draw), torch.randn(n_latents, generator=draw)
    got = top_of_product(product, scale, shift, k)
    want = torch.addcmul(shift, product.float(), scale).topk(k, dim=1, sorted=False).indices
    assert got.dtype == torch.int64
    assert torch.equal(got.sort(1).values, want.sort(1).values)


def test_entries_are_compared_in_float32_at_least() -> None:
    product = torch.tensor([[256.0, 256.0]], dtype=torch.bfloat16)
    shift = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)  # 256.5 and 256.25 are one number in bfloat16
    assert top_of_product(product, None, shift, 1).tolist() == [[0]]


def test_sparse_adam_by_hand() -> None:
    p, m, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [0.5]]), torch.tensor([[4.0], [4.0]])
    sparse_adam(p, m, v, torch.tensor([[3.0]]), torch.tensor([1], dtype=torch.int32), 0.1, 0.5, 0.75, 1.0, 1)
    # row 0 only decays; row 1: m = 0.25 + 1.5, v = 3 + 0.25 x 9, size = 0.1 x 0.5 / 0.5
    assert m.tolist() == [[0.25], [1.75]]
    assert v.tolist() == [[3.0], [5.25]]
    torch.testing.assert_close(p, torch.tensor([[1.0], [2.0 - 0.1 * 1.75 / (5.25**0.5 + 1)]]))


def test_sparse_adam_is_the_optimizer_without_its_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CORE_CACHE_BYTES", 1000)  # a few rows at a time
    draw = torch.Generator().manual_seed(0)
    dense = torch.nn.Parameter(torch.randn(50, 6, generator=draw, dtype=torch.float64))
    optimizer = SparseAdam([dense], lr=0.01, betas=(0.9, 0.99))
    p = dense.detach().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 5):
        rows = torch.randperm(50, generator=draw)[:20]
        gradient = torch.randn(20, 6, generator=draw, dtype=torch.float64)
        gradient = gradient.masked_fill(torch.rand(20, 6, generator=draw) < 0.4, 0)
        dense.grad = torch.zeros_like(dense).index_copy(0, rows, gradient)
        optimizer.step()
        sparse_adam(p, m, v, gradient, rows, 0.01, 0.9, 0.99, 1e-8, step)
        torch.testing.assert_close(p, dense.detach())
    torch.testing.assert_close(m, optimizer.state[dense]["exp_avg"])
    torch.testing.assert_close(v, optimizer.state[dense]["exp_avg_sq"])


@pytest.mark.parametrize("rows", [torch.tensor([4, 0, 3]), torch.tensor([4, 0])])
def test_sparse_adam_of_parameters_of_any_layout(rows: torch.Tensor) -> None:
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(len(rows), 7, generator=draw)
    p, m, v = state = [torch.rand(5, 7, generator=draw) for _ in range(3)]
    turned_p, turned_m, turned_v = turned = [x.T.contiguous().T for x in state]
    sparse_adam(p, m, v, gradient, rows, 0.01, 0.9, 0.99, 1e-8, 2)
    sparse_adam(turned_p, turned_m, turned_v, gradient, rows, 0.01, 0.9, 0.99, 1e-8, 2)
    assert all(torch.equal(x, y) for x, y in zip(state, turned, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparse_adam_is_the_same_whether_zeros_are_given_or_left_out(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, gradient = torch.tensor([7, 1], dtype=torch.int32), torch.randn(2, 5, generator=draw).to(dtype)
    gradient[0, 2] = 0
    whole = torch.zeros(9, 5, dtype=dtype).index_copy(0, rows.long(), gradient)
    few = [torch.rand(9, 5, generator=draw).to(dtype) for _ in range(3)]
    all_of_them = [x.clone() for x in few]
    sparse_adam(*few, gradient, rows, 0.01, 0.9, 0.99, 1e-8, 3)  # type: ignore[arg-type]
    sparse_adam(*all_of_them, whole, torch.arange(9), 0.01, 0.9, 0.99, 1e-8, 3)  # type: ignore[arg-type]
    for got, want in zip(few, all_of_them, strict=True):
        torch.testing.assert_close(got, want)


def test_sparse_adam_with_no_row_only_decays() -> None:
    p, m, v = torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2)
    sparse_adam(p, m, v, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 0.1, 0.5, 0.25, 1e-8, 1)
    assert (p == 1).all()
    assert (m == 0.5).all()
    assert (v == 0.25).all()


@pytest.mark.parametrize("parts", [2, 5, 8])
def test_rows_that_are_read_often_are_summed_some_columns_at_a_time(
    monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    table_XD, weights_E = torch.randn(30, 37, generator=draw), torch.randn(16 * 43, generator=draw)
    indices_E = torch.randint(30, (len(weights_E),), generator=draw).int()
    offsets = torch.tensor([0, 5, 5, *range(20, 120, 10), len(weights_E)], dtype=torch.int32)
    whole = plain.gather_sum(weights_E, indices_E, offsets, table_XD)
    rows_E = torch.repeat_interleave(torch.arange(13), (offsets[1:] - offsets[:-1]).long())
    by_hand = torch.zeros(13, 37).index_add_(0, rows_E, weights_E[:, None] * table_XD[indices_E.long()])
    torch.testing.assert_close(whole, by_hand)
    monkeypatch.setattr(machine, "CORE_CACHE_BYTES", table_XD.nbytes // parts)
    widths = list[int]()
    embedding_bag = plain.nnf.embedding_bag

    def spy(indices: torch.Tensor, table: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        widths.append(table.shape[1])
        return embedding_bag(indices, table, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(plain.nnf, "embedding_bag", spy)
    torch.testing.assert_close(plain.gather_sum(weights_E, indices_E, offsets, table_XD), whole, rtol=0, atol=0)
    assert len(widths) == parts and sum(widths) == 37
