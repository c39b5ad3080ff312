"""Every formula of the specification's section 7, at points worked by hand."""

import math

import pytest

from lm_saes.errors import ConfigError
from lm_saes.training.config import TrainerConfig
from lm_saes.training.plan import Plan, make_plan
from lm_saes.training.schedules import RateSchedule, active_k, as_steps, checkpoint_steps, coefficient

T, W, C, R = 20, 4, 5, 0.2

RATES = [
    # constantwithwarmup: min(1, (t+1)/4, 0.2 + 0.8 (20-t)/5)
    ("constantwithwarmup", W, C, {0: 0.25, 2: 0.75, 3: 1.0, 10: 1.0, 15: 1.0, 16: 0.84, 19: 0.36, 20: 0.2}),
    ("constantwithwarmup", 0, C, {0: 1.0, 14: 1.0, 19: 0.36}),
    ("constantwithwarmup", W, 0, {0: 0.25, 3: 1.0, 19: 1.0}),
    ("constantwithwarmup", 0, 0, {0: 1.0, 19: 1.0}),
    # where rise and fall cross, the smaller: t=10 of w=20, c=20: min(11/20, 0.2 + 0.8/2)
    ("constantwithwarmup", 20, 20, {0: 0.05, 10: 0.55, 12: 0.52}),
    ("constant", 0, 0, {0: 1.0, 19: 1.0}),
    # linearwarmupdecay: (t+1)/4, then 0.2 + 0.8 (20-t)/16
    ("linearwarmupdecay", W, 0, {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.6, 19: 0.25, 20: 0.2}),
    ("linearwarmupdecay", 0, 0, {0: 1.0, 10: 0.6, 20: 0.2}),
    # cosineannealing: 0.2 + 0.8 (1 + cos(pi t/20))/2
    ("cosineannealing", 0, 0, {0: 1.0, 5: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 10: 0.6, 20: 0.2}),
    # with warm-up: the cosine of (t-4)/16
    ("cosineannealingwarmup", W, 0, {0: 0.25, 2: 0.75, 4: 1.0, 8: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 12: 0.6, 20: 0.2}),
    ("cosineannealingwarmup", 0, 0, {0: 1.0, 10: 0.6, 20: 0.2}),
    # exponentialwarmup: 0.2^((t-4)/16)
    ("exponentialwarmup", W, 0, {0: 0.25, 3: 1.0, 4: 1.0, 12: math.sqrt(0.2), 20: 0.2}),
    ("exponentialwarmup", 0, 0, {0: 1.0, 10: math.sqrt(0.2), 20: 0.2}),
]


def learning_rate_factor(name: str, t: int, total: int, warm_up: int, cool_down: int, end_ratio: float) -> float:
    kind = RateSchedule.find(name)
    settings = {"lr_warm_up_steps": warm_up, "lr_cool_down_steps": cool_down, "lr_end_ratio": end_ratio}
    return kind(**{name: value for name, value in settings.items() if name in kind.model_fields}).factor(t, total)


@pytest.mark.parametrize(("name", "warm_up", "cool_down", "expected"), RATES)
def test_learning_rate(name: str, warm_up: int, cool_down: int, expected: dict[int, float]) -> None:
    factors = {t: learning_rate_factor(name, t, T, warm_up, cool_down, R) for t in expected}
    assert factors == pytest.approx(expected, rel=1e-12)


def test_every_schedule_of_the_config_is_known_and_another_is_not() -> None:
    names = {name for name, *_ in RATES}
    assert names == set(RateSchedule.registry)
    with pytest.raises(ConfigError, match="'linear'"):
        learning_rate_factor("linear", 0, T, 0, 0, R)


@pytest.mark.parametrize("name", ["linearwarmupdecay", "cosineannealingwarmup", "exponentialwarmup"])
def test_a_warm_up_as_long_as_the_run_divides_by_nothing(name: str) -> None:
    assert [learning_rate_factor(name, t, 4, 4, 0, R) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0, 0), (7, 7), (1, 1), (5000, 5000), (0.0, 0), (0.1, 20), (1.0, 200), (0.2, 40), (0.125, 25)],
)
def test_a_float_is_a_fraction_and_an_int_is_steps(value: float, steps: int) -> None:
    assert as_steps(value, 200) == steps


@pytest.mark.parametrize(
    ("target", "warm_up", "expected"),
    [
        (8e-5, 4, {0: 0.0, 1: 2e-5, 3: 6e-5, 4: 8e-5, 100: 8e-5}),
        (8e-5, 0, {0: 8e-5, 9: 8e-5}),
        (None, 0, {0: 1.0, 9: 1.0}),
        (None, 4, {0: 1.0, 1: 1.0}),
        (0.0, 4, {0: 0.0, 9: 0.0}),
    ],
)
def test_sparsity_coefficient(target: float | None, warm_up: int, expected: dict[int, float]) -> None:
    assert {t: coefficient(target, t, warm_up) for t in expected} == pytest.approx(expected, rel=1e-12)


def exponential(u: float, a: float) -> int:
    return math.ceil(20 - 16 * (1 - math.exp(-a * u)) / (1 - math.exp(-a)))


