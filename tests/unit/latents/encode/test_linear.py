"""The blocked, sparse encoder gives what the dense one gives: values, selection and every gradient."""

import pytest
import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.codes import DenseCode, SparseCode
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.selection.search import Chosen, SearchByRule
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.wants import Judged

from ...dictionaries.twin import ACT_FNS
from ..problems import Problem, activation


@pytest.mark.parametrize("rows_per_block", [1, 3, 5, 1000])  # 13 tokens: the last block is short
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_sparse_is_dense(
    monkeypatch: pytest.MonkeyPatch, act_fn: str, gated: bool, glu: bool, masked: bool, rows_per_block: int
) -> None:
    monkeypatch.setattr(machine, "PRODUCT_BLOCK_BYTES", 4 * 24 * rows_per_block)
    one, other = (Problem(act_fn, gated, glu, masked) for _ in range(2))
    sparse, dense = one.encode(dense=False), other.encode(dense=True)
    assert isinstance(sparse, SparseCode)
    assert isinstance(dense, DenseCode)
    torch.testing.assert_close(sparse.dense(), dense.dense(), rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse.dense() != 0, dense.dense() != 0)  # what is not kept is exactly 0
    assert torch.equal(sparse.counts(one.mask_N), dense.counts(other.mask_N))
    found, wanted = one.gradients(sparse), other.gradients(dense)
    for name, want in wanted.items():
        tolerance = 1e-5 if name == "log_theta" else 1e-11  # thresholds are float32
        torch.testing.assert_close(found[name], want, rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")
    for (name, a), (_, b) in zip(one.activation.named_buffers(), other.activation.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_sparse_is_dense_outside_training(act_fn: str, gated: bool, glu: bool) -> None:
    one, other = (Problem(act_fn, gated, glu) for _ in range(2))
    for problem, dense in ((one, False), (other, True)):
        problem.encode(dense)  # where there is a running threshold, this is its first value
        problem.activation.eval()
    sparse, dense = one.encode(dense=False).dense(), other.encode(dense=True).dense()
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse != 0, dense != 0)


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_what_is_kept_is_the_pre_activation(act_fn: str) -> None:
    problem = Problem(act_fn, gated=True, glu=True)
    h_NF = torch.addmm(problem.b_F, problem.x_ND, problem.W_DF)
    h_NF = h_NF * torch.sigmoid(problem.x_ND @ problem.gate_W_DF + problem.gate_b_F)  # type: ignore[operator]
    latents = problem.encode(dense=False).dense()
    kept = latents != 0
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(latents[kept], h_NF[kept], rtol=1e-12, atol=1e-12)


# -- which path is taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act_fn", "settings", "bias", "path"),
    [
        ("topk", {"top_k": 2}, 0.0, SparseCode),
        ("topk", {"top_k": 150}, 0.0, DenseCode),
        ("batchtopk", {"top_k": 2}, 0.0, SparseCode),
        ("relu", {}, 0.0, DenseCode),
        ("relu", {}, -8.0, SparseCode),
        ("jumprelu", {}, 0.0, DenseCode),
        ("jumprelu", {}, -8.0, SparseCode),
    ],
)
def test_the_density_decides(act_fn: str, settings: dict[str, object], bias: float, path: type) -> None:
    problem = Problem(act_fn, d_sae=200, gated=False, settings=settings)
    problem.b_F = torch.full_like(problem.b_F, bias).requires_grad_()
    assert isinstance(problem.encode(dense=None), path)


def test_nothing_active_at_all() -> None:
    problem = Problem("relu", gated=False)
    problem.b_F = torch.full_like(problem.b_F, -100.0).requires_grad_()
    code = problem.encode(dense=False)
    assert isinstance(code, SparseCode)
    assert code.values.numel() == 0
    assert not code.dense().any()
    assert all(not g.any() for g in problem.gradients(code).values())


# -- gradients by finite differences -------------------------------------------------------------------------------


