"""Mixtures of low-rank maps: the three ways agree with whole matrices, and their gradients with finite differences."""

import pytest
import torch
from torch import Tensor

from lm_saes.latents.codes import DenseCode, SparseCode
from lm_saes.latents.encode import transforms
from lm_saes.latents.encode.transforms import Transforms, active_code
from lm_saes.machine import LOW_RANK

N, D = 7, 5


def random_transforms(ranks: dict[int, int], seed: int = 0) -> Transforms:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return Transforms(
        [(normal(n, r, D).mT.requires_grad_(), normal(n, r, D).requires_grad_()) for r, n in ranks.items()]
    )


def whole(given: Transforms) -> Tensor:
    return torch.cat([U_nDr @ V_nrD for U_nDr, V_nrD in given.groups])


def problem(n_latents: int, share: float = 0.4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Sparse `f`, of either sign, with an idle token and an idle latent; and inputs."""
    draw = torch.Generator().manual_seed(seed)
    f = torch.randn(N, n_latents, generator=draw, dtype=torch.float64)
    f = torch.where(torch.rand(f.shape, generator=draw) < share, f, 0)
    f[2], f[:, 1] = 0, 0
    return f, torch.randn(N, D, generator=draw, dtype=torch.float64)


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(transforms, "sparse_pays", lambda entries, places: request.param == "sparse")
    return request.param


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "sparse_pays", lambda entries, places: True)


@pytest.mark.parametrize("ranks", [{1: 4}, {3: 6}, {LOW_RANK: 4}, {1: 3, 4: 2, LOW_RANK + 1: 3}])
def test_mixing_and_its_gradients(path: str, ranks: dict[int, int]) -> None:
    given = random_transforms(ranks)
    f, x = problem(sum(ranks.values()))
    f, x = f.requires_grad_(), x.requires_grad_()
    code = active_code(f)
    assert isinstance(code, SparseCode if path == "sparse" else DenseCode)
    want = torch.einsum("nf,fde,ne->nd", f, whole(given), x)
    got = given.mix(code, x)
    torch.testing.assert_close(got, want)
    g = torch.randn(N, D, dtype=torch.float64)
    leaves = [f, x, *(matrix for group in given.groups for matrix in group)]
    found, wanted = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (got, want))
    wanted = [torch.where(f != 0, wanted[0], 0) if path == "sparse" else wanted[0], *wanted[1:]]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("rank", [2, LOW_RANK + 1])
def test_derivatives_are_right(rank: int) -> None:
    ((U, V),) = random_transforms({rank: 4}).groups
    f, x = problem(4)
    code = active_code(f)
    assert isinstance(code, SparseCode)
    values = code.values.clone().requires_grad_()

    def mix(values: Tensor, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        return Transforms([(U, V)]).mix(SparseCode(values, code.pattern), x)

    assert torch.autograd.gradcheck(mix, (values, x.requires_grad_(), U, V))
    assert torch.autograd.gradcheck(lambda U, V: Transforms([(U, V)]).norms(), (U, V))


@pytest.mark.usefixtures("always_sparse")
def test_entries_of_value_0_have_a_gradient() -> None:
    """JumpReLU's thresholds are moved by entries that are not kept."""
    given = random_transforms({2: 2, LOW_RANK: 2})
    f, x = problem(4, share=1.0)
    code = active_code(f)
    assert isinstance(code, SparseCode)
    values = torch.zeros_like(code.values, requires_grad=True)
    (found,) = torch.autograd.grad(given.mix(SparseCode(values, code.pattern), x).sum(), [values])
    maps = torch.einsum("fde,ne->nf", whole(given), x)
    torch.testing.assert_close(found, maps[f != 0])


def test_a_code_without_entries(path: str) -> None:
    given = random_transforms({1: 2, LOW_RANK: 2})
    y = given.mix(active_code(torch.zeros(N, 4, dtype=torch.float64)), problem(4)[1])
    assert y.shape == (N, D)
    assert not y.any()
    if path == "sparse":  # nothing is selected: gradients are 0, not absent, so that optimizers see the same
        found = torch.autograd.grad(y.sum(), [matrix for group in given.groups for matrix in group])
        assert not any(bool(g.any()) for g in found)


def test_norms() -> None:
    given = random_transforms({1: 3, 4: 2, LOW_RANK + 1: 2})
    torch.testing.assert_close(given.norms(), whole(given).square().sum((1, 2)).sqrt())


def test_norms_do_not_build_whole_matrices() -> None:
    d, n = 1 << 14, 4  # n d^2 would be 4 GiB
    given = Transforms([(torch.ones(n, 2, d).mT, torch.ones(n, 2, d))])
    torch.testing.assert_close(given.norms(), torch.full((n,), 2.0 * d))


def test_a_norm_of_0_has_gradient_0() -> None:
    U, V = torch.zeros(2, 2, D).mT.requires_grad_(), torch.ones(2, 2, D, requires_grad=True)
    found = torch.autograd.grad(Transforms([(U, V)]).norms().sum(), [U, V])
    assert not any(bool(g.any()) for g in found)


def test_half_precision_norms_are_summed_in_float32() -> None:
    U_nDr = torch.ones(1, 2, 64, dtype=torch.bfloat16).mT.contiguous()
    U_nDr[..., 1] += 1 / 64  # U V is 1/64 everywhere; what is left of Gram matrices whose entries are near 64
    V_nrD = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)[None, :, None].expand(1, 2, 64).contiguous()
    norm = Transforms([(U_nDr, V_nrD)]).norms()
    assert norm.dtype == torch.bfloat16
    assert norm.tolist() == [1.0]


def test_selecting() -> None:
    given = random_transforms({1: 3, 4: 2, LOW_RANK: 2})
    for latents in ([0, 2, 3, 6], [3, 4], [5]):
        torch.testing.assert_close(whole(given.select(torch.tensor(latents))), whole(given)[latents])
    f, x = problem(2)
    torch.testing.assert_close(
        given.select(torch.tensor([0, 6])).mix(active_code(f), x),
        torch.einsum("nf,fde,ne->nd", f, whole(given)[[0, 6]], x),
    )


def test_density_decides() -> None:
    f = torch.zeros(100, 100)
    f[:, :10] = 1.0
    assert isinstance(active_code(f), SparseCode)  # 10%: maps are worth it where directions would not be
    f[:, :30] = 1.0
    assert isinstance(active_code(f), DenseCode)


@pytest.mark.usefixtures("always_sparse")
def test_sums_repeat_themselves_bit_for_bit() -> None:
    given = random_transforms({2: 8, LOW_RANK: 8})
    f, x = problem(16, share=0.1)
    results = []
    for _ in range(3):
        y = given.mix(active_code(f), x)
        results.append((y, *torch.autograd.grad(y.sum(), [matrix for group in given.groups for matrix in group])))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