@pytest.mark.parametrize(
    ("kind", "cold", "warm_up", "factor", "expected"),
    [
        # k from 20 to 4: 20 - 16 u, rounded up
        ("linear", 0, 8, 3.0, {0: 20, 1: 18, 4: 12, 7: 6, 8: 4, 100: 4}),
        ("linear", 3, 8, 3.0, {0: 20, 2: 20, 3: 20, 4: 18, 11: 4}),
        ("linear", 0, 3, 3.0, {1: 15, 2: 10, 3: 4}),  # 14.67, 9.33
        ("linear", 0, 0, 3.0, {0: 4, 5: 4}),
        ("linear", 2, 0, 3.0, {0: 20, 1: 20, 2: 4}),
        # 20 - 16 (1 - e^(-3u))/0.95021: u = 1/4: 20 - 16 * 0.55528 = 11.12; 1/2: 6.92; 3/4: 4.94
        ("exponential", 0, 4, 3.0, {0: 20, 1: 12, 2: 7, 3: 5, 4: 4, 9: 4}),
        ("exponential", 1, 4, 3.0, {0: 20, 1: 20, 2: 12, 5: 4}),
        ("exponential", 0, 4, 0.5, {t: exponential(t / 4, 0.5) for t in range(4)}),
        ("exponential", 0, 0, 3.0, {0: 4}),
    ],
)
def test_k(kind: str, cold: int, warm_up: int, factor: float, expected: dict[int, int]) -> None:
    assert {t: active_k(t, 4, 20, cold, warm_up, kind, factor) for t in expected} == expected


def test_k_without_a_schedule_and_at_its_ends() -> None:
    assert active_k(0, 4, None, 5, 5) == 4
    assert [active_k(t, 4, 4, 0, 10) for t in range(12)] == [4] * 12
    assert [active_k(t, 4, 2, 3, 10) for t in range(20)] == [4] * 20  # never under top_k
    assert active_k(0, 4, 6.5, 1, 2) == 7  # a fraction is rounded up during the cold start too
    values = [active_k(t, 7, 50, 2, 13, "exponential", 5.0) for t in range(40)]
    assert values == sorted(values, reverse=True) and min(values) == 7


@pytest.mark.parametrize(
    ("n", "total", "mode", "expected"),
    [
        # ceil(1000^(i/4)): 5.62, 31.6, 177.8
        (4, 1000, "log", [6, 32, 178]),
        (3, 1000, "log", [10, 100]),  # exact powers are not rounded up further,
        (5, 243, "log", [3, 9, 27, 81]),  # though 243.0 ** (2 / 5) is 9.000000000000002
        (4, 1000, "linear", [250, 500, 750]),
        (3, 10, "linear", [3, 6]),
        (10, 4, "log", [2, 3]),  # 1.15, 1.32, 1.52, 1.74, 2, 2.3, ...; the last is saved at the end anyway
        (10, 4, "linear", [1, 2, 3]),  # 0, 0, 1, 1, 2, 2, 2, 3, 3: twice the same is once, and nothing is done at 0
        (1, 1000, "log", []),
        (0, 1000, "linear", []),
        (5, 1, "log", []),
    ],
)
def test_checkpoint_steps(n: int, total: int, mode: str, expected: list[int]) -> None:
    assert checkpoint_steps(n, total, mode) == expected


def test_a_plan_turns_fractions_into_steps_of_the_whole_run() -> None:
    cfg = TrainerConfig(
        total_training_tokens=20 * 16 + 15,
        lr_warm_up_steps=0.2,
        lr_cool_down_steps=0.25,
        lr_end_ratio=R,
        sparsity_loss_type="power",
        l1_coefficient=8e-5,
        l1_coefficient_warmup_steps=0.5,
        initial_k=20,
        k_warmup_steps=0.4,
        k_cold_booting_steps=0.15,
        n_checkpoints=4,
        check_point_save_mode="linear",
    )
    plan = make_plan(cfg, 16)
    assert plan.total == 20
    assert plan.learning_rate_factor(0) == pytest.approx(0.25)  # (0+1)/4
    assert plan.learning_rate_factor(16) == pytest.approx(0.84)  # 0.2 + 0.8 * 4/5
    assert plan.loss_settings(5).l1_coefficient == pytest.approx(4e-5)  # 5/10
    assert [plan.k(t, 4) for t in (2, 3, 4, 11)] == [20, 20, 18, 4]  # cold 3, then 8 steps
    assert plan.checkpoints == {5, 10, 15}


def test_steps_are_tokens_over_batch_and_accumulation() -> None:
    cfg = TrainerConfig(total_training_tokens=1000, gradient_accumulation_steps=3)
    assert make_plan(cfg, 16) == Plan(cfg, 16, 1000 // 48)
    with pytest.raises(ConfigError, match=r"total_training_tokens=1000.*1023.*raise it"):
        make_plan(cfg, 341)


def test_a_warm_up_that_never_ends_is_told(caplog: pytest.LogCaptureFixture) -> None:
    make_plan(TrainerConfig(total_training_tokens=100), 10)
    assert "lr_warm_up_steps=5000" in caplog.text
