"""Selection from dense pre-activations: the sparse code is the dense one, values, selection and gradients."""

import pytest
import torch
from torch import Tensor

from lm_saes.latents.codes import Code, DenseCode, SparseCode
from lm_saes.latents.encode.given import select
from lm_saes.latents.selection import selector
from lm_saes.latents.selection.selector import Selector

from ...dictionaries.twin import ACT_FNS
from ..problems import activation


class Problem:
    """Random pre-activations; every run has its own activation function (one keeps a running threshold)."""

    def __init__(self, act_fn: str, gated: bool, masked: bool, n_tokens: int = 13, d_sae: int = 24) -> None:
        draw = torch.Generator().manual_seed(0)
        self.h_NF = torch.randn(n_tokens, d_sae, generator=draw, dtype=torch.float64).requires_grad_()
        self.scale_F = torch.rand(d_sae, generator=draw, dtype=torch.float64) + 0.1 if gated else None
        self.weights_NF = torch.randn(n_tokens, d_sae, generator=draw, dtype=torch.float64)
        self.W_FD = torch.randn(d_sae, 5, generator=draw, dtype=torch.float64)
        self.mask_N = torch.arange(n_tokens) % 3 != 1 if masked else None
        self.activation = activation(act_fn, d_sae)

    def select(self, dense: bool | None) -> Code:
        return select(self.h_NF, Selector(self.activation), self.scale_F, self.mask_N, dense)

    def gradients(self, code: Code) -> dict[str, Tensor]:
        loss = code.decode(self.W_FD).square().sum() + (code.dense() * self.weights_NF).sum()
        inputs = {"h": self.h_NF, **dict(self.activation.named_parameters())}
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_sparse_is_dense(act_fn: str, gated: bool, masked: bool, training: bool) -> None:
    one, other = (Problem(act_fn, gated, masked) for _ in range(2))
    for problem, dense in ((one, False), (other, True)):
        problem.select(dense)  # where there is a running threshold, this is its first value
        problem.activation.train(training)
    sparse, dense = one.select(False), other.select(True)
    assert isinstance(sparse, SparseCode)
    assert isinstance(dense, DenseCode)
    assert torch.equal(sparse.dense(), dense.dense())
    assert 0 < int((dense.dense() != 0).sum()) < dense.values.numel()
    assert torch.equal(sparse.counts(one.mask_N), dense.counts(other.mask_N))
    found, wanted = one.gradients(sparse), other.gradients(dense)
    if act_fn == "jumprelu" and not training:  # entries below the threshold are not looked for where nothing is learnt
        del found["log_jumprelu_threshold"]
    for name, value in found.items():
        tolerance = 1e-12 if name == "h" else 1e-5  # thresholds are float32
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance)
    for (_, a), (_, b) in zip(one.activation.named_buffers(), other.activation.named_buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_density_decides(monkeypatch: pytest.MonkeyPatch, act_fn: str) -> None:
    asked: list[float] = []

    def pays(entries: float, places: float) -> bool:
        asked.append(entries / places)
        return entries / places < 0.3

    monkeypatch.setattr(selector, "sparse_pays", pays)
    problem = Problem(act_fn, True, False)
    code = problem.select(None)
    assert isinstance(code, DenseCode if act_fn in ("relu", "jumprelu") else SparseCode)
    assert asked


def test_a_batch_whose_candidates_miss_is_looked_at_again() -> None:
    """Batch-wide selection guesses a floor; after a batch of large values comes one of small ones."""
    one, other = Problem("batchtopk", True, False), Problem("batchtopk", True, False)
    for problem, dense in ((one, False), (other, True)):
        select(100 * problem.h_NF, Selector(problem.activation), problem.scale_F, None, dense)
    assert torch.equal(one.select(False).dense(), other.select(True).dense())
    code = one.select(False)
    assert code.values.numel() == int((code.values > 0).sum()) == 13 * 3  # candidates that lost are not carried along


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_strides_do_not_matter(act_fn: str) -> None:
    one, other = Problem(act_fn, True, True), Problem(act_fn, True, True)
    one.h_NF = one.h_NF.detach().T.contiguous().T.requires_grad_()
    for dense in (False, True):
        assert torch.equal(one.select(dense).dense(), other.select(dense).dense())
        found, wanted = one.gradients(one.select(dense)), other.gradients(other.select(dense))
        assert all(torch.equal(found[name], g) for name, g in wanted.items())


@pytest.mark.parametrize("act_fn", ["relu", "topk", "batchtopk"])
def test_gradcheck(act_fn: str) -> None:
    """Away from the edges of selection (jumprelu's gradient is by definition not that of its values)."""
    problem = Problem(act_fn, True, True, n_tokens=5, d_sae=8)
    problem.activation.eval()  # a threshold that runs along would be another function at each call

    def values(h_NF: Tensor) -> Tensor:
        return select(h_NF, Selector(problem.activation), problem.scale_F, problem.mask_N, dense=False).dense()

    assert torch.autograd.gradcheck(values, problem.h_NF)


def test_the_threshold_gradient_by_hand() -> None:
    """One latent, theta = 1, window 1: h = 0.6 and 1.2 lie in the window (one kept, one not), 0.4 and 3 do not.

    With output gradients 1, 2, 4, 8: dL/d log theta = -(theta^2 / window) (1 + 2).
    """
    act = activation("jumprelu", 1, jumprelu_threshold_window=1.0)
    with torch.no_grad():
        act.log_threshold.zero_()  # type: ignore[union-attr]
    h = torch.tensor([[0.6], [1.2], [0.4], [3.0]], dtype=torch.float64, requires_grad=True)
    code = select(h, Selector(act), None, None, dense=False)
    assert code.dense().flatten().tolist() == [0, 1.2, 0, 3]
    code.dense().backward(torch.tensor([[1.0], [2], [4], [8]], dtype=torch.float64))
    assert act.log_threshold.grad.tolist() == [-3.0]  # type: ignore[union-attr]
    assert h.grad.flatten().tolist() == [0, 2, 0, 8]  # type: ignore[union-attr]
