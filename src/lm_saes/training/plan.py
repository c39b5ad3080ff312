"""A run's plan: what every schedule says at a step, and whether the settings fit the dictionary."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import ConfigError
from lm_saes.losses.settings import LossSettings
from lm_saes.losses.sparsity import SparsityLoss
from lm_saes.training.config import TrainerConfig
from lm_saes.training.schedules import RateSchedule, active_k, as_steps, checkpoint_steps, coefficient

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The schedules of a run; every method is a pure function of `t`, the updates completed before the step."""

    cfg: TrainerConfig
    batch_tokens: int
    """Tokens in the first global batch, masked ones included."""
    total: int
    """Steps of the whole run."""

    def _steps(self, setting: int | float) -> int:
        return as_steps(setting, self.total)

    @cached_property
    def _rate(self) -> RateSchedule:
        return cast(RateSchedule, self.cfg.chosen("lr_scheduler_name"))

    @cached_property
    def _sparsity_loss(self) -> SparsityLoss | None:
        return cast(SparsityLoss | None, self.cfg.chosen("sparsity_loss_type"))

    def learning_rate_factor(self, t: int) -> float:
        """What the learning rate is multiplied by."""
        return self._rate.factor(t, self.total)

    def k(self, t: int, top_k: int) -> int:
        """The k of the top-k family."""
        cfg = self.cfg
        cold, warm_up = self._steps(cfg.k_cold_booting_steps), self._steps(cfg.k_warmup_steps)
        return active_k(t, top_k, cfg.initial_k, cold, warm_up, cfg.k_schedule_type, cfg.k_exponential_factor)

    def loss_settings(self, t: int) -> LossSettings:
        """Weights and shapes of the loss terms."""
        cfg = self.cfg
        return LossSettings(
            sparsity_loss=self._sparsity_loss,
            l1_coefficient=coefficient(cfg.l1_coefficient, t, self._steps(cfg.l1_coefficient_warmup_steps)),
            lp_coefficient=cfg.lp_coefficient or 0.0,
            auxk_coefficient=cfg.auxk_coefficient or 0.0,
            k_aux=cfg.k_aux,
        )

    @cached_property
    def checkpoints(self) -> frozenset[int]:
        """The steps that a checkpoint is scheduled for, besides the last."""
        return frozenset(checkpoint_steps(self.cfg.n_checkpoints, self.total, self.cfg.check_point_save_mode))


def make_plan(cfg: TrainerConfig, batch_tokens: int) -> Plan:
    """The plan of a run whose first global batch holds `batch_tokens` tokens.

    Raises:
        ConfigError: there are not enough tokens for one step.
    """
    tokens_per_step = batch_tokens * cfg.gradient_accumulation_steps
    total = cfg.total_training_tokens // tokens_per_step
    if total < 1:
        raise ConfigError(
            f"total_training_tokens={cfg.total_training_tokens}: less than the {tokens_per_step} of one step; raise it"
        )
    rises = "lr_warm_up_steps" in RateSchedule.find(cfg.lr_scheduler_name).model_fields
    if rises and as_steps(cfg.lr_warm_up_steps, total) >= total:
        log.warning(
            "lr_warm_up_steps=%s: the run has %d steps and never reaches the full rate", cfg.lr_warm_up_steps, total
        )
    return Plan(cfg, batch_tokens, total)


def check_settings(cfg: TrainerConfig, dictionary: AbstractSparseAutoEncoder) -> None:
    """Refuse a combination of settings that makes no sense for this dictionary.

    Raises:
        ConfigError: with the reason.
    """
    act_fn, thresholds = dictionary.cfg.act_fn, dictionary.activation_function.log_threshold is not None
    if cfg.lp_coefficient and not thresholds:
        raise ConfigError(
            f"lp_coefficient={cfg.lp_coefficient}: needs learnt thresholds (act_fn='jumprelu'), not act_fn={act_fn!r}"
        )
    if cfg.jumprelu_lr_factor != 1 and not thresholds:
        raise ConfigError(
            f"jumprelu_lr_factor={cfg.jumprelu_lr_factor}: act_fn={act_fn!r} has no thresholds; remove it"
        )
    if cfg.initial_k is not None:
        top_k, most = dictionary.cfg.top_k, dictionary.cfg.largest_k
        if dictionary.current_k is None:
            raise ConfigError(f"initial_k={cfg.initial_k}: act_fn={act_fn!r} has no k; remove it")
        if not top_k <= cfg.initial_k <= most:
            raise ConfigError(
                f"initial_k={cfg.initial_k}: must lie between top_k={top_k} and the {most} latents available"
            )
