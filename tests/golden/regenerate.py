"""Fifty steps of training on the CPU, one loss a line. Run by hand to accept new numbers, and say so in CHANGELOG.md:

python tests/golden/regenerate.py
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lm_saes import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig
from lm_saes.data.batch import Batch

HOOK = "blocks.0.hook_resid_post"
D, TOKENS, STEPS = 16, 64, 50
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": (
        {"act_fn": "topk", "top_k": 6},
        {"auxk_coefficient": 1 / 32, "k_aux": 8, "dead_threshold": 500, "initial_k": 20, "k_warmup_steps": 0.5},
    ),
    "batchtopk": ({"act_fn": "batchtopk", "top_k": 6}, {"clip_grad_norm": 1.0}),
    "jumprelu": (
        {"act_fn": "jumprelu", "jumprelu_threshold_window": 1.0},
        {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.02, "lp_coefficient": 1e-3, "jumprelu_lr_factor": 2.0},
    ),
    "relu": ({"act_fn": "relu"}, {"sparsity_loss_type": "power", "l1_coefficient": 0.1}),
}


class Losses:
    """A logger that keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def start(self, total_steps: int, step: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.values.append(metrics["losses/overall_loss"])

    def close(self, summary: Mapping[str, float]) -> None: ...


def waves(rows: int, columns: int, shift: float) -> torch.Tensor:
    """Numbers without a random generator, whose stream may change with the version of torch."""
    place = torch.arange(rows * columns, dtype=torch.float64) + 1
    return torch.sin(place * place * math.sqrt(2) + shift).view(rows, columns).float()


def batches() -> list[Batch]:
    """Sums of a few of 24 directions about a mean, some tokens masked."""
    directions = waves(24, D, 0.5)
    made: list[Batch] = []
    for i in range(STEPS):
        strength = torch.relu(waves(TOKENS, 24, 1.0 + i) - 0.6)
        made.append({HOOK: 0.3 + 4 * strength @ directions, "tokens": torch.arange(TOKENS),
                     "mask": torch.arange(TOKENS) % 7 != i % 7})  # fmt: skip
    return made


def losses(kind: str) -> list[float]:
    """The loss of each step of a short run of one kind."""
    settings, trainer = KINDS[kind]
    cfg = SAEConfig(hook_point_in=HOOK, hook_point_out=HOOK, d_model=D, expansion_factor=8, **settings)
    stream, log = batches(), Losses()
    start = InitializerConfig(init_log_jumprelu_threshold_value=-1.0 if kind == "jumprelu" else None)
    sae = Initializer(start).initialize_sae_from_config(cfg, stream)
    with torch.no_grad():
        sae.get_parameter("W_D").copy_(waves(8 * D, D, 2.0) / 4)
        sae.get_parameter("W_E").copy_(sae.get_parameter("W_D").T)
    with tempfile.TemporaryDirectory() as directory:
        run = TrainerConfig(total_training_tokens=STEPS * TOKENS, lr=4e-3, lr_warm_up_steps=5, log_frequency=1,
                            amp_dtype=None, n_checkpoints=0, exp_result_path=directory, **trainer)  # fmt: skip
        Trainer(run).fit(sae, stream, loggers=log)
    return log.values


def path_of(kind: str) -> Path:
    return Path(__file__).with_name(f"sae-{kind}.txt")


if __name__ == "__main__":
    for kind in KINDS:
        path_of(kind).write_text("".join(f"{value:.9g}\n" for value in losses(kind)))
        print(path_of(kind))
