"""Selection from products in bfloat16: what float32 selects, up to what half precision can tell apart."""

import pytest
import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.codes import SparseCode
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.selection import half_precision as half
from lm_saes.latents.selection.bounds import UNIT
from lm_saes.latents.selection.half_precision import batch_in_half, top_in_half
from lm_saes.latents.selection.scores import Scores
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.strategies import precision

from ..problems import activation
from .test_screened import problem

KINDS = ["plain", "shifted", "outlier", "negative", "few positive", "twins"]
SIZES = [(1040, 16), (40, 4), (1000, 4), (520, 520), (9, 16)]  # groups, too few for groups, a remainder, all, too many


def scales(n_latents: int) -> Tensor:
    scale_F = torch.linspace(0.3, 3, n_latents)
    scale_F[3::7] = 0
    return scale_F


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n_latents", "k"), SIZES)
def test_whole_numbers_are_selected_exactly(
    monkeypatch: pytest.MonkeyPatch, n_latents: int, k: int, gated: bool
) -> None:
    """Half precision holds every whole number up to 256."""
    monkeypatch.setattr(machine, "BOUNDS_BLOCK_BYTES", 2 * n_latents * 130)  # several blocks of tokens
    draw = torch.Generator().manual_seed(0)
    x_ND, W_FD = (torch.randint(-2, 3, (n, 30), generator=draw).float() for n in (300, n_latents))
    b_F = torch.randint(-8, 9, (n_latents,), generator=draw).float()
    x_ND[5] = 0
    scale_F = (2.0 ** torch.randint(-2, 1, (n_latents,), generator=draw)) if gated else None
    if scale_F is not None:
        scale_F[::5] = 0
    k = min(k, n_latents)
    columns_Nk, products_Nk = top_in_half(Scores(x_ND, W_FD.T, b_F, scale_F), k)
    assert torch.equal(columns_Nk.sort(1).values.diff(dim=1).clamp(max=1), torch.ones(300, k - 1, dtype=torch.int64))
    h_NF = x_ND @ W_FD.T + b_F
    s_NF = h_NF if scale_F is None else h_NF * scale_F
    found = s_NF.gather(1, columns_Nk).clamp(min=0).sort(1).values
    assert torch.equal(found, s_NF.topk(k, dim=1).values.clamp(min=0).sort(1).values)
    kept_Nk = s_NF.gather(1, columns_Nk) > 0
    assert torch.equal((products_Nk + b_F[columns_Nk])[kept_Nk], h_NF.gather(1, columns_Nk)[kept_Nk])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_no_other_entry_is_larger_by_more_than_rounding(kind: str, gated: bool) -> None:
    x_ND, W_FD, b_F = problem(kind)
    scale_F = scales(len(b_F)) if gated else None
    columns_Nk, products_Nk = top_in_half(Scores(x_ND, W_FD.T, b_F, scale_F), k=16)
    scale = torch.ones(len(b_F)) if scale_F is None else scale_F
    product_NF = x_ND.double() @ W_FD.double().T
    s_NF = (product_NF + b_F) * scale
    rounding_NF = (x_ND.abs() @ W_FD.abs().T * 2 * UNIT + (product_NF + b_F).abs() * UNIT).double() * 1.01
    chosen_NF = torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, columns_Nk, True)
    best_other_N = torch.where(chosen_NF, -torch.inf, s_NF - rounding_NF * scale).amax(1)
    worst_chosen_N = torch.where(chosen_NF, s_NF + rounding_NF * scale, torch.inf).amin(1)
    assert bool((worst_chosen_N >= best_other_N)[best_other_N > 0].all())
    live_Nk = scale[columns_Nk] > 0
    errors_Nk = (products_Nk - product_NF.gather(1, columns_Nk)).abs()
    assert bool((errors_Nk <= rounding_NF.gather(1, columns_Nk) + 1e-4)[live_Nk].all())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_that_of_one_product(kind: str, gated: bool) -> None:
    """The unoptimised twin: one product in half precision, `s` in float32, `topk`."""
    x_ND, W_FD, b_F = problem(kind)
    scale_F = scales(len(b_F)) if gated else None
    columns_Nk, _ = top_in_half(Scores(x_ND, W_FD.T, b_F, scale_F), k=16)
    product_NF = (x_ND.bfloat16() @ W_FD.T.bfloat16()).float()
    s_NF = (product_NF + b_F) * (1 if scale_F is None else scale_F)
    want = s_NF.topk(16, dim=1).values.clamp(min=0).sum(1)
    torch.testing.assert_close(s_NF.gather(1, columns_Nk).clamp(min=0).sum(1), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["plain", "negative", "few positive"])
