"""What a run works with: dictionary, plan, optimizer, measurements, faults; once the first batch is known."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from lm_saes import machine
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.training.board import Board
from lm_saes.training.config import TrainerConfig
from lm_saes.training.faults import Ledger
from lm_saes.training.optim import build_optimizer
from lm_saes.training.optimizers import FusedAdam
from lm_saes.training.plan import Plan, check_settings, make_plan


@dataclass(frozen=True)
class Run:
    """A dictionary in training: its schedules, its optimizer and its measurements."""

    dictionary: AbstractSparseAutoEncoder
    plan: Plan
    optimizer: Optimizer
    board: Board
    ledger: Ledger

    @classmethod
    def begin(cls, cfg: TrainerConfig, dictionary: AbstractSparseAutoEncoder, batch_tokens: int) -> Run:
        """A run at step 0 whose first global batch holds `batch_tokens` tokens.

        Raises:
            ConfigError: settings that do not fit the dictionary, or not one step's worth of tokens.
        """
        check_settings(cfg, dictionary)
        board = Board(
            dictionary,
            measuring=not cfg.skip_metrics_calculation,
            tracking=not cfg.skip_metrics_calculation or bool(cfg.auxk_coefficient),
            window=cfg.feature_sampling_window,
            dead_threshold=cfg.dead_threshold,
        )
        plan, optimizer = make_plan(cfg, batch_tokens), build_optimizer(cfg, dictionary)
        defers = machine.waits_cost(dictionary.cfg.device) and isinstance(optimizer, FusedAdam)
        return cls(dictionary, plan, optimizer, board, Ledger(stops=cfg.on_non_finite == "stop", defers=defers))

    def set_schedules(self, t: int) -> None:
        """Put k and the learning rates to what they are after `t` updates."""
        if self.dictionary.current_k is not None:
            self.dictionary.set_current_k(self.plan.k(t, self.dictionary.cfg.top_k))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.plan.learning_rate_factor(t)

    def details(self, t: int, tokens: int) -> dict[str, float]:
        """`details/*` of the step after `t` updates, `tokens` valid tokens seen by its end."""
        settings = self.plan.loss_settings(t)
        rate = max(group["base_lr"] for group in self.optimizer.param_groups)
        return {
            "details/current_learning_rate": rate * self.plan.learning_rate_factor(t),
            "details/n_training_tokens": float(tokens),
            "details/l1_coefficient": settings.l1_coefficient if settings.sparsity_loss else 0.0,
            "details/lp_coefficient": settings.lp_coefficient,
            "details/auxk_coefficient": settings.auxk_coefficient,
        }
