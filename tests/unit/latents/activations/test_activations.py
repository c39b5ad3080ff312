"""What each activation function keeps: by hand, against sorting, and BatchTopK's running threshold."""

import math

import pytest
import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.activations import ActivationFunction
from lm_saes.latents.activations.batchtopk import BatchTopK
from lm_saes.latents.activations.topk import TopK
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.selection.budget import SearchByBudget
from lm_saes.latents.selection.selector import Selector

from ..problems import Problem, activation

both = pytest.mark.parametrize("dense", [False, True])


def select(function: ActivationFunction, s_NF: Tensor, dense: bool, mask_N: Tensor | None = None) -> Tensor:
    """Encode rows that are the pre-activations themselves."""
    n_latents = s_NF.shape[1]
    encoder = LinearEncoder(torch.eye(n_latents, dtype=s_NF.dtype), torch.zeros(n_latents, dtype=s_NF.dtype))
    return encode(s_NF, encoder, Selector(function), None, mask_N, dense=dense).dense()


def batchtopk(d_sae: int, k: int) -> BatchTopK:
    made = activation("batchtopk", d_sae, top_k=k)
    assert isinstance(made, BatchTopK)
    return made


# -- by hand -------------------------------------------------------------------------------------------------------

S = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.0, -4.0, -2.0, 0.25], [1.0, 5.0, 4.0, -3.0]])


@both
@pytest.mark.parametrize(
    ("act_fn", "settings", "want"),
    [
        ("relu", {}, [[3, 0, 2, 0.5], [0, 0, 0, 0.25], [1, 5, 4, 0]]),
        ("topk", {"top_k": 2}, [[3, 0, 2, 0], [0, 0, 0, 0.25], [0, 5, 4, 0]]),  # of the two largest the positive ones
        ("topk", {"top_k": 4}, [[3, 0, 2, 0.5], [0, 0, 0, 0.25], [1, 5, 4, 0]]),
        ("batchtopk", {"top_k": 1}, [[3, 0, 0, 0], [0, 0, 0, 0], [0, 5, 4, 0]]),  # 1 x 3 tokens: 5, 4, 3
        ("batchtopk", {"top_k": 4}, [[3, 0, 2, 0.5], [0, 0, 0, 0.25], [1, 5, 4, 0]]),
    ],
)
def test_by_hand(act_fn: str, settings: dict[str, object], want: list[list[float]], dense: bool) -> None:
    assert select(activation(act_fn, 4, **settings), S, dense).tolist() == want


@both
def test_jumprelu_keeps_what_is_above_its_threshold(dense: bool) -> None:
    jump = activation("jumprelu", 4)
    assert jump.log_threshold is not None
    with torch.no_grad():
        jump.log_threshold.copy_(torch.tensor([9.0, 1.0, 1.9, 0.3]).log())
    theta = jump.log_threshold.exp()
    want = torch.where(theta < S, S, 0.0)
    assert want.tolist() == [[0, 0, 2, 0.5], [0, 0, 0, 0], [0, 5, 4, 0]]
    for function in (jump.train(), jump.eval()):
        assert torch.equal(select(function, S, dense), want)


@both
def test_a_mask_leaves_selection_per_token_alone(dense: bool) -> None:
    mask = torch.tensor([True, False, True])
    for act_fn in ("relu", "topk", "jumprelu"):
        function = activation(act_fn, 4)
        assert torch.equal(select(function, S, dense, mask), select(function, S, dense))


# -- top-k ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("k", [1, 3, 17, 300])
@pytest.mark.parametrize("d_sae", [300, 301, 317])  # with and without a remainder, however columns are grouped
def test_topk_keeps_exactly_the_k_largest(d_sae: int, k: int, dense: bool) -> None:
    s_NF = torch.randn(20, d_sae, generator=torch.Generator().manual_seed(k)) + 3  # nearly all positive
    latents = select(activation("topk", d_sae, top_k=k), s_NF, dense)
    best = s_NF.sort(dim=1, descending=True).values[:, :k].clamp(min=0)
    torch.testing.assert_close(latents.sort(dim=1, descending=True).values[:, :k], best, rtol=0, atol=1e-5)
    assert ((latents > 0).sum(1) == (best > 0).sum(1)).all()


@both
@pytest.mark.parametrize("act_fn", ["topk", "batchtopk"])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_ties(act_fn: str, k: int, dense: bool) -> None:
    s_NF = torch.randint(1, 4, (8, 96), generator=torch.Generator().manual_seed(0)).float()
    runs = [select(activation(act_fn, 96, top_k=k), s_NF, dense) for _ in range(3)]
    kept = runs[0] > 0
    assert int(kept.sum()) == 8 * k  # exactly k
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert act_fn == "batchtopk" or (kept.sum(1) == k).all()


@both
def test_the_k_in_use_is_not_the_one_of_the_config(dense: bool) -> None:
    for act_fn in ("topk", "batchtopk"):
        function = activation(act_fn, 4, top_k=1)
        assert isinstance(function, TopK | BatchTopK)
        function.k = 2
        assert int((select(function, S + 10, dense) > 0).sum()) == 6


# -- BatchTopK -----------------------------------------------------------------------------------------------------


def largest(s_NF: Tensor, k: int, mask_N: Tensor | None = None) -> Tensor:
    """What BatchTopK is to keep, by sorting everything."""
    valid = s_NF if mask_N is None else torch.where(mask_N[:, None], s_NF, -math.inf)
    n_valid = len(s_NF) if mask_N is None else int(mask_N.sum())
    cut = valid.flatten().sort(descending=True).values[min(k * n_valid, s_NF.numel()) - 1]
    return torch.where((valid >= cut) & (valid > 0), s_NF, 0.0)


