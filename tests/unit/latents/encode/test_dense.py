"""The dense path in blocks: gradients handed over as recipes are those that autograd would have added up."""

import pytest
import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.codes import DenseCode, Identity, Tanh
from lm_saes.latents.encode.dense import BlockwiseCode
from lm_saes.latents.encode.given import select
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.encode.linear import LinearEncoder
from lm_saes.latents.selection.selector import Selector

from ..problems import Problem


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GRADIENT_BLOCK_BYTES", 8 * 13 * 16)  # 16 of 24 latents: the last block is short


def blockwise(problem: Problem) -> BlockwiseCode:
    code = problem.encode(dense=True)
    assert isinstance(code, BlockwiseCode)
    return code


def plainly(problem: Problem) -> DenseCode:
    """The same code from pre-activations that are written out."""
    h_NF = torch.addmm(problem.b_F, problem.x_ND, problem.W_DF)
    code = select(h_NF, Selector(problem.activation), problem.scale_F, None, dense=True)
    assert isinstance(code, DenseCode)
    return code


def losses(code: DenseCode, problem: Problem, v_F: Tensor, W_FD: Tensor) -> list[Tensor]:
    """One of each consumer: decoding, sums of both functions, and the values themselves."""
    sums = [(code.latent_sums(f, v_F, problem.mask_N) * torch.arange(24)).sum() for f in (Identity(), Tanh(0.7))]
    return [code.decode(W_FD).square().sum(), *sums, code.dense().square().sum(), (3 * code.values).sum()]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu"])
def test_deferred_gradients_are_the_plain_ones(act_fn: str, gated: bool, masked: bool) -> None:
    found: list[list[Tensor]] = []
    for deferred in (True, False):
        problem = Problem(act_fn, gated, masked=masked)
        v_F = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).requires_grad_()
        W_FD = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        code = blockwise(problem)
        log_theta = problem.activation.log_threshold
        plain = code if deferred else plainly(problem)
        parts = [problem.x_ND, problem.W_DF, problem.b_F, v_F, W_FD, *([] if log_theta is None else [log_theta])]
        found.append(list(torch.autograd.grad(sum(losses(plain, problem, v_F, W_FD), torch.zeros(())), parts)))
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        tolerance = 1e-5 if i == 5 else 1e-11  # thresholds are float32
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_counts_and_totals_of_a_mask() -> None:
    problem = Problem("relu", masked=True)
    code = blockwise(problem)
    plain = DenseCode(code.values)
    for mask_N in (problem.mask_N, None):
        torch.testing.assert_close(code.counts(mask_N).double(), plain.counts(mask_N).double())
        torch.testing.assert_close(code.totals(mask_N), plain.totals(mask_N))


def test_a_backward_pass_that_stops_early_leaves_nothing_behind() -> None:
    problem = Problem("relu")
    W_FD = torch.ones(24, 6, dtype=torch.float64, requires_grad=True)
    y_ND = blockwise(problem).decode(W_FD)
    torch.autograd.grad(y_ND.sum(), W_FD, retain_graph=True)  # leaves a recipe that nobody takes
    (first,) = torch.autograd.grad(y_ND.sum(), problem.b_F, retain_graph=True)
    (again,) = torch.autograd.grad(y_ND.sum(), problem.b_F)
    (want,) = torch.autograd.grad(
        plainly(problem).values.sum() * 6,
        problem.b_F,
    )
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(again, want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("how", ["kept", "made again", "around"])
def test_shortfall(how: str, gated: bool, masked: bool) -> None:
    """By finite differences, and against its formula; entries are away from the kinks."""
    problem = Problem("jumprelu", gated, masked=masked)
    theta_F = torch.linspace(0.2, 2.0, 24, dtype=torch.float64).requires_grad_()
    norm_F = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).requires_grad_()

    def sums(x_ND: Tensor, W_DF: Tensor, b_F: Tensor, theta_F: Tensor, norm_F: Tensor) -> Tensor:
        encoder = LinearEncoder(W_DF, b_F)
        code = DenseCode(x_ND) if how == "made again" else blockwise(problem)
        h_NF = torch.addmm(b_F, x_ND, W_DF)
        hidden = Hidden.around(h_NF) if how == "around" else encoder.hidden(code, x_ND)
        return hidden.shortfall_sums(theta_F, norm_F if gated else None, problem.mask_N)

    parts = (problem.x_ND, problem.W_DF, problem.b_F, theta_F, norm_F)
    h_NF = torch.addmm(*[problem.b_F, problem.x_ND, problem.W_DF])
    short_NF = torch.relu(theta_F - h_NF * (norm_F if gated else 1))
    want = (short_NF if problem.mask_N is None else short_NF * problem.mask_N[:, None]).sum(0)
    torch.testing.assert_close(sums(*parts), want)
    got = torch.autograd.grad(sums(*parts).square().sum(), parts, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), parts, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
