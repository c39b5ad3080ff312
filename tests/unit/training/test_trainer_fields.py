"""Every field of `TrainerConfig` does what its description says: each case here fails if the field is ignored."""

import ast
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes import TrainerConfig, machine
from lm_saes.errors import TrainingError
from lm_saes.training import precision

New = Callable[..., Any]
HOOK = "blocks.0.hook_resid_post"

# --- losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def weighed_latents(sae: Any, batch: dict[str, Any]) -> Tensor:
    """`f norm`, densely, of a raw batch: `[tokens, latents]`."""
    x = sae.normalize_activations(batch)[HOOK]
    return torch.relu(x @ sae.W_E + sae.b_E) * sae.W_D.norm(dim=1)


SPARSITY: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"sparsity_loss_type": "power"}, lambda a: a.sum(1).mean()),
    ({"sparsity_loss_type": "power", "p": 0.5}, lambda a: (a.sqrt().sum(1) ** 2).mean()),
    ({"sparsity_loss_type": "tanh"}, lambda a: torch.tanh(4 * a).sum(1).mean()),
    ({"sparsity_loss_type": "tanh", "tanh_stretch_coefficient": 0.5}, lambda a: torch.tanh(a / 2).sum(1).mean()),
    (
        {"sparsity_loss_type": "tanh-quad"},
        lambda a: (torch.tanh(4 * a).mean(0) * (1 + 100 * torch.tanh(4 * a).mean(0))).sum(),
    ),
    (
        {"sparsity_loss_type": "tanh-quad", "frequency_scale": 0.5},
        lambda a: (torch.tanh(4 * a).mean(0) * (1 + 2 * torch.tanh(4 * a).mean(0))).sum(),
    ),
]


@pytest.mark.parametrize("coefficient", [None, 0.25])
@pytest.mark.parametrize(("settings", "formula"), SPARSITY)
def test_sparsity_loss(
    run: New, new_sae: New, batches: New, settings: dict[str, Any], formula: Callable[[Tensor], Tensor],
    coefficient: float | None,
) -> None:  # fmt: skip
    sae, (batch,) = new_sae("relu"), batches(1)
    expected = (1 if coefficient is None else coefficient) * float(formula(weighed_latents(sae, batch)))
    at_once = {} if coefficient is None else {"l1_coefficient_warmup_steps": 0}
    row = run(sae, [batch], steps=1, l1_coefficient=coefficient, **at_once, **settings).log.rows[1]
    assert row["losses/sparsity_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["losses/overall_loss"] == pytest.approx(row["losses/mse_loss"] + expected, rel=1e-5)


def test_no_sparsity_loss_unless_a_type_is_named(run: New, new_sae: New, batches: New) -> None:
    row = run(new_sae("relu"), batches(1), steps=1).log.rows[1]
    assert "losses/sparsity_loss" not in row
    assert row["details/l1_coefficient"] == 0


def test_l1_coefficient_warmup_steps(run: New, new_sae: New, batches: New) -> None:
    log = run(new_sae("relu"), batches(6), sparsity_loss_type="power", l1_coefficient=8.0,
              l1_coefficient_warmup_steps=4).log  # fmt: skip
    assert list(log.series("details/l1_coefficient").values()) == [0, 2, 4, 6, 8, 8]
    losses = log.series("losses/sparsity_loss")
    assert losses[1] == 0 and losses[2] > 0


@pytest.mark.parametrize("coefficient", [None, 0.5, 2.0])
def test_lp_coefficient(run: New, new_sae: New, batches: New, coefficient: float | None) -> None:
    sae, (batch,) = new_sae("jumprelu"), batches(1)
    with torch.no_grad():
        x = sae.normalize_activations(batch)[HOOK]
        short = torch.relu(math.exp(-1.0) - (x @ sae.W_E + sae.b_E) * sae.W_D.norm(dim=1)).sum(1).mean()
    row = run(sae, [batch], steps=1, lp_coefficient=coefficient).log.rows[1]
    expected = None if coefficient is None else pytest.approx(coefficient * float(short), rel=1e-5)
    assert row.get("losses/lp_loss") == expected
    assert row["details/lp_coefficient"] == (coefficient or 0)


@pytest.mark.parametrize(("coefficient", "k_aux"), [(None, 512), (0.5, 512), (2.0, 512), (0.5, 1), (0.5, 2)])
def test_auxk_coefficient_and_k_aux(
    run: New, new_sae: New, batches: New, coefficient: float | None, k_aux: int
) -> None:
    sae, stream = new_sae("topk", top_k=1), batches(1) * 2
    with torch.no_grad():  # latents 0 and 1 win everywhere; with a rate of 0 nothing else changes
        sae.b_E[:2] = 100.0
    with torch.no_grad():
        x = sae.normalize_activations(stream[0])[HOOK]
        h = x @ sae.W_E + sae.b_E
        s = h * sae.W_D.norm(dim=1)
        dead = [i for i in range(32) if i not in set(s.argmax(1).tolist())]
        error = x - sae(x)
        k = min(k_aux, len(dead))
        kept = torch.zeros(16, len(dead)).scatter_(1, s[:, dead].topk(k).indices, 1.0) * (h[:, dead] > 0)
        expected = float((error - (h[:, dead] * kept) @ sae.W_D[dead]).square().sum(1).mean())

    given = {} if coefficient is None else {"auxk_coefficient": coefficient}
    given |= {"k_aux": k_aux} if k_aux != 512 else {}
    log = run(sae, stream, steps=2, lr=0.0, dead_threshold=16, **given).log
    assert log.series("losses/aux_loss").get(1, 0) == 0  # dead as of before the batch: none yet
    assert log.rows[2].get("losses/aux_loss", 0) == pytest.approx((coefficient or 0) * expected, rel=1e-5)
    assert log.rows[2]["details/auxk_coefficient"] == (coefficient or 0)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(16, [5, 5, 5]), (17, [0, 5, 5]), (48, [0, 0, 5]), (1e7, [0, 0, 0])]
)
def test_dead_threshold(run: New, new_sae: New, batches: New, threshold: float, expected: list[int]) -> None:
    sae = new_sae("relu")
    with torch.no_grad():
        sae.b_E.fill_(100.0)
        sae.b_E[:5] = -100.0
    assert list(
        run(sae, batches(3), lr=0.0, steps=3, dead_threshold=threshold).log.series("sparsity/dead").values()
    ) == (expected)