def normal(seed: int, scale: float = 1.0, shift: float = 0.0, shape: tuple[int, int] = (12, 40)) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.fixture(params=[1, 5, 1000])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 40 latents fall into blocks of this many."""
    monkeypatch.setattr(machine, "PRODUCT_BLOCK_BYTES", 4 * 40 * request.param)


@both
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_batchtopk_keeps_exactly_the_largest_of_the_batch(blocks: None, k: int, masked: bool, dense: bool) -> None:
    mask = torch.arange(12) % 4 != 2 if masked else None
    function = batchtopk(40, k)
    for seed in range(4):  # the first batch without a threshold, the others with one
        s_NF = normal(seed)
        if mask is not None:
            s_NF[~mask] += 100  # would win if masked tokens competed
        latents = select(function, s_NF, dense, mask)
        assert torch.equal(latents, largest(s_NF, k, mask))
        positive = int((s_NF > 0)[slice(None) if mask is None else mask].sum())
        assert int((latents > 0).sum()) == min(k * (9 if masked else 12), positive)
        assert mask is None or not latents[~mask].any()


@pytest.mark.parametrize("shift", [0.0, 1.5])  # 1.5: fewer positive entries than k for each token
@pytest.mark.parametrize("scales", [[100.0, 0.01, 1.0], [0.01, 100.0, 1e-6], [1.0, 1e-4, 1e-8]])
def test_batchtopk_stays_exact_when_the_distribution_jumps(blocks: None, scales: list[float], shift: float) -> None:
    function = batchtopk(40, 4)
    for seed, scale in enumerate(scales):
        s_NF = normal(seed, scale, shift=-shift * scale)
        assert torch.equal(select(function, s_NF, dense=False), largest(s_NF, 4))


def test_batchtopk_stays_exact_when_the_first_block_is_not_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PRODUCT_BLOCK_BYTES", 4 * 40 * 4)
    for factor in (1e-3, 1e3):
        s_NF = normal(0)
        s_NF[:4] *= factor
        assert torch.equal(select(batchtopk(40, 3), s_NF, dense=False), largest(s_NF, 3))


@pytest.mark.parametrize("known", [0.0, 2.0])
def test_a_batch_with_too_few_positive_entries_is_not_looked_at_forever(
    monkeypatch: pytest.MonkeyPatch, known: float
) -> None:
    monkeypatch.setattr(machine, "PRODUCT_BLOCK_BYTES", 4 * 40 * 3)
    function, s_NF = batchtopk(40, 15), normal(0, shift=-1.5)
    s_NF[:3] += 4
    function.batch_topk_threshold.fill_(known)
    looks: list[slice] = []
    candidates = SearchByBudget.candidates

    def look(search: SearchByBudget, s_BF: Tensor, rows: slice) -> Tensor:
        looks.append(rows)
        return candidates(search, s_BF, rows)

    monkeypatch.setattr(SearchByBudget, "candidates", look)
    assert torch.equal(select(function, s_NF, dense=False), largest(s_NF, 15))
    assert len(looks) / 4 <= 8  # blocks of 3 of the 12 tokens


@both
def test_the_running_threshold(dense: bool) -> None:
    function = batchtopk(40, 2)
    want = 0.0
    for seed, scale in enumerate([1.0, 3.0, 0.5, 1.0]):
        latents = select(function, normal(seed, scale), dense)
        smallest = float(latents[latents > 0].min())
        want = smallest if seed == 0 else 0.99 * want + 0.01 * smallest  # the first value as it is
        assert float(function.batch_topk_threshold) == pytest.approx(want, rel=1e-5)
    assert function.batch_topk_threshold.dtype == torch.float32
    function.eval()
    s_NF = normal(9)
    assert torch.equal(select(function, s_NF, dense), torch.where(s_NF > function.batch_topk_threshold, s_NF, 0.0))
    assert float(function.batch_topk_threshold) == pytest.approx(want, rel=1e-5)  # not moved outside training


@both
def test_a_batch_without_positive_entries_leaves_the_threshold(dense: bool) -> None:
    function = batchtopk(40, 2)
    assert not select(function, -normal(0).abs(), dense).any()
    assert float(function.batch_topk_threshold) == 0
    select(function, normal(0), dense)
    before = float(function.batch_topk_threshold)
    select(function, -normal(0).abs(), dense)
    assert float(function.batch_topk_threshold) == before > 0


@both
def test_the_running_threshold_is_in_the_units_of_selection(dense: bool) -> None:
    problem = Problem("batchtopk", gated=True, settings={"top_k": 2})
    latents = problem.encode(dense).dense()
    smallest = float(problem.s()[latents > 0].min())
    assert float(problem.activation.get_buffer("batch_topk_threshold")) == pytest.approx(smallest, rel=1e-5)


# -- following a change of units -----------------------------------------------------------------------------------


def test_rescaling_keeps_the_selection() -> None:
    for act_fn in ("jumprelu", "batchtopk"):
        function = activation(act_fn, 40)
        select(function, normal(0), dense=True)
        function.eval()
        before = select(function, normal(1), dense=True)
        function.rescale(torch.tensor(0.125))
        torch.testing.assert_close(select(function, normal(1) / 8, dense=True) * 8, before)
        assert torch.equal(select(function, normal(1) / 8, dense=True) != 0, before != 0)
