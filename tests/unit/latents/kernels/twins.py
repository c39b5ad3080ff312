"""Every Triton kernel against its plain twin, in float64, at odd shapes.

`test_triton.py` runs this file in a process of its own, with Triton's interpreter (`TRITON_INTERPRET=1` has to be set
before Triton is imported). On a machine with CUDA it also runs as it is:

    python -m pytest tests/unit/latents/kernels/twins.py

Letters: N rows, F latents, D width, E entries, k wanted columns, R rows with a gradient.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.codes import Pattern
from lm_saes.latents.kernels import cuda, plain

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class Shape:
    """Rows with so many entries each, of F latents and width D."""

    name: str
    lengths: tuple[int, ...]
    n_latents: int
    width: int


SHAPES = [
    Shape("one of all", (1,), 1, 1),
    Shape("empty rows, two tiles and a bit", (3, 0, 0, 5, 1, 0), 11, 260),
    Shape("no entries", (0, 0), 3, 5),
    Shape("no rows", (), 3, 5),
    Shape("one row with everything", (1000,), 7, 5),
    Shape("one row with everything after empty ones", (0, 0, 700, 0), 3, 3),
    Shape("exactly a chunk, and one more", (256, 257, 255), 9, 2),
    Shape("long rows side by side in one window", (300, 5, 290, 600, 1), 20, 3),
    Shape("more rows than one search step looks at", (1,) * 70 + (280,) + (0,) * 60 + (2,) * 5, 4, 2),
]


@dataclass(frozen=True)
class Entries:
    """Random entries of a shape, in float64."""

    weights: Tensor
    rows: Tensor
    indices: Tensor
    offsets: Tensor
    table: Tensor
    left: Tensor


def entries(shape: Shape) -> Entries:
    draw = torch.Generator().manual_seed(len(shape.lengths) + shape.width)
    n_rows, n_entries = len(shape.lengths), sum(shape.lengths)
    lengths = torch.tensor(shape.lengths, dtype=torch.int64)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int32)
    offsets[1:] = lengths.cumsum(0)
    made = (
        torch.randn(n_entries, dtype=torch.float64, generator=draw),
        torch.arange(n_rows, dtype=torch.int32).repeat_interleave(lengths),
        torch.randint(shape.n_latents, (n_entries,), generator=draw).to(torch.int32),
        offsets,
        torch.randn(shape.n_latents, shape.width, dtype=torch.float64, generator=draw),
        torch.randn(n_rows, shape.width, dtype=torch.float64, generator=draw),
    )
    return Entries(*[tensor.to(DEVICE) for tensor in made])


def assert_rounded(got: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """`got` is `want` up to rounding of inputs and result, given the sum of the terms' sizes.

    Sums are made in float32 at least, so their own rounding is that of a few float32 operations.
    """
    assert got.dtype == dtype
    exact = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = 20 * exact * size + torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
    excess = ((got.double() - want).abs() - allowed).clamp(min=0)
    assert not excess.any()


def rounded(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in a type, and what it then holds, in float64."""
    return tensor.to(dtype), tensor.to(dtype).double()


shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# -- sums over entries ---------------------------------------------------------------------------------------------


@shapes
def test_gather_sum(shape: Shape) -> None:
    e = entries(shape)
    want = plain.gather_sum(e.weights, e.indices, e.offsets, e.table)
    size = plain.gather_sum(e.weights.abs(), e.indices, e.offsets, e.table.abs())
    assert_rounded(cuda.gather_sum(e.weights, e.indices, e.offsets, e.table), want, size, torch.float64)


@dtypes
def test_gather_sum_in_each_type(dtype: torch.dtype) -> None:
    e = entries(Shape("", (300, 0, 7), 9, 130))
    (weights, weights64), (table, table64) = rounded(e.weights, dtype), rounded(e.table, dtype)
    want = plain.gather_sum(weights64, e.indices, e.offsets, table64)
    size = plain.gather_sum(weights64.abs(), e.indices, e.offsets, table64.abs())
    assert_rounded(cuda.gather_sum(weights, e.indices, e.offsets, table), want, size, dtype)


@shapes
def test_row_dot(shape: Shape) -> None:
    e = entries(shape)
    want = plain.row_dot(e.left, e.table, e.rows, e.indices, e.offsets)
    size = plain.row_dot(e.left.abs(), e.table.abs(), e.rows, e.indices, e.offsets)
    assert_rounded(cuda.row_dot(e.left, e.table, e.rows, e.indices, e.offsets), want, size, torch.float64)