# --- k ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4] * 8),
        ({"initial_k": 20, "k_warmup_steps": 0}, [4] * 8),
        ({"initial_k": 20, "k_warmup_steps": 4}, [20, 16, 12, 8, 4, 4, 4, 4]),
        ({"initial_k": 20}, [20, 4, 4, 4, 4, 4, 4, 4]),  # 0.1 of 8 steps: 1
        ({"initial_k": 20, "k_warmup_steps": 4, "k_cold_booting_steps": 2}, [20, 20, 20, 16, 12, 8, 4, 4]),
        ({"initial_k": 20, "k_warmup_steps": 4, "k_schedule_type": "exponential"}, [20, 12, 7, 5, 4, 4, 4, 4]),
        (
            {"initial_k": 20, "k_warmup_steps": 4, "k_schedule_type": "exponential", "k_exponential_factor": 9.0},
            [20, 6, 5, 5, 4, 4, 4, 4],  # 20 - 16 (1 - e^(-9u)): 5.69, 4.18, 4.02
        ),
    ],
)
def test_k_schedule(run: New, new_sae: New, batches: New, settings: dict[str, Any], expected: list[int]) -> None:
    sae = new_sae("topk")
    with torch.no_grad():
        sae.b_E.fill_(100.0)  # everything positive, so that exactly k are kept
    log = run(sae, batches(8), steps=8, lr=0.0, **settings).log
    assert list(log.series("sparsity/k").values()) == expected
    assert list(log.series("metrics/l0").values()) == expected


# --- precision, metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_amp_dtype(
    run: New, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: True)
    sae, seen = new_sae("relu"), []
    record = sae.record

    def spy(batch: Any) -> Any:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return record(batch)

    monkeypatch.setattr(sae, "record", spy)
    run(sae, batches(2), steps=2, amp_dtype=dtype)
    assert seen == [dtype, dtype]
    assert all(p.dtype == torch.float32 for p in sae.parameters())


def test_mixed_precision_is_left_out_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_computes_in", lambda dtype: False)
    with pytest.warns(UserWarning, match="amp_dtype"), precision.mixed_precision(torch.bfloat16, "cpu"):
        assert not torch.is_autocast_enabled("cpu")


def test_amp_is_bfloat16_by_default_and_none_can_be_written_in_toml() -> None:
    assert TrainerConfig().amp_dtype == torch.bfloat16
    assert TrainerConfig.model_validate({"amp_dtype": "none"}).amp_dtype is None


