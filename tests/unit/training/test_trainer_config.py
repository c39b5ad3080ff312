"""Settings of a training run that cannot work are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lm_saes import TrainerConfig
from lm_saes.config import build
from lm_saes.errors import ConfigError

New = Callable[..., Any]


@pytest.mark.parametrize(
    "settings",
    [
        {"k_aux": 5},
        {"k_warmup_steps": 5},
        {"initial_k": 5, "k_exponential_factor": 5.0},
        {"l1_coefficient": 1.0},
        {"sparsity_loss_type": "power", "l1_coefficient": None, "l1_coefficient_warmup_steps": 3},
        {"sparsity_loss_type": "power", "tanh_stretch_coefficient": 1.0},
        {"sparsity_loss_type": "tanh", "frequency_scale": 1.0},
        {"sparsity_loss_type": "tanh", "p": 2.0},
        {"lr_scheduler_name": "constant", "lr_end_ratio": 0.5},
        {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 5},
        {"lr_scheduler_name": "exponentialwarmup", "lr_cool_down_steps": 5},
        {"optimizer_class": "sparseadam", "optimizer_foreach": False},
        {"skip_metrics_calculation": True, "feature_sampling_window": 5},
        {"skip_metrics_calculation": True, "dead_threshold": 5},
        {"n_checkpoints": 1, "check_point_save_mode": "linear"},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any]) -> None:
    *_, name = settings
    with pytest.raises(ValueError, match=f"{name}=.* has no effect: .*; remove it"):
        TrainerConfig(**settings)


@pytest.mark.parametrize(
    ("act_fn", "settings"),
    [
        ("topk", {"lp_coefficient": 1.0}),
        ("topk", {"jumprelu_lr_factor": 2.0}),
        ("relu", {"initial_k": 8}),
        ("topk", {"initial_k": 3}),
        ("topk", {"initial_k": 33}),
        ("topk", {"total_training_tokens": 15}),
        ("topk", {"lr": {"W_E": 1.0}}),
        ("topk", {"lr": {"default": 1.0, "W_Q": 1.0}}),
        ("topk", {"lr": {"default": 1.0, "jumprelu": 1.0}}),
    ],
)
def test_settings_that_do_not_fit_the_dictionary_are_refused_at_the_start(
    run: New, new_sae: New, batches: New, act_fn: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))) as caught:
        run(new_sae(act_fn), batches(1), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({name: bad}, rf"{name}={bad}: give a fraction of all steps in \[0, 1\], or a whole number of steps")
          for name in ("lr_warm_up_steps", "lr_cool_down_steps") for bad in (-1, 1.5, -0.1)],
        ({"lr": -1.0}, "lr=-1.0: must not be negative"),
        ({"lr": {"default": -1.0}}, "lr=.*: rates must not be negative"),
        ({"sparsity_loss_type": "l7"}, "sparsity_loss_type='l7': not a sparsity loss; use one of power"),
        ({"total_training_tokens": 0.5}, "total_training_tokens: "),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be greater than 0"),
        ({"lr_end_ratio": 2.0}, "lr_end_ratio: must be less than or equal to 1"),
        ({"optimizer_class": "sgd"}, "optimizer_class: must be 'adam' or 'sparseadam'"),
        ({"amp_dtype": "fp16"}, "amp_dtype: amp_dtype=float16 would need its gradients scaled; use bfloat16, or none"),
        ({"amp_dtype": "int8"}, "amp_dtype: 'int8' is not a floating-point dtype"),
        ({"clip_grad_nrom": 1.0}, "unknown key 'clip_grad_nrom' in TrainerConfig; did you mean 'clip_grad_norm'"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(TrainerConfig, settings)
    assert "\n" not in str(caught.value)


def test_a_number_of_tokens_may_be_written_as_a_float() -> None:
    assert TrainerConfig.model_validate({"total_training_tokens": 3e8}).total_training_tokens == 300_000_000


def test_settings_survive_json() -> None:
    cfg = TrainerConfig(
        lr={"default": 1e-3}, amp_dtype=None, lr_warm_up_steps=1.0, lr_cool_down_steps=1, betas=(0.5, 0.9)
    )
    again = TrainerConfig.model_validate_json(cfg.model_dump_json())
    assert again == cfg and isinstance(again.lr_warm_up_steps, float) and isinstance(again.lr_cool_down_steps, int)
