"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from lm_saes.choices import Choice, OpenConfig, one_of
from lm_saes.config import DType
from lm_saes.losses.sparsity import PowerSettings, SparsityLoss, TanhQuadSettings, find_loss
from lm_saes.training.optimizers import AdamSettings, OptimizerChoice
from lm_saes.training.schedules import CoolDownSettings, EndSettings, RateSchedule, Steps, WarmUpSettings


class TrainerConfig(
    PowerSettings, TanhQuadSettings, AdamSettings, CoolDownSettings, WarmUpSettings, EndSettings, OpenConfig
):
    """How to train. Step counts given as a float in [0, 1] are fractions of all steps; as an int, steps."""

    choices: ClassVar[Mapping[str, type[Choice]]] = {
        "sparsity_loss_type": SparsityLoss,
        "optimizer_class": OptimizerChoice,
        "lr_scheduler_name": RateSchedule,
    }

    l1_coefficient: float | None = Field(default=8e-5, ge=0)
    """Weight of the sparsity loss (None: constant 1, without warm-up)."""
    l1_coefficient_warmup_steps: Steps = 0.1
    """Steps over which that weight rises linearly from 0 (0: at once)."""
    lp_coefficient: float | None = Field(default=None, ge=0)
    """Weight of the penalty on pre-activations below their JumpReLU threshold."""
    auxk_coefficient: float | None = Field(default=None, ge=0)
    """Weight of the auxiliary loss that revives dead latents (None or 0: off)."""
    amp_dtype: DType | None = torch.bfloat16
    """Type of mixed precision (None, in files `"none"`: none). Weights, thresholds, selection and losses stay in full
    precision."""
    sparsity_loss_type: str | None = None
    """Sparsity loss: `power`, `tanh`, `tanh-quad`, or none."""
    initial_k: int | float | None = Field(default=None, gt=0)
    """k that a top-k run starts with (None: no schedule)."""
    k_warmup_steps: Steps = 0.1
    """Steps over which k goes from `initial_k` to the dictionary's `top_k`."""
    k_cold_booting_steps: Steps = 0
    """Steps at `initial_k` before that."""
    k_schedule_type: Literal["linear", "exponential"] = "linear"
    """Shape of the way from `initial_k` to `top_k`."""
    k_exponential_factor: float = Field(default=3.0, gt=0)
    """Steepness of the exponential way."""
    k_aux: int = Field(default=512, gt=0)
    """Dead latents per token that the auxiliary loss uses."""
    dead_threshold: float = Field(default=1e7, gt=0)
    """Valid tokens without an activation after which a latent is dead."""
    skip_metrics_calculation: bool = False
    """Log only the loss and the rate."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Batches per optimizer step."""
    lr: float | dict[str, float] = 4e-4
    """Learning rate; or rates by parameter or group name (`others`, `jumprelu`), with `default` for the rest."""
    optimizer_class: str = "adam"
    """`adam`, or `sparseadam`: weights and moments change only where the gradient is not zero."""
    lr_scheduler_name: str = "constantwithwarmup"
    """Schedule of the learning rate."""
    jumprelu_lr_factor: float = Field(default=1.0, ge=0)
    """Learning rate of JumpReLU thresholds over that of the other parameters."""
    clip_grad_norm: float = Field(default=0.0, ge=0)
    """Largest global 2-norm of the gradient, JumpReLU thresholds left out (0: no clipping)."""
    feature_sampling_window: int = Field(default=1000, gt=0)
    """Steps over which firing frequencies are collected before they are reported."""
    total_training_tokens: int = Field(default=300_000_000, gt=0)
    """Tokens to train on."""
    log_frequency: int = Field(default=1000, gt=0)
    """Steps between reports."""
    eval_frequency: int = Field(default=1000, gt=0)
    """Steps between evaluations."""
    n_checkpoints: int = Field(default=10, ge=0)
    """Checkpoints to save, the final one among them (0: none)."""
    check_point_save_mode: Literal["log", "linear"] = "log"
    """Spacing of the checkpoints."""
    from_pretrained_path: str | None = None
    """Checkpoint to resume from: a step's directory, or a run's directory for its newest."""
    exp_result_path: str = Field(default="results", min_length=1)
    """Directory that the run writes to."""
    save_every_minutes: float | None = Field(default=None, gt=0)
    """Besides the scheduled checkpoints, save this often (None: do not)."""
    keep_last: int | None = Field(default=None, gt=0)
    """Unscheduled checkpoints to keep, the newest ones (None: all)."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite: stop the run, or skip the step and count it."""

    @field_validator("amp_dtype", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        if value in ("float16", "fp16", "half", "torch.float16", torch.float16):
            raise ValueError("amp_dtype=float16 would need its gradients scaled; use bfloat16, or none")
        return None if value == "none" else value  # TOML has no null

    @field_validator("total_training_tokens", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("sparsity_loss_type")
    @classmethod
    def _known_loss(cls, value: str | None) -> str | None:
        return None if value is None else find_loss(value).name

    @field_validator("optimizer_class", "lr_scheduler_name")
    @classmethod
    def _known_name(cls, value: str, info: ValidationInfo) -> str:
        return one_of(value, cls.choices[str(info.field_name)].registry)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> TrainerConfig:
        for name in ("l1_coefficient_warmup_steps", "k_warmup_steps", "k_cold_booting_steps",
                     "lr_warm_up_steps", "lr_cool_down_steps"):  # fmt: skip
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{name}={value}: give a fraction of all steps in [0, 1], or a whole number of steps")
        if isinstance(self.lr, dict) and any(rate < 0 for rate in self.lr.values()):
            raise ValueError(f"lr={self.lr}: rates must not be negative")
        if not isinstance(self.lr, dict) and self.lr < 0:
            raise ValueError(f"lr={self.lr}: must not be negative")
        for fields, reason in self._without_effect():
            self.refuse_without_effect(fields, reason, info)
        return self

    def _without_effect(self) -> Iterator[tuple[list[str], str]]:
        """The fields of its own that nothing reads, given the others, and why."""
        measuring = not self.skip_metrics_calculation
        if not self.auxk_coefficient:
            yield ["k_aux"], "auxk_coefficient is off"
            if not measuring:
                yield ["dead_threshold"], "neither metrics nor auxk_coefficient need dead latents"
        if self.initial_k is None:
            fields = ["k_warmup_steps", "k_cold_booting_steps", "k_schedule_type", "k_exponential_factor"]
            yield fields, "initial_k is not set"
        elif self.k_schedule_type != "exponential":
            yield ["k_exponential_factor"], "only k_schedule_type='exponential' reads it"
        if self.sparsity_loss_type is None:
            yield ["l1_coefficient", "l1_coefficient_warmup_steps"], "sparsity_loss_type is not set"
        elif self.l1_coefficient is None:
            yield ["l1_coefficient_warmup_steps"], "l1_coefficient=None is constant"
        if not measuring:
            yield ["feature_sampling_window"], "skip_metrics_calculation is set"
        if self.n_checkpoints < 2:
            yield ["check_point_save_mode"], f"n_checkpoints={self.n_checkpoints} saves none before the end"