@pytest.mark.parametrize("n_latents", [1040, 1001])
@pytest.mark.parametrize("n_rows", [130, 300])
def test_a_batch(monkeypatch: pytest.MonkeyPatch, kind: str, n_latents: int, n_rows: int) -> None:
    """Everything from some `s` on, at least as much as is wanted, or all that is positive."""
    monkeypatch.setattr(machine, "BOUNDS_BLOCK_BYTES", 2 * n_latents * n_rows)
    x_ND, W_FD, b_F = problem(kind, n_latents=n_latents)
    scale_F = scales(n_latents)
    n = 16 * len(x_ND)
    found = batch_in_half(Scores(x_ND, W_FD.T, b_F, scale_F), n)
    assert found is not None
    rows_E, columns_E, products_E, s_E = found
    assert bool((rows_E.diff() >= 0).all())
    assert len((rows_E * n_latents + columns_E).unique()) == len(s_E)
    s_NF = torch.cat([s_BF.float() for _, s_BF in half._products(Scores(x_ND, W_FD.T, b_F, scale_F))])
    assert torch.equal(s_E, s_NF[rows_E, columns_E])
    torch.testing.assert_close((products_E + b_F[columns_E]) * scale_F[columns_E], s_E)
    least = s_E.amin() if len(s_E) else torch.tensor(torch.inf)
    assert len(s_E) == int((s_NF >= least).sum())
    assert n <= len(s_E) < 1.5 * n or len(s_E) == int((s_NF > 0).sum()) < n


def test_a_batch_that_blocks_share_unevenly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, W_FD, b_F = problem("plain")
    monkeypatch.setattr(machine, "BOUNDS_BLOCK_BYTES", 2 * len(b_F) * 100)
    x_ND[100:] *= 0.01
    assert batch_in_half(Scores(x_ND, W_FD.T, torch.zeros_like(b_F), None), 16 * len(x_ND)) is None


@pytest.mark.parametrize("masked", [False, True])
def test_batchtopk_keeps_its_budget(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: True)
    x_ND, W_FD, b_F = problem("plain")
    mask_N = torch.arange(len(x_ND)) % 3 != 1 if masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = encode(
            x_ND, LinearEncoder(W_FD.T, b_F), Selector(activation("batchtopk", len(b_F), top_k=16)), None, mask_N
        )
    kept_NF = code.dense() > 0
    assert int(kept_NF.sum()) == 16 * (len(x_ND) if mask_N is None else int(mask_N.sum()))
    if mask_N is not None:
        assert not bool(kept_NF[~mask_N].any())
    s_NF = (x_ND @ W_FD.T + b_F)[slice(None) if mask_N is None else mask_N]
    exact = s_NF.flatten().topk(int(kept_NF.sum())).values.sum()
    torch.testing.assert_close(code.dense().sum(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_float32_at_the_chosen_entries(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: True)
    x_ND, W_FD, b_F = problem("plain")
    scale_F = scales(len(b_F)) if gated else None
    W_DF, bias = W_FD.T.clone().requires_grad_(), b_F.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = encode(x_ND, LinearEncoder(W_DF, bias), Selector(activation("topk", len(b_F), top_k=16)), scale_F, None)
        assert isinstance(code, SparseCode)
        assert code.values.dtype == torch.float32
        code.decode(W_FD).square().sum().backward()
    f_NF = code.dense().detach()
    assert 0 < int((f_NF > 0).sum(1).max()) <= 16
    dh_NF = 2 * (f_NF @ W_FD) @ W_FD.T * (f_NF > 0)
    assert W_DF.grad is not None and bias.grad is not None
    torch.testing.assert_close(W_DF.grad, x_ND.T @ dh_NF, rtol=1e-4, atol=0.1)
    torch.testing.assert_close(bias.grad, dh_NF.sum(0), rtol=1e-4, atol=0.1)


def test_only_where_it_is_asked_for_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_half(x_ND: Tensor) -> bool:
        return precision(x_ND, 100, 4) == "half"

    x_ND = torch.ones(4, 3)
    monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: True)
    assert not in_half(x_ND)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_half(x_ND)
        assert not in_half(x_ND.double())
        monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: False)
        assert not in_half(x_ND)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not in_half(x_ND)