@dtypes
def test_row_dot_in_each_type(dtype: torch.dtype) -> None:
    e = entries(Shape("", (3, 0, 17), 9, 300))
    (left, left64), (table, table64) = rounded(e.left, dtype), rounded(e.table, dtype)
    want = plain.row_dot(left64, table64, e.rows, e.indices, e.offsets)
    size = plain.row_dot(left64.abs(), table64.abs(), e.rows, e.indices, e.offsets)
    assert_rounded(cuda.row_dot(left, table, e.rows, e.indices, e.offsets), want, size, dtype)


def test_tensors_of_any_layout() -> None:
    e = entries(Shape("", (3, 0, 5, 2), 6, 12))
    table, left = e.table.T.contiguous().T, e.left.T.contiguous().T
    every_other = torch.stack([e.offsets, e.offsets + 99], 1).view(-1)[::2]
    want = cuda.gather_sum(e.weights, e.indices, e.offsets, e.table)
    assert torch.equal(cuda.gather_sum(e.weights, e.indices, every_other, table), want)
    part = torch.cat([e.table, e.table], 1)[:, : e.table.shape[1]]
    assert torch.equal(cuda.gather_sum(e.weights, e.indices, e.offsets, part), want)
    dots = cuda.row_dot(e.left, e.table, e.rows, e.indices, e.offsets)
    assert torch.equal(cuda.row_dot(left, table, e.rows, e.indices, e.offsets), dots)


def test_weights_may_be_finer_than_the_table() -> None:
    e = entries(Shape("", (3, 4), 6, 12))
    table, table64 = rounded(e.table, torch.bfloat16)
    want = plain.gather_sum(e.weights, e.indices, e.offsets, table64)
    size = plain.gather_sum(e.weights.abs(), e.indices, e.offsets, table64.abs())
    assert_rounded(cuda.gather_sum(e.weights.float(), e.indices, e.offsets, table), want, size, torch.bfloat16)


def test_many_entries_make_chunks_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CHUNK_ENTRIES", 2)
    monkeypatch.setattr(machine, "MOST_CHUNKS", 10)  # 77 entries: chunks of 8
    e = entries(Shape("", (30, 8, 9, 0, 1, 29), 6, 3))
    want = plain.gather_sum(e.weights, e.indices, e.offsets, e.table)
    torch.testing.assert_close(cuda.gather_sum(e.weights, e.indices, e.offsets, e.table), want)


def test_the_same_bits_every_time() -> None:
    e = entries(Shape("", (900, 3, 400), 12, 5))
    first = cuda.gather_sum(e.weights.float(), e.indices, e.offsets, e.table.float())
    again = cuda.gather_sum(e.weights.float(), e.indices, e.offsets, e.table.float())
    assert torch.equal(first, again)


@shapes
def test_the_transpose_and_the_gradient_of_the_weights(shape: Shape) -> None:
    e = entries(shape)
    order, offsets = cuda.transpose(e.indices, shape.n_latents)
    want = torch.zeros(shape.n_latents, shape.width, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, e.indices.long(), e.weights[:, None] * e.left[e.rows.long()])
    got = cuda.gather_sum(e.weights[order], e.rows[order], offsets, e.left)
    torch.testing.assert_close(got, want)


@shapes
def test_the_gradient_of_the_latents_with_entries_alone(shape: Shape) -> None:
    e = entries(shape)
    order, offsets = cuda.transpose(e.indices, 2 * shape.n_latents + 1)  # more than half of them have none
    whole = plain.gather_sum(e.weights[order], e.rows[order], offsets, e.left)
    touched = Pattern(e.indices, e.offsets, 2 * shape.n_latents + 1).touched
    assert touched[0].tolist() == e.indices.unique().tolist()
    assert touched[0].dtype == touched[1].dtype == torch.int32
    got = cuda.gather_sum(e.weights[order], e.rows[order], touched[1], e.left)
    torch.testing.assert_close(got, whole[touched[0].long()])


# -- selection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    name: str
    n_rows: int
    n_latents: int
    k: int


