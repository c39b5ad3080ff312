"""A run on several processes gives the numbers of one: losses, metrics, weights, choices, dead counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.dictionaries.config import BaseSAEConfig

from .conftest import Pools
from .work import KINDS, REPORT, Case, train

MESHES = [(1, 2), (2, 1), (1, 4), (4, 1), (2, 2)]
HEADS = [(1, 1, 2), (1, 2, 2), (2, 1, 2), (1, 1, 4)]
"""Meshes that cut a crosscoder's heads, too: `data x model x head`."""
ROUNDED = ("weights.activation_function.log_jumprelu_threshold", "report.metrics/mean_jumprelu_threshold")
"""Thresholds are float32 in every dictionary."""


def losses_of(act_fn: str) -> dict[str, Any]:
    """Settings that bring every loss term in."""
    match act_fn:
        case "relu":
            return {"sparsity_loss_type": "power", "p": 2, "l1_coefficient": 0.05}
        case "jumprelu":
            return {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.01, "lp_coefficient": 0.01}
    return {"auxk_coefficient": 0.1, "k_aux": 4}


def cases() -> list[Case]:
    BaseSAEConfig.kind("sae")  # imports all kinds
    return [
        Case(kind, act_fn, uneven=uneven, trainer=losses_of(act_fn) | {"gradient_accumulation_steps": 1 + uneven})
        for kind in KINDS
        if kind != "tied"
        for act_fn in sorted(BaseSAEConfig.registry["sae" if kind == "transcoder" else kind].activation_functions)
        for uneven in ((True, False) if kind == "sae" else (True,))
    ]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert one.shape == other.shape
    one, other = one.double(), other.double()
    return float(((one - other).abs() / one.abs().max().clamp(min=1e-12)).max()) if one.numel() else 0.0


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    assert torch.equal(one["chosen"], other["chosen"]) and torch.equal(one["waited"], other["waited"])
    off = {name: difference(one[name], other[name]) for name in one}
    assert not {name: error for name, error in off.items() if not error <= (1e-6 if name in ROUNDED else tolerance)}


@pytest.mark.parametrize(
    "case", cases(), ids=lambda case: f"{case.kind}-{case.act_fn}-{'masks' if case.uneven else 'whole'}"
)
def test_twenty_steps_in_double_precision(case: Case, pools: Pools, tmp_path: Path) -> None:
    one = train(case, None, str(tmp_path))
    assert (
        one["report.losses/overall_loss"].isfinite().all()
        and len(one["report.losses/overall_loss"]) == case.steps // REPORT
    )
    for mesh in MESHES + (HEADS if case.kind == "crosscoder" else []):
        assert_same(one, pools(math.prod(mesh)).train(case, mesh), 1e-9)


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_a_kind_from_outside(act_fn: str, pools: Pools, tmp_path: Path) -> None:
    case = Case("tied", act_fn, uneven=True, trainer=losses_of(act_fn))
    one = train(case, None, str(tmp_path))
    for mesh in ((1, 2), (2, 1)):
        assert_same(one, pools(2).train(case, mesh), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_in_single_precision(kind: str, pools: Pools, tmp_path: Path) -> None:
    case = Case(kind, "topk", steps=1, dtype="float32")
    one = train(case, None, str(tmp_path))
    for mesh in MESHES + (HEADS if case.kind == "crosscoder" else []):
        other = pools(math.prod(mesh)).train(case, mesh)
        reports = [name for name in one if name.startswith("report.")]
        off = {name: difference(one[name], other[name]) for name in reports}
        assert not {name: error for name, error in off.items() if not error < 1e-5}


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk", "jumprelu"])
def test_a_last_batch_too_short_for_all(act_fn: str, pools: Pools, tmp_path: Path) -> None:
    case = Case("sae", act_fn, steps=4, short_end=True, trainer=losses_of(act_fn))
    one = train(case, None, str(tmp_path))
    assert_same(one, pools(2).train(case, (2, 1)), 1e-9)


@pytest.mark.parametrize(
    "initializer",
    [
        {"bias_init_method": "geometric_median", "grid_search_init_norm": True},
        {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 3},
        {"init_encoder_bias_with_mean_hidden_pre": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_initialisation_looks_at_the_whole_batch(initializer: dict[str, Any], pools: Pools, tmp_path: Path) -> None:
    case = Case("sae", "topk", steps=2, uneven=True, initializer=initializer)
    one = train(case, None, str(tmp_path))
    for mesh in ((1, 2), (2, 1)):
        assert_same(one, pools(2).train(case, mesh), 1e-9)


@pytest.mark.parametrize(
    ("sae", "trainer", "initializer"),
    [
        ({"top_k": 1}, {"auxk_coefficient": 0.1, "k_aux": 4}, {}),
        ({"top_k": 1}, {"optimizer_class": "sparseadam"}, {}),
        ({}, {}, {"bias_init_method": "geometric_median", "grid_search_init_norm": True}),
        ({}, {}, {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 3}),
        ({}, {}, {"init_encoder_bias_with_mean_hidden_pre": True}),
    ],
    ids=["sparse", "sparse adam", "norms", "subspace", "encoder bias"],
)
def test_heads_elsewhere(
    sae: dict[str, Any], trainer: dict[str, Any], initializer: dict[str, Any], pools: Pools, tmp_path: Path
) -> None:
    case = Case("crosscoder", "topk", steps=5, uneven=True, sae=sae, trainer=trainer, initializer=initializer)
    one = train(case, None, str(tmp_path))
    for mesh in HEADS:
        assert_same(one, pools(math.prod(mesh)).train(case, mesh), 1e-9)


def test_sparse_adam_where_the_latents_of_a_process_have_no_gradient(pools: Pools, tmp_path: Path) -> None:
    case = Case("sae", "topk", steps=8, uneven=True, sae={"top_k": 1}, trainer={"optimizer_class": "sparseadam"})
    assert_same(train(case, None, str(tmp_path)), pools(4).train(case, (1, 4)), 1e-9)
