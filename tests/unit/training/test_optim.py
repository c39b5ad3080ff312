"""Learning rates, optimizers, clipping and micro-batches, against plain arithmetic on the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.training.config import TrainerConfig
from lm_saes.training.dead_latents import DeadLatents
from lm_saes.training.optim import build_optimizer
from lm_saes.training.optimizers import FusedAdam, SparseAdam

New = Callable[..., Any]
HOOK = "blocks.0.hook_resid_post"
THRESHOLD = "activation_function.log_jumprelu_threshold"


def weights(sae: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- an optimizer written out ----------------------------------------------------------------------------------------


def plain_gradients(p: dict[str, Tensor], batch: dict[str, Any], scale: float) -> dict[str, Tensor]:
    """Of the mean squared error of a ReLU dictionary, densely."""
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    x = batch[HOOK].double() * scale
    y = torch.relu(x @ leaves["W_E"] + leaves["b_E"]) @ leaves["W_D"] + leaves["b_D"]
    (y - x).square().sum(1).mean().backward()
    return {name: t.grad if t.grad is not None else torch.zeros_like(t) for name, t in leaves.items()}


def plain_steps(kind: str, p: dict[str, Tensor], stream: list[dict[str, Any]], scale: float, lr: float,
                betas: tuple[float, float]) -> dict[str, Tensor]:  # fmt: skip
    """Adam (Kingma & Ba) or the sparse kind of SPEC section 7, entry by entry."""
    (b1, b2), eps = betas, 1e-8
    m, v = {n: torch.zeros_like(t) for n, t in p.items()}, {n: torch.zeros_like(t) for n, t in p.items()}
    steps = dict.fromkeys(p, 0)
    for batch in stream:
        for name, g in plain_gradients(p, batch, scale).items():
            if kind == "sparseadam" and not bool((g != 0).any()):
                continue
            steps[name] += 1
            t = steps[name]
            m[name], v[name] = b1 * m[name] + (1 - b1) * g, b2 * v[name] + (1 - b2) * g**2
            if kind == "adam":
                move = lr * (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + eps)
            else:
                move = lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m[name] / (v[name].sqrt() + eps) * (g != 0)
            p = p | {name: p[name] - move}
    return p


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8)])
@pytest.mark.parametrize("kind", ["adam", "sparseadam"])
def test_optimizer_against_a_plain_one(
    run: New, new_sae: New, batches: New, kind: str, betas: tuple[float, float]
) -> None:
    sae, stream = new_sae("relu", dtype=torch.float64), batches(5)
    with torch.no_grad():
        sae.b_E[:16] = -2.0  # so that many gradients are exactly zero at some steps
    expected = plain_steps(kind, weights(sae), stream, 8**0.5 / 4.0, 1e-2, betas)
    other = plain_steps(
        {"adam": "sparseadam", "sparseadam": "adam"}[kind], weights(sae), stream, 8**0.5 / 4.0, 1e-2, betas
    )
    run(sae, stream, steps=5, optimizer_class=kind, betas=betas)
    assert distance(weights(sae), expected) < 1e-12
    assert distance(other, expected) > 1e-4


def test_sparse_adam_by_hand() -> None:
    """Moments decay everywhere; only entries with a gradient move; an all-zero gradient is no step at all."""
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SparseAdam([w], lr=0.1, betas=(0.5, 0.75), eps=0.25)
    # step 1, g = (2, 0): m = 1, v = 1: 0.1 * sqrt(.25)/.5 * 1/(1 + .25) = 0.08
    # g = (0, 0): nothing. step 2, g = (0, 4): m = (.5, 2), v = (.75, 4), w0 stays; 0.1 * sqrt(7/16)/.75 * 2/2.25
    for gradient in ([2.0, 0.0], [0.0, 0.0], [0.0, 4.0]):
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert w.tolist() == pytest.approx([-0.08, -0.1 * math.sqrt(7 / 16) / 0.75 * 2 / 2.25])
    assert optimizer.state[w]["exp_avg"].tolist() == [0.5, 2.0]
    assert float(optimizer.state[w]["step"]) == 2


@pytest.mark.parametrize(("foreach", "flags"), [(True, (True, None)), (False, (False, False))])
def test_optimizer_foreach(
    run: New, new_sae: New, batches: New, foreach: bool, flags: tuple[bool, bool | None]
) -> None:
    fast = run(new_sae("topk"), batches(6), name="fast")
    chosen = run(new_sae("topk"), batches(6), name="chosen", optimizer_foreach=foreach)
    defaults = chosen.trainer.optimizer.defaults
    assert (defaults["fused"], defaults["foreach"]) == flags
    assert distance(weights(fast.sae), weights(chosen.sae)) < 1e-6  # float32 rounding over six steps of 1e-2


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act_fn", "settings", "expected"),
    [
        ("relu", {"lr": 0.01}, dict.fromkeys(["W_E", "b_E", "W_D", "b_D"], 0.01)),
        ("relu", {"lr": {"default": 0.01, "W_D": 0.03}}, {"W_E": 0.01, "b_E": 0.01, "W_D": 0.03, "b_D": 0.01}),
        ("relu", {"lr": {"others": 0.02, "b_E": 0.0}}, {"W_E": 0.02, "b_E": 0.0, "W_D": 0.02, "b_D": 0.02}),
        ("jumprelu", {"lr": {"default": 0.01, "jumprelu": 0.05}}, {"W_E": 0.01, THRESHOLD: 0.05}),
        ("jumprelu", {"lr": {"jumprelu": 0.05, "others": 0.01, THRESHOLD: 0.02}}, {"W_E": 0.01, THRESHOLD: 0.02}),
        ("jumprelu", {"lr": 0.01, "jumprelu_lr_factor": 3.0}, {"W_E": 0.01, THRESHOLD: 0.03}),
        ("jumprelu", {"lr": {"default": 0.01}, "jumprelu_lr_factor": 0.5}, {"W_E": 0.01, THRESHOLD: 0.005}),
        ("jumprelu", {"lr": 0.01, "jumprelu_lr_factor": 0.0}, {"W_E": 0.01, THRESHOLD: 0.0}),
    ],
)
def test_learning_rates_by_parameter_and_group(
    run: New, new_sae: New, batches: New, act_fn: str, settings: dict[str, Any], expected: dict[str, float]
) -> None:
    """Adam's first step moves every entry that has a gradient by the learning rate."""
    sae = new_sae(act_fn)
    before = weights(sae)
    run(sae, batches(1), steps=1, **settings)
    moved = {name: float((p - before[name]).abs().max()) for name, p in weights(sae).items() if name in expected}
    assert moved == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"lr_scheduler_name": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        # rise (t+1)/2; fall r + (1-r)(8-t)/4
        (
            {
                "lr_scheduler_name": "constantwithwarmup",
                "lr_warm_up_steps": 2,
                "lr_cool_down_steps": 4,
                "lr_end_ratio": 0.2,
            },
            [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4],
        ),
        (
            {"lr_scheduler_name": "constantwithwarmup", "lr_warm_up_steps": 0.5, "lr_cool_down_steps": 0.25},
            [0.25, 0.5, 0.75, 1, 1, 1, 1, 1 / 32 + 31 / 64],
        ),
        (
            {"lr_scheduler_name": "linearwarmupdecay", "lr_warm_up_steps": 4, "lr_end_ratio": 0.2},
            [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4],
        ),
    ],
)
def test_learning_rate_schedule(
    run: New, new_sae: New, batches: New, settings: dict[str, Any], factors: list[float]
) -> None:
    sae, seen = new_sae("relu"), []

    def spied(stream: list[Any]) -> Iterator[Any]:
        before = weights(sae)
        for batch in stream:
            yield batch
            seen.append(distance(before, weights(sae)))
            before = weights(sae)

    # without memory (betas 0) every step moves by the rate: Adam's g / |g|
    log = run(sae, spied(batches(9)), steps=8, betas=(0.0, 0.0), **settings).log
    assert list(log.series("details/current_learning_rate").values()) == pytest.approx([1e-2 * f for f in factors])
    assert seen == pytest.approx([1e-2 * f for f in factors[: len(seen)]], rel=1e-4)
    assert len(seen) >= 7