@pytest.mark.parametrize("skip", [False, True])
def test_skip_metrics_calculation(run: New, new_sae: New, batches: New, skip: bool) -> None:
    row = run(new_sae("topk"), batches(1), steps=1, skip_metrics_calculation=skip).log.rows[1]
    kinds = {name.partition("/")[0] for name in row}
    assert kinds == ({"losses", "details"} if skip else {"losses", "details", "metrics", "sparsity"})
    assert {"losses/overall_loss", "details/current_learning_rate", "details/tokens_per_second"} <= set(row)


@pytest.mark.parametrize(("window", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (1000, [])])
def test_feature_sampling_window(run: New, new_sae: New, batches: New, window: int, expected: list[int]) -> None:
    log = run(new_sae("topk"), batches(6), feature_sampling_window=window).log
    assert list(log.series("sparsity/above_1e-1")) == list(log.series("sparsity/below_1e-7")) == expected


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frequency", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (1000, [5])])
@pytest.mark.parametrize("field", ["log_frequency", "eval_frequency"])
def test_frequencies(run: New, new_sae: New, batches: New, field: str, frequency: int, expected: list[int]) -> None:
    seen: list[bool] = []

    def evaluate(sae: Any) -> dict[str, float] | None:
        seen.append(sae.training)
        return {"eval/x": 7.0} if len(seen) > 1 or len(expected) == 1 else None  # None: nothing to log

    log = run(new_sae("topk"), batches(5), steps=5, eval_fn=evaluate, **{"eval_frequency": 1000, field: frequency}).log
    if field == "log_frequency":
        assert list(log.series("losses/overall_loss")) == expected
    else:
        assert len(seen) == len(expected) and not any(seen)
        assert list(log.series("eval/x")) == expected[-len(expected) + 1 or None :]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"n_checkpoints": 0}, []),
        ({"n_checkpoints": 1}, [8]),
        ({"n_checkpoints": 3}, [2, 4, 8]),  # 8^(1/3), 8^(2/3)
        ({"n_checkpoints": 4, "check_point_save_mode": "linear"}, [2, 4, 6, 8]),
        ({"save_every_minutes": 1e-9}, list(range(1, 9))),
        ({"save_every_minutes": 1e-9, "keep_last": 2}, [7, 8]),
        # scheduled ones are kept besides
        ({"n_checkpoints": 3, "save_every_minutes": 1e-9, "keep_last": 2}, [2, 4, 7, 8]),
        ({"save_every_minutes": 60.0}, []),
    ],
)
def test_which_checkpoints_are_saved_and_kept(
    run: New, new_sae: New, batches: New, settings: dict[str, Any], expected: list[int]
) -> None:
    fitted = run(new_sae("topk"), batches(8), steps=8, **settings)
    assert fitted.saved == expected


def test_save_every_minutes_counts_minutes_since_the_last_save(
    run: New, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100_000, 10))  # every look at the clock is 10 s after the last
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    # restart (0), then one look a step: 10, 20, 30 > 24 s -> saved at step 3, restart at 40; 50, 60, 70 -> step 6
    assert run(new_sae("topk"), batches(8), steps=8, save_every_minutes=0.4, log_frequency=100).saved[:2] == [3, 6]


def test_total_training_tokens_counts_masked_tokens_and_cur_tokens_does_not(
    run: New, new_sae: New, batches: New
) -> None:
    stream = batches(9, masked=True)
    fitted = run(new_sae("topk"), stream, total_training_tokens=6 * 16 + 15)
    assert fitted.trainer.total_training_steps == fitted.trainer.cur_step == 6
    valid = sum(int(batch["mask"].sum()) for batch in stream[:6])
    assert fitted.trainer.cur_tokens == fitted.log.rows[6]["details/n_training_tokens"] == valid < 96


def test_total_training_tokens_are_divided_by_accumulation_too(run: New, new_sae: New, batches: New) -> None:
    fitted = run(new_sae("topk"), batches(9), total_training_tokens=6 * 16 + 15, gradient_accumulation_steps=2)
    assert fitted.trainer.cur_step == 3


# --- where, faults ---------------------------------------------------------------------------------------------------


def test_exp_result_path_and_from_pretrained_path(run: New, new_sae: New, batches: New, tmp_path: Path) -> None:
    stream = batches(6)
    run(new_sae("topk"), stream[:3], name="first", n_checkpoints=1)
    assert (tmp_path / "first" / "sae_weights.safetensors").exists() and (tmp_path / "first" / "config.json").exists()
    second = run(
        new_sae("topk", seed=5),
        stream[3:],
        name="second",
        from_pretrained_path=str(tmp_path / "first"),
        n_checkpoints=1,
    )
    assert second.log.calls[0] == ("start", 3) and list(second.log.rows) == [4, 5, 6] and second.saved == [6]