SELECTIONS = [
    Selection("k of 1", 3, 64, 1),
    Selection("latents left over from the groups", 5, 16 * 40 + 15, 8),
    Selection("twice as many groups as wanted columns", 2, 16 * 14, 7),
    Selection("fewer groups than that", 2, 16 * 14 - 1, 7),
    Selection("all of them", 3, 9, 9),
    Selection("one row", 1, 1000, 20),
    Selection("no rows", 0, 100, 3),
    Selection("more rows than a tile", 9, 16 * 260, 3),
    Selection("more candidates than a tile", 1, 16 * 140 + 1, 70),
]


@pytest.mark.parametrize("case", SELECTIONS, ids=lambda case: case.name)
@pytest.mark.parametrize("scaled", [True, False])
def test_top_of_product(case: Selection, scaled: bool) -> None:
    check_selection(case, scaled, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("product", "shift"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float64)],
)
def test_top_of_product_in_other_types(product: torch.dtype, shift: torch.dtype) -> None:
    check_selection(Selection("", 3, 16 * 50 + 3, 5), True, product, shift)


def test_the_groups_are_grouped_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MANY_GROUPS", 20)
    check_selection(Selection("", 3, 16 * 16 * 9 + 5, 2), True, torch.float32, torch.float32)


def check_selection(case: Selection, scaled: bool, product_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The selected entries are the largest; what is equal up to rounding may stand for each other."""
    draw = torch.Generator().manual_seed(case.n_latents)
    product = torch.randn(case.n_rows, 2 * case.n_latents, generator=draw).to(product_dtype).to(DEVICE)
    product = product[:, : case.n_latents]  # rows need not follow each other
    product[:, -1] = 9.0  # a column that may be in no group
    shift = torch.randn(case.n_latents, generator=draw).to(dtype).to(DEVICE)
    scale = (torch.rand(case.n_latents, generator=draw) + 0.5).to(dtype).to(DEVICE) if scaled else None
    got = cuda.top_of_product(product, scale, shift, case.k)
    want = plain.top_of_product(product, scale, shift, case.k)
    assert got.dtype == want.dtype == torch.int64
    assert got.shape == want.shape == (case.n_rows, case.k)
    assert all(len(set(row)) == case.k for row in got.tolist())
    s = product.double() * (1.0 if scale is None else scale.double()) + shift.double()
    chosen, best = (s.gather(1, columns).sort(1).values for columns in (got, want))
    torch.testing.assert_close(chosen, best, rtol=1e-6, atol=1e-6)  # rounding of s in float32


# -- sparse Adam -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_rows", "width", "touched"), [(37, 130, 11), (1, 1, 1), (5, 3, 0), (2100, 1, 900), (6, 300, 6)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sparse_adam(n_rows: int, width: int, touched: int, dtype: torch.dtype) -> None:
    got, want, gradient, rows = adam_problem(n_rows, width, touched, dtype)
    cuda.sparse_adam(*got, gradient, rows, 1e-2, 0.9, 0.999, 1e-8, 3)
    plain.sparse_adam(*want, gradient.double(), rows, 1e-2, 0.9, 0.999, 1e-8, 3)
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=4 * eps)


def test_sparse_adam_of_parameters_of_any_layout() -> None:
    got, want, gradient, rows = adam_problem(9, 20, 4, torch.float64)
    p, m, v = got = [tensor.T.contiguous().T for tensor in got]
    cuda.sparse_adam(p, m, v, gradient.T.contiguous().T, rows.long(), 1e-2, 0.9, 0.999, 1e-8, 1)
    plain.sparse_adam(*want, gradient, rows, 1e-2, 0.9, 0.999, 1e-8, 1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


State = tuple[Tensor, Tensor, Tensor]


def adam_problem(n_rows: int, width: int, touched: int, dtype: torch.dtype) -> tuple[State, State, Tensor, Tensor]:
    """Parameters and moments in a type and in float64; the gradient of some rows, with zeros in it."""
    draw = torch.Generator().manual_seed(n_rows)
    p, m = (torch.randn(n_rows, width, generator=draw).to(dtype) for _ in range(2))
    v = torch.rand(n_rows, width, generator=draw).to(dtype)
    gradient = torch.randn(touched, width, generator=draw).to(dtype)
    gradient = gradient.masked_fill(torch.rand(touched, width, generator=draw) < 0.3, 0)
    rows = torch.randperm(n_rows, generator=draw)[:touched].to(torch.int32)
    p, m, v = p.to(DEVICE), m.to(DEVICE), v.to(DEVICE)
    return (p, m, v), (p.double(), m.double(), v.double()), gradient.to(DEVICE), rows.to(DEVICE)