def test_a_rate_that_is_missing_is_named(new_sae: New) -> None:
    with pytest.raises(ConfigError, match=r"gives no rate for 'W_E'; add it, its group 'others', or 'default'"):
        build_optimizer(TrainerConfig(lr={"jumprelu": 1.0}), new_sae("jumprelu"))


# --- clipping --------------------------------------------------------------------------------------------------------


def descent(cfg: TrainerConfig, dictionary: torch.nn.Module) -> torch.optim.Optimizer:
    """Moves by exactly the gradient, so that the gradient can be read off."""
    return torch.optim.SGD(
        [{"params": [p], "name": n, "base_lr": 1.0} for n, p in dictionary.named_parameters()], lr=1.0
    )


@pytest.mark.parametrize("largest", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("act_fn", ["topk", "jumprelu"])
def test_clip_grad_norm(
    run: New, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch, act_fn: str, largest: float
) -> None:
    """By the global 2-norm over everything but thresholds, which are neither counted nor scaled."""
    monkeypatch.setattr("lm_saes.training.run.build_optimizer", descent)

    def gradients(name: str, limit: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        sae = new_sae(act_fn, dtype=torch.float64)
        before = weights(sae)
        row = run(sae, batches(1), name=name, steps=1, clip_grad_norm=limit).log.rows[1]
        return {key: before[key] - p for key, p in weights(sae).items()}, row

    free, _ = gradients("free", 0.0)
    clipped, row = gradients("clipped", largest)
    norm = math.sqrt(sum(float(g.square().sum()) for key, g in free.items() if key != THRESHOLD))
    factor = min(1.0, largest / norm) if largest else 1.0
    assert (THRESHOLD in free) == (act_fn == "jumprelu") and norm > 1
    for key, g in free.items():
        torch.testing.assert_close(clipped[key], g * (1.0 if key == THRESHOLD else factor))
    assert row["metrics/gradient_norm_before_clipping"] == pytest.approx(norm, rel=1e-5)
    assert row["metrics/gradient_norm"] == pytest.approx(norm * factor, rel=1e-5)


# --- micro-batches ---------------------------------------------------------------------------------------------------


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(
    ("act_fn", "settings"),
    [
        ("topk", {"auxk_coefficient": 0.5, "dead_threshold": 60}),
        ("relu", {"sparsity_loss_type": "power", "l1_coefficient": 0.1, "l1_coefficient_warmup_steps": 0, "p": 0.5}),
        ("relu", {"sparsity_loss_type": "tanh", "l1_coefficient": 0.1}),
        ("jumprelu", {"lp_coefficient": 0.1, "clip_grad_norm": 0.5}),
    ],
)
def test_micro_batches_are_one_batch(
    run: New, new_sae: New, batches: New, act_fn: str, settings: dict[str, Any]
) -> None:
    parts = batches(12, masked=True)
    for i, part in enumerate(parts):  # unequal numbers of valid tokens
        part["mask"][1 : 4 * (i % 3)] = False
    whole = [joined(parts[i : i + 3]) for i in range(0, 12, 3)]
    few, many = new_sae(act_fn, dtype=torch.float64), new_sae(act_fn, dtype=torch.float64)
    big = run(few, whole, name="big", steps=4, tokens=48, **settings)
    small = run(many, parts, name="small", steps=4, tokens=48, gradient_accumulation_steps=3, **settings)
    assert small.trainer.cur_step == big.trainer.cur_step == 4
    assert distance(weights(few), weights(many)) < 1e-10
    assert torch.equal(small.trainer.tokens_since_last_activation, big.trainer.tokens_since_last_activation)
    if "auxk_coefficient" in settings:
        assert big.log.rows[4]["losses/aux_loss"] > 0
    batch_coupled = {"metrics/explained_variance_legacy", "details/tokens_per_second"}
    for step, row in big.log.rows.items():
        same = {name: value for name, value in row.items() if name not in batch_coupled}
        other = {name: value for name, value in small.log.rows[step].items() if name not in batch_coupled}
        assert other == pytest.approx(same, rel=1e-6)


def test_dead_latents_are_frozen_within_a_step(
    run: New, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[tuple[int, int]] = []
    update = DeadLatents.update

    def spy(self: DeadLatents, fired: Tensor, n_tokens: Any) -> Tensor:
        updates.append((int(fired.sum()), int(n_tokens)))
        return update(self, fired, n_tokens)

    monkeypatch.setattr(DeadLatents, "update", spy)
    run(new_sae("topk"), batches(4), steps=2, tokens=32, gradient_accumulation_steps=2)
    assert [n for _, n in updates] == [32, 32]


def test_a_step_at_the_end_of_the_stream_may_have_fewer_micro_batches(run: New, new_sae: New, batches: New) -> None:
    fitted = run(new_sae("topk"), batches(3), steps=4, tokens=32, gradient_accumulation_steps=2)
    assert fitted.ended_early and fitted.trainer.cur_step == 2 and fitted.trainer.cur_tokens == 48


# --- layouts ---------------------------------------------------------------------------------------------------------

# Shape as stored, and the order of its dimensions that gives the parameter: an autoencoder's encoder, a crosscoder's,
# a cross-layer transcoder's, one layer of it, and a contiguous one.
LAYOUTS = {
    "[d, F] stored [F, d]": ((37, 11), (1, 0)),
    "[H, d, F] stored [F, H, d]": ((37, 3, 11), (1, 2, 0)),
    "[L, d, F] stored [L, F, d]": ((3, 37, 11), (0, 2, 1)),
    "[1, d, F] stored [1, F, d]": ((1, 37, 11), (0, 2, 1)),
    "[F, d]": ((37, 11), (0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_adam_hands_over_what_is_stored_and_equals_plain_adam(layout: str) -> None:
    stored, order = LAYOUTS[layout]
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(stored, generator=draw)
    ours = torch.nn.Parameter(start.clone().permute(order))
    plain = torch.nn.Parameter(start.clone())
    fused, reference = FusedAdam([ours], lr=1e-2, fused=True), torch.optim.Adam([plain], lr=1e-2, fused=True)
    strides = ours.stride()
    for _ in range(5):
        gradient = torch.randn(stored, generator=draw)
        ours.grad, plain.grad = gradient.clone().permute(order), gradient
        fused.step()
        reference.step()
    assert torch.equal(ours.detach(), plain.detach().permute(order))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(fused.state[ours][name], reference.state[plain][name].permute(order))
    assert ours.stride() == strides

    lists: list[list[Tensor]] = [[] for _ in range(6)]
    fused._init_group(fused.param_groups[0], *lists)
    for (handed,), own in zip(lists[:4], (ours, ours.grad, *moments(fused, ours)), strict=True):
        assert handed.is_contiguous()
        assert own is not None and handed.data_ptr() == own.data_ptr()  # no copy


def moments(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[Tensor, Tensor]:
    return optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]


def test_fused_adam_takes_a_gradient_of_another_layout() -> None:
    start = torch.randn(3, 11, 37, generator=torch.Generator().manual_seed(0))
    ours = torch.nn.Parameter(start.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    plain = torch.nn.Parameter(start.clone())
    fused, reference = FusedAdam([ours], lr=1e-2, fused=True), torch.optim.Adam([plain], lr=1e-2, fused=True)
    for seed in range(3):
        gradient = torch.randn(3, 11, 37, generator=torch.Generator().manual_seed(seed))
        ours.grad, plain.grad = gradient.clone(), gradient  # contiguous, unlike the parameter
        fused.step()
        reference.step()
    torch.testing.assert_close(ours.detach(), plain.detach(), rtol=1e-6, atol=1e-7)