def poisoned(make: New, at: int, n: int = 6) -> list[dict[str, Any]]:
    """Finite activations whose squared error is not finite at step `at`."""
    stream = make(n)
    stream[at - 1][HOOK] = stream[at - 1][HOOK] * 1e25
    return stream


def test_on_non_finite_stops_the_run_and_says_where(run: New, new_sae: New, batches: New) -> None:
    with pytest.raises(TrainingError, match=rf"^step 3: loss.* not finite; {HOOK} has mean .*, largest .*skip"):
        run(new_sae("relu"), poisoned(batches, 3))


def test_on_non_finite_skips_the_step_and_counts_it(run: New, new_sae: New, batches: New) -> None:
    stream = poisoned(batches, 3)
    fitted = run(new_sae("relu"), stream, on_non_finite="skip", n_checkpoints=1)
    assert fitted.trainer.skipped_steps == 1 and fitted.trainer.cur_step == 6
    assert list(fitted.log.series("details/skipped_steps").values()) == [1.0] * 4
    assert all(math.isfinite(value) for value in fitted.log.rows[6].values())
    without = run(new_sae("relu"), stream[:2] + stream[3:], name="without", steps=5)
    assert all(torch.equal(a, b) for a, b in zip(fitted.sae.parameters(), without.sae.parameters(), strict=True))
    assert fitted.trainer.cur_tokens == 6 * 16


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip_metrics", [False, True])
def test_a_gradient_that_is_not_finite_spoils_no_weight(
    run: New, new_sae: New, batches: New, act_fn: str, skip_metrics: bool
) -> None:
    sae = new_sae(act_fn)
    poison = sae.W_E if act_fn == "relu" else sae.activation_function.log_threshold
    poison.register_hook(lambda gradient: gradient * math.nan)
    before = [p.detach().clone() for p in sae.parameters()]
    fitted = run(sae, batches(2), steps=2, on_non_finite="skip", skip_metrics_calculation=skip_metrics)
    assert fitted.trainer.skipped_steps == 2
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))


# --- nothing is decoration -------------------------------------------------------------------------------------------


TESTED_BY = {
    "test_sparsity_loss": "l1_coefficient sparsity_loss_type tanh_stretch_coefficient frequency_scale p",
    "test_l1_coefficient_warmup_steps": "l1_coefficient_warmup_steps",
    "test_lp_coefficient": "lp_coefficient",
    "test_auxk_coefficient_and_k_aux": "auxk_coefficient k_aux",
    "test_dead_threshold": "dead_threshold",
    "test_k_schedule": "initial_k k_warmup_steps k_cold_booting_steps k_schedule_type k_exponential_factor",
    "test_amp_dtype": "amp_dtype",
    "test_skip_metrics_calculation": "skip_metrics_calculation",
    "test_feature_sampling_window": "feature_sampling_window",
    "test_frequencies": "log_frequency eval_frequency",
    "test_which_checkpoints_are_saved_and_kept": "n_checkpoints check_point_save_mode save_every_minutes keep_last",
    "test_total_training_tokens_counts_masked_tokens_and_cur_tokens_does_not": "total_training_tokens",
    "test_exp_result_path_and_from_pretrained_path": "exp_result_path from_pretrained_path",
    "test_on_non_finite_skips_the_step_and_counts_it": "on_non_finite",
    "test_micro_batches_are_one_batch": "gradient_accumulation_steps",
    "test_learning_rates_by_parameter_and_group": "lr jumprelu_lr_factor",
    "test_optimizer_against_a_plain_one": "optimizer_class betas",
    "test_optimizer_foreach": "optimizer_foreach",
    "test_learning_rate_schedule": "lr_scheduler_name lr_end_ratio lr_warm_up_steps lr_cool_down_steps",
    "test_clip_grad_norm": "clip_grad_norm",
}
"""The test here, or in test_optim.py, that fails if the fields are ignored (each was seen to, with the field reset)."""


def test_every_field_is_tested() -> None:
    here = Path(__file__)
    defined = {
        node.name
        for file in (here, here.with_name("test_optim.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(TESTED_BY) <= defined
    assert {field for fields in TESTED_BY.values() for field in fields.split()} == set(TrainerConfig.model_fields)