@pytest.mark.parametrize("glu", [False, True])
def test_gradients_of_a_fixed_selection(monkeypatch: pytest.MonkeyPatch, glu: bool) -> None:
    fixed = torch.rand(6, 8, generator=torch.Generator().manual_seed(2)) < 0.4
    turned_down = torch.arange(int(fixed.sum())) % 4 == 0  # entries of the code that are not kept
    relu = activation("relu", 8)
    monkeypatch.setattr(relu, "wants", lambda: Judged(lambda s_BF, rows: fixed[rows]))
    monkeypatch.setattr(SearchByRule, "choose", lambda search, s_E, pattern: Chosen(pattern, ~turned_down))
    monkeypatch.setattr(machine, "PRODUCT_BLOCK_BYTES", 4 * 8 * 4)
    problem = Problem("relu", gated=False, glu=glu, n_tokens=6, d_sae=8)
    parts = [problem.x_ND, problem.W_DF, problem.b_F]
    if glu:
        assert problem.gate_W_DF is not None and problem.gate_b_F is not None
        parts += [problem.gate_W_DF, problem.gate_b_F]

    def values(x_ND: Tensor, W_DF: Tensor, b_F: Tensor, *gate: Tensor) -> Tensor:
        gate_W_DF, gate_b_F = gate if glu else (None, None)
        return encode(
            x_ND, LinearEncoder(W_DF, b_F, gate_W_DF, gate_b_F), Selector(relu), None, None, dense=False
        ).values

    assert values(*parts)[turned_down].eq(0).all()
    assert torch.autograd.gradcheck(values, parts)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_gradients_of_encoding_away_from_the_kinks(act_fn: str, dense: bool) -> None:
    problem = Problem(act_fn, n_tokens=4, d_sae=8)
    problem.activation.eval() if act_fn == "batchtopk" else problem.activation.train()

    def latents(x_ND: Tensor, W_DF: Tensor, b_F: Tensor) -> Tensor:
        code = encode(x_ND, LinearEncoder(W_DF, b_F), Selector(problem.activation), problem.scale_F, None, dense=dense)
        return code.dense()

    assert torch.autograd.gradcheck(latents, (problem.x_ND, problem.W_DF, problem.b_F))


# -- the threshold of JumpReLU -------------------------------------------------------------------------------------


def threshold_gradient(h: list[float], theta: float, scale: float | None, dense: bool) -> list[float]:
    """`dL / d log theta` of a single latent with pre-activations `h` and output gradients 1, 10, 100...; window 0.4."""
    jump = activation("jumprelu", 1, jumprelu_threshold_window=0.4)
    log_theta = jump.log_threshold
    assert log_theta is not None
    with torch.no_grad():
        log_theta.fill_(theta).log_()
    x_N1 = torch.tensor(h, dtype=torch.float64)[:, None]
    encoder = LinearEncoder(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    scale_F = None if scale is None else torch.tensor([scale], dtype=torch.float64)
    f_N1 = encode(x_N1, encoder, Selector(jump), scale_F, None, dense=dense).dense()
    weights_N = 10.0 ** torch.arange(len(h), dtype=torch.float64)
    return torch.autograd.grad((f_N1[:, 0] * weights_N).sum(), log_theta)[0].tolist()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("h", "theta", "scale", "g"),
    [
        # theta 1, window from 0.8 to 1.2: the second is not kept but moves theta, the last two are outside the window.
        ([1.1, 0.9, 1.3, 0.7], 1.0, None, 11.0),
        # s = 2 h: the same window, and a gradient in the units of s is half of that in the units of h.
        ([0.55, 0.45, 0.65, 0.35], 1.0, 2.0, 11.0 / 2),
        # theta 0.1, window from -0.1 to 0.3, but s must be positive.
        ([0.05, -0.05, 0.2, 0.0], 0.1, None, 101.0),
        ([2.0, 3.0], 1.0, None, 0.0),
        ([1.0], 1.0, 0.0, 0.0),  # a latent whose decoder is 0 has no scale to divide by
    ],
)
def test_threshold_gradient_by_hand(h: list[float], theta: float, scale: float | None, g: float, dense: bool) -> None:
    want = -(theta**2) / 0.4 * g
    assert threshold_gradient(h, theta, scale, dense) == pytest.approx([want], rel=1e-5)


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_autocast_rounds_the_products_only(act_fn: str, glu: bool) -> None:
    problem = Problem(act_fn, glu=glu, dtype=torch.float32, n_tokens=200)
    exact = problem.encode(dense=False).dense().detach()
    for dense in (False, True):
        problem = Problem(act_fn, glu=glu, dtype=torch.float32, n_tokens=200)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            code = problem.encode(dense)
        assert code.values.dtype == torch.float32
        latents = code.dense().detach()
        assert float((latents - exact).norm() / exact.norm()) < 0.05  # 8 bits, and what is near the cut may swap
        for name, gradient in problem.gradients(code).items():
            assert gradient.dtype == torch.float32, name
            assert gradient.isfinite().all(), name
