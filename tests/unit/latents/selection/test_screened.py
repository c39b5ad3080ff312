"""Screening in half precision selects what float32 selects, and says so when it cannot."""

import pytest
import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.codes import SparseCode
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.selection.bounds import Bounds
from lm_saes.latents.selection.scores import Scores
from lm_saes.latents.selection.screened import batch_screened, top_screened
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.strategies import precision

from ..problems import activation


def problem(kind: str, n_tokens: int = 300, width: int = 45, n_latents: int = 1040) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, latent-major weights and biases: float32."""
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(n_tokens, width, generator=draw)
    W_FD, b_F = torch.randn(n_latents, width, generator=draw), torch.randn(n_latents, generator=draw)
    match kind:
        case "shifted":
            x_ND += 30 * torch.randn(width, generator=draw)
        case "outlier":
            x_ND[::7, 3] *= 100
        case "negative":
            b_F -= 100
        case "few positive":
            b_F -= 20
        case "twins":  # latents that half precision cannot tell apart
            W_FD[520:] = W_FD[:520] * (1 + 1e-4 * torch.randn(520, 1, generator=draw))
            b_F[520:] = b_F[:520]
    return x_ND, W_FD, b_F


def wanted(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int) -> Tensor:
    """Per row and latent, whether it is a positive one of the k largest; in float64."""
    s_NF = torch.addmm(b_F.double(), x_ND.double(), W_FD.T.double())
    s_NF = s_NF if scale_F is None else s_NF * scale_F
    best = s_NF.topk(k, dim=1)
    return torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, best.indices, best.values > 0)


@pytest.mark.parametrize("kind", ["plain", "shifted", "outlier", "negative", "few positive", "twins"])
@pytest.mark.parametrize("gated", [False, True])
def test_screening_is_exact(monkeypatch: pytest.MonkeyPatch, kind: str, gated: bool) -> None:
    monkeypatch.setattr(machine, "SCREENING_MOST_FAILURES", 1.0)  # go on, however many rows fail
    monkeypatch.setattr(machine, "BOUNDS_BLOCK_BYTES", 2 * 1040 * 130)  # several blocks of tokens
    x_ND, W_FD, b_F = problem(kind)
    scale_F = torch.linspace(0.3, 3, len(b_F)) if gated else None
    found = top_screened(Scores(x_ND, W_FD.T, b_F, scale_F), k=16)
    assert found is not None
    columns_Nk, products_Nk = found
    torch.testing.assert_close(products_Nk, (x_ND @ W_FD.T).gather(1, columns_Nk), rtol=1e-4, atol=1e-4)
    s_Nk = products_Nk + b_F[columns_Nk]
    kept = torch.zeros(len(x_ND), len(b_F), dtype=torch.bool).scatter_(1, columns_Nk, s_Nk > 0)
    assert torch.equal(kept, wanted(x_ND, W_FD, b_F, scale_F, 16))


@pytest.mark.parametrize("kind", ["plain", "shifted", "negative", "few positive"])
@pytest.mark.parametrize("gated", [False, True])
def test_screening_a_batch_is_exact(monkeypatch: pytest.MonkeyPatch, kind: str, gated: bool) -> None:
    monkeypatch.setattr(machine, "BOUNDS_BLOCK_BYTES", 2 * 1040 * 130)
    monkeypatch.setattr(machine, "SCREENING_BATCH_CANDIDATES", 3)  # whatever the bounds are worth: it has to succeed
    x_ND, W_FD, b_F = problem(kind)
    scale_F = torch.linspace(0.3, 3, len(b_F)) if gated else None
    n = 16 * len(x_ND)
    found = batch_screened(Scores(x_ND, W_FD.T, b_F, scale_F), n)
    assert found is not None
    rows_E, columns_E, products_E, s_E = found
    assert torch.equal(rows_E, rows_E.sort().values)
    torch.testing.assert_close(products_E, (x_ND @ W_FD.T)[rows_E, columns_E], rtol=1e-4, atol=1e-4)
    got = torch.zeros(len(x_ND), len(b_F), dtype=torch.bool)
    got[rows_E[s_E > 0], columns_E[s_E > 0]] = True
    s_NF = torch.addmm(b_F.double(), x_ND.double(), W_FD.T.double()) * (1 if scale_F is None else scale_F)
    assert torch.equal(got, (s_NF > 0) & (s_NF >= s_NF.flatten().topk(n).values.amin()))


def test_a_batch_that_bounds_cannot_settle_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SCREENING_BATCH_CANDIDATES", 0.5)  # too few to choose from
    x_ND, W_FD, b_F = problem("plain")
    assert batch_screened(Scores(x_ND, W_FD.T, b_F, None), 16 * len(x_ND)) is None


@pytest.mark.parametrize("n_latents", [40, 256, 1000])  # too few for groups; whole groups; a remainder
def test_any_number_of_latents(n_latents: int) -> None:
    x_ND, W_FD, b_F = problem("plain", n_latents=n_latents)
    found = top_screened(Scores(x_ND, W_FD.T, b_F, None), k=4)
    assert found is not None
    want = wanted(x_ND, W_FD, b_F, None, 4)
    kept = torch.zeros_like(want).scatter_(1, found[0], found[1] + b_F[found[0]] > 0)
    assert torch.equal(kept, want)


def test_bounds_hold() -> None:
    """No entry exceeds its bound, and bounds are not much above."""
    x_ND, W_FD, b_F = problem("shifted")
    scale_F = torch.linspace(0.3, 3, len(b_F))
    made = Bounds(Scores(x_ND, W_FD.T, b_F, scale_F))
    bounds_NF = made._x_NP.double() @ made._W_FP.double().T
    above_NF = bounds_NF - torch.addmm(b_F.double(), x_ND.double(), W_FD.T.double()) * scale_F
    spread = torch.linalg.vector_norm(x_ND - x_ND.mean(0), dim=1)[:, None] * (W_FD.norm(dim=1) * scale_F)
    assert float(above_NF.min()) > 0
    assert float((above_NF / spread).max()) < 2 * 2**-7


@pytest.mark.parametrize("rounded", ["weights", "inputs"])
def test_bounds_hold_where_rounding_does_its_worst(rounded: str) -> None:
    """One side is exact in half precision and points along what rounding takes from the other."""
    inexact = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) + 1
    exact = torch.sign(inexact - inexact.bfloat16())
    x_ND, W_FD = (exact, inexact) if rounded == "weights" else (inexact, exact)
    x_ND = torch.cat([x_ND[:32], -x_ND[:32]])  # of mean 0
    made = Bounds(Scores(x_ND, W_FD.T, torch.zeros(64), None))
    bounds_NF = made._x_NP.double() @ made._W_FP.double().T
    assert float((bounds_NF - x_ND.double() @ W_FD.double().T).min()) >= 0


@pytest.mark.parametrize("size", [100, 128, 129, 300])  # blocks smaller than what is tried first, as large, larger
def test_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(machine, "SCREENING_MOST_FAILURES", 1.0)
    monkeypatch.setattr(machine, "BOUNDS_BLOCK_BYTES", 2 * 1040 * size)
    x_ND, W_FD, b_F = problem("outlier")
    found = top_screened(Scores(x_ND, W_FD.T, b_F, None), k=16)
    assert found is not None
    want = wanted(x_ND, W_FD, b_F, None, 16)
    assert torch.equal(torch.zeros_like(want).scatter_(1, found[0], found[1] + b_F[found[0]] > 0), want)


def test_rows_that_bounds_cannot_settle_are_counted_and_the_search_given_up() -> None:
    x_ND, W_FD, b_F = problem("twins")
    W_FD[:] = W_FD[0] * (1 + 1e-4 * torch.randn(len(W_FD), 1))
    assert top_screened(Scores(x_ND, W_FD.T, torch.zeros_like(b_F), None), k=16) is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ["topk", "batchtopk"])
def test_a_screened_encoder_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, act_fn: str, gated: bool, masked: bool
) -> None:
    x_ND, W_FD, b_F = problem("plain")
    scale_F = torch.linspace(0.3, 3, len(b_F)) if gated else None
    mask_N = torch.arange(len(x_ND)) % 3 != 1 if masked else None
    found: list[tuple[SparseCode, list[Tensor]]] = []
    for large in (0, 1 << 60):
        monkeypatch.setattr(machine, "SCREENING_LEAST_PRODUCT", large)
        monkeypatch.setattr(machine, "SCREENING_LEAST_TOKENS", 0)
        monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: True)
        W_DF, bias = W_FD.T.clone().requires_grad_(), b_F.clone().requires_grad_()
        assert precision(x_ND, len(b_F), 16) == ("screened" if large == 0 else "full")
        code = encode(
            x_ND, LinearEncoder(W_DF, bias), Selector(activation(act_fn, len(b_F), top_k=16)), scale_F, mask_N
        )
        assert isinstance(code, SparseCode)
        code.decode(W_FD).square().sum().backward()
        assert W_DF.grad is not None and bias.grad is not None
        found.append((code, [W_DF.grad, bias.grad]))
    (one, got), (other, want) = found
    assert torch.equal(one.dense() > 0, other.dense() > 0)
    torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_a_batch_of_which_no_token_counts_has_no_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SCREENING_LEAST_PRODUCT", 0)
    monkeypatch.setattr(machine, "SCREENING_LEAST_TOKENS", 0)
    monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: True)
    x_ND, W_FD, b_F = problem("plain")
    nothing_N = torch.zeros(len(x_ND), dtype=torch.bool)
    code = encode(
        x_ND, LinearEncoder(W_FD.T, b_F), Selector(activation("batchtopk", len(b_F), top_k=16)), None, nothing_N
    )
    assert not code.dense().any()
