"""Training metrics: closed forms, invariance to how tokens are batched and masked, names, windows, saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm_saes import SparseAutoEncoder

New = Callable[..., Any]
HOOK = "blocks.0.hook_resid_post"
LEGACY = "metrics/explained_variance_legacy"


def with_weights(
    new_sae: New, W_E: Tensor, W_D: Tensor, b_E: float = 0.0, b_D: float | Tensor = 0.0
) -> SparseAutoEncoder:
    """A ReLU dictionary on raw activations."""
    sae = new_sae("relu", norm_activation="inference", latents=W_E.shape[1])
    with torch.no_grad():
        sae.W_E.copy_(W_E)
        sae.W_D.copy_(W_D)
        sae.b_E.fill_(b_E)
        sae.b_D.copy_(torch.as_tensor(b_D))
    return sae


def identity(new_sae: New) -> SparseAutoEncoder:
    """relu(x) - relu(-x) = x."""
    both = torch.cat([torch.eye(8), -torch.eye(8)], dim=1)
    return with_weights(new_sae, both, both.T)


def constant(new_sae: New, value: float | Tensor) -> SparseAutoEncoder:
    """Nothing fires; the reconstruction is `value`."""
    return with_weights(new_sae, torch.zeros(8, 16), torch.zeros(16, 8), b_E=-1.0, b_D=value)


def frozen(run: New, sae: Any, stream: list[Any], **settings: Any) -> Any:
    """Run without moving any weight."""
    settings = {"steps": len(stream), "tokens": stream[0]["tokens"].numel(), "log_frequency": 1000, **settings}
    return run(sae, stream, lr=0.0, **settings).log


def last(log: Any) -> dict[str, float]:
    return log.rows[max(log.rows)]


def valid(stream: list[Any]) -> Tensor:
    """The activations that count, of all batches: `[tokens, d]`, in float64."""
    rows = [b[HOOK].reshape(-1, 8)[b["mask"].reshape(-1) if "mask" in b else slice(None)] for b in stream]
    return torch.cat(rows).double()


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_predicting_the_mean_explains_nothing(
    run: New, new_sae: New, batches: New, masked: bool, offset: float
) -> None:
    stream = batches(3, masked=masked)
    for batch in stream:
        batch[HOOK] = batch[HOOK] + offset
    row = last(frozen(run, constant(new_sae, valid(stream).mean(0)), stream))
    assert row["metrics/explained_variance"] == pytest.approx(0, abs=2e-4 if offset else 1e-6)
    assert row["metrics/l0"] == row["metrics/mean_feature_act"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_the_identity_explains_all(run: New, new_sae: New, batches: New, masked: bool) -> None:
    row = last(frozen(run, identity(new_sae), batches(3, masked=masked)))
    for name in ("metrics/explained_variance", LEGACY):
        assert row[name] == pytest.approx(1, abs=1e-6)
    assert row["metrics/l2_norm_error"] == pytest.approx(0, abs=1e-6)
    assert row["metrics/l0"] == 8


@pytest.mark.parametrize("masked", [False, True])
def test_errors_by_formula(run: New, new_sae: New, batches: New, masked: bool) -> None:
    stream = batches(3, masked=masked)
    row = last(frozen(run, constant(new_sae, 0.7), stream, log_frequency=3))
    y = valid(stream)
    error = (0.7 - y).square().sum(1)
    ratios = [
        1 - (0.7 - b).square().sum(1) / (b - b.mean(0)).square().sum(1) for b in map(valid, ([s] for s in stream))
    ]
    expected = {
        "losses/mse_loss": error.mean(),
        "losses/overall_loss": error.mean(),
        "metrics/explained_variance": 1 - error.sum() / (y - y.mean(0)).square().sum(),
        LEGACY: torch.cat(ratios).mean(),
        "metrics/l2_norm_error": error.sqrt().mean(),
        "metrics/l2_norm_error_ratio": error.sqrt().mean() / y.norm(dim=1).mean(),
        "metrics/decoder_bias_norm": torch.tensor(0.7 * math.sqrt(8)),
    }
    assert {name: row[name] for name in expected} == pytest.approx({n: float(v) for n, v in expected.items()}, rel=1e-5)


def test_latents_by_hand(run: New, new_sae: New) -> None:
    # latent 0 = relu(x0 - 1): 2 on a token that counts, 8 on one that does not; latent 1 = relu(x1 - 1): 1 and 3
    x = torch.zeros(4, 8)
    x[0, 0], x[3, 0], x[0, 1], x[2, 1] = 3.0, 9.0, 2.0, 4.0
    W_E = torch.zeros(8, 16)
    W_E[0, 0] = W_E[1, 1] = 1.0
    W_D = torch.zeros(16, 8)
    W_D[0, 0], W_D[1, 1] = 3.0, 4.0
    batch = {HOOK: x, "tokens": torch.arange(4), "mask": torch.tensor([True, True, True, False])}
    row = frozen(run, with_weights(new_sae, W_E, W_D, b_E=-1.0), [batch], dead_threshold=3).rows[1]
    assert row["metrics/l0"] == pytest.approx(3 / 3)
    assert row["metrics/mean_feature_act"] == pytest.approx((2 + 1 + 3) / 3)
    assert row["metrics/encoder_norm"] == pytest.approx(2 / 16)
    assert row["metrics/decoder_norm"] == pytest.approx(7 / 16)
    assert row["sparsity/dead"] == 14
    assert "sparsity/k" not in row and "metrics/mean_jumprelu_threshold" not in row


def test_mean_jumprelu_threshold(run: New, new_sae: New, batches: New) -> None:
    sae = new_sae("jumprelu")
    with torch.no_grad():
        sae.activation_function.log_threshold[:16] = 0.0
    row = frozen(run, sae, batches(1)).rows[1]
    assert row["metrics/mean_jumprelu_threshold"] == pytest.approx((1 + math.exp(-1)) / 2)


@pytest.mark.parametrize("masked", [False, True])
def test_frequencies_against_their_limits(run: New, new_sae: New, masked: bool) -> None:
    """Latent i fires on `fires[i]` of 200 valid tokens: limits are strict, in both directions."""
    fires = {0: 200, 1: 21, 2: 20, 3: 3, 4: 2, 5: 1}
    x = torch.zeros(400 if masked else 200, 8)
    for latent, n in fires.items():
        x[:n, latent] = 2.0
    x[200:] = 5.0  # where it does not count, everything fires
    batch: dict[str, Any] = {HOOK: x, "tokens": torch.arange(len(x))}
    if masked:
        batch["mask"] = torch.arange(400) < 200
    W_E = torch.cat([torch.eye(8), torch.zeros(8, 8)], dim=1)
    halves = [{name: t[i::2] for name, t in batch.items()} for i in range(2)]
    sae = with_weights(new_sae, W_E, torch.ones(16, 8), b_E=-1.0)
    row = last(frozen(run, sae, halves, feature_sampling_window=2))
    names = ["above_1e-1", "above_1e-2", "below_1e-5", "below_1e-6", "below_1e-7"]
    assert [row[f"sparsity/{name}"] for name in names] == [2, 4, 10, 10, 10]


# --- how tokens are batched does not matter --------------------------------------------------------------------------


@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
def test_half_batches_and_padding_report_as_the_whole(run: New, new_sae: New, batches: New, act_fn: str) -> None:
    (whole,) = batches(1, tokens=32)
    cut = [{n: t[:11] for n, t in whole.items()}, {n: t[11:] for n, t in whole.items()}]  # not equally long
    padded = []
    for part in cut:
        rubbish = {HOOK: torch.full((5, 8), 50.0), "tokens": torch.zeros(5, dtype=torch.int64)}
        mask = torch.arange(len(part["tokens"]) + 5) < len(part["tokens"])
        padded.append({n: torch.cat([part[n], rubbish[n]]) for n in part} | {"mask": mask})
    settings: dict[str, Any] = {"sparsity_loss_type": "power"} | (
        {"lp_coefficient": 0.1} if act_fn == "jumprelu" else {}
    )
    one = last(frozen(run, new_sae(act_fn), [whole], feature_sampling_window=1, tokens=32, name="a", **settings))
    differs = {LEGACY, "details/tokens_per_second", "metrics/gradient_norm_max", "metrics/gradient_norm",
               "metrics/gradient_norm_before_clipping", "metrics/gradient_norm_before_clipping_max",
               "details/l1_coefficient"}  # fmt: skip
    for parts, name in ((cut, "b"), (padded, "c")):
        settings |= {"l1_coefficient_warmup_steps": 0}
        two = last(frozen(run, new_sae(act_fn), parts, feature_sampling_window=2, tokens=11, steps=2, name=name,
                          total_training_tokens=2 * len(parts[0]["tokens"]), **settings))  # fmt: skip
        ignored = differs | {"losses/sparsity_loss", "losses/overall_loss"}
        assert {n: v for n, v in two.items() if n not in ignored} == pytest.approx(
            {n: v for n, v in one.items() if n not in ignored}, rel=1e-5
        )


# --- names -----------------------------------------------------------------------------------------------------------

ALWAYS = {
    "losses/overall_loss", "losses/mse_loss",
    "metrics/l0", "metrics/explained_variance", LEGACY, "metrics/l2_norm_error", "metrics/l2_norm_error_ratio",
    "metrics/mean_feature_act", "metrics/encoder_norm", "metrics/decoder_norm", "metrics/decoder_bias_norm",
    "metrics/gradient_norm", "metrics/gradient_norm_max",
    "metrics/gradient_norm_before_clipping", "metrics/gradient_norm_before_clipping_max",
    "sparsity/above_1e-1", "sparsity/above_1e-2", "sparsity/below_1e-5", "sparsity/below_1e-6", "sparsity/below_1e-7",
    "sparsity/dead",
    "details/current_learning_rate", "details/n_training_tokens", "details/l1_coefficient", "details/lp_coefficient",
    "details/auxk_coefficient", "details/tokens_per_second",
}  # fmt: skip


@pytest.mark.parametrize(
    ("act_fn", "settings", "more"),
    [
        ("relu", {}, set()),
        ("topk", {"auxk_coefficient": 0.1}, {"sparsity/k", "losses/aux_loss"}),
        ("batchtopk", {}, {"sparsity/k"}),
        (
            "jumprelu",
            {"lp_coefficient": 0.1, "sparsity_loss_type": "tanh-quad"},
            {"losses/lp_loss", "losses/sparsity_loss", "metrics/mean_jumprelu_threshold"},
        ),
    ],
)
def test_names_are_those_of_the_specification(
    run: New, new_sae: New, batches: New, act_fn: str, settings: dict[str, Any], more: set[str]
) -> None:
    row = run(new_sae(act_fn), batches(2), steps=2, feature_sampling_window=1, **settings).log.rows[2]
    assert set(row) == ALWAYS | more
    assert all(type(value) is float for value in row.values())


# --- windows ---------------------------------------------------------------------------------------------------------


def test_windows_end_at_reports(run: New, new_sae: New, batches: New) -> None:
    """Every report is about the steps since the last one; frequencies have a window of their own."""
    stream = batches(6)
    sae = new_sae("topk")
    each = frozen(run, sae, stream, log_frequency=1, name="each", feature_sampling_window=1)
    pairs = frozen(run, sae, stream, log_frequency=2, name="pairs", feature_sampling_window=3)
    for name in ("losses/mse_loss", "metrics/l0", "metrics/l2_norm_error", "metrics/gradient_norm"):
        one, two = each.series(name), pairs.series(name)
        assert two == pytest.approx({step: (one[step - 1] + one[step]) / 2 for step in (2, 4, 6)}, rel=1e-6)
    for name in ("metrics/gradient_norm_max", "metrics/gradient_norm_before_clipping_max"):
        one, two = each.series(name), pairs.series(name)
        assert two == pytest.approx({step: max(one[step - 1], one[step]) for step in (2, 4, 6)}, rel=1e-6)
    assert list(pairs.series("sparsity/above_1e-2")) == [4, 6]  # windows end at steps 3 and 6
    assert list(pairs.series("sparsity/dead")) == [2, 4, 6]


def test_a_frequency_window_counts_its_own_steps_only(run: New, new_sae: New, batches: New) -> None:
    """All latents fire in steps 1 and 2, none in 3 and 4."""
    stream = batches(4)
    for i, batch in enumerate(stream):
        batch[HOOK] = torch.full((16, 8), 1.0 if i < 2 else -1.0)
    sae = with_weights(new_sae, torch.ones(8, 16), torch.ones(16, 8))
    log = frozen(run, sae, stream, log_frequency=1, feature_sampling_window=2)
    assert log.series("sparsity/above_1e-1") == {2: 16, 4: 0}
    assert log.series("sparsity/below_1e-7") == {2: 0, 4: 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unfinished_windows_survive_a_checkpoint(run: New, new_sae: New, batches: New, dtype: torch.dtype) -> None:
    stream = batches(8)
    settings = {"steps": 8, "log_frequency": 4, "feature_sampling_window": 4, "clip_grad_norm": 1.0}
    whole = run(new_sae("topk", dtype=dtype), stream, name="whole", **settings)
    for stop in (1, 3, 6):  # after the first step of a window, in its middle, and after a report
        first = run(new_sae("topk", dtype=dtype), stream[:stop], name=f"cut{stop}", **settings)
        assert first.ended_early
        second = run(new_sae("topk", seed=9, dtype=dtype), stream[stop:], name=f"cut{stop}",
                     from_pretrained_path=str(first.path), **settings)  # fmt: skip
        for step, row in second.log.rows.items():
            del row["details/tokens_per_second"]
            assert row == {n: v for n, v in whole.log.rows[step].items() if n != "details/tokens_per_second"}
        state = load_file(first.path / "checkpoints" / f"step_{stop}" / "state.safetensors")
        assert state["tokens_since_last_activation"].dtype == torch.int64
        assert (state["metrics.Losses.tokens"] == 16 * (stop % 4)) and state[
            "metrics.Losses.tokens"
        ].dtype == torch.float64
