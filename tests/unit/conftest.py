"""Tiny dictionaries, batches with structure, and short runs whose reports are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes import Initializer, InitializerConfig, SAEConfig, SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.data.batch import Batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder

HOOK = "blocks.0.hook_resid_post"
D = 8


@dataclass
class Recorder:
    """A logger that keeps everything it is told, in order."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    summary: dict[str, float] | None = None

    def start(self, total_steps: int, step: int) -> None:
        self.calls.append(("start", step))

    def advance(self, step: int) -> None:
        self.calls.append(("advance", step))

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("report", step))
        self.rows[step] = dict(metrics)

    def close(self, summary: Mapping[str, float]) -> None:
        self.calls.append(("close", len(summary)))
        self.summary = dict(summary)

    def series(self, name: str) -> dict[int, float]:
        return {step: row[name] for step, row in self.rows.items() if name in row}


@dataclass
class Fitted:
    sae: AbstractSparseAutoEncoder
    trainer: Trainer
    log: Recorder
    ended_early: bool
    path: Path

    @property
    def saved(self) -> list[int]:
        """Steps of the checkpoints on disk."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.path.glob("checkpoints/step_*"))


def make_batches(n: int, tokens: int = 16, *, seed: int = 0, masked: bool = False, contexts: int = 0) -> list[Batch]:
    """Sums of three of twelve directions, about a mean that is not 0; `contexts` > 0 folds the tokens into 2D."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, D, generator=torch.Generator().manual_seed(99))
    batches: list[Batch] = []
    for i in range(n):
        chosen = torch.rand(tokens, 12, generator=g).topk(3).indices
        strength = torch.rand(tokens, 3, generator=g) + 0.5
        x = 0.5 + torch.einsum("tk,tkd->td", strength, directions[chosen]) + 0.05 * torch.randn(tokens, D, generator=g)
        batch: Batch = {HOOK: x, "tokens": torch.arange(i * tokens, (i + 1) * tokens)}
        if masked:
            batch["mask"] = torch.rand(tokens, generator=g) < 0.6
            batch["mask"][0] = True
        if contexts:
            batch = {name: t.view(contexts, tokens // contexts, *t.shape[1:]) for name, t in batch.items()}
        batches.append(batch)
    return batches


def make_sae(act_fn: str = "relu", *, seed: int = 0, latents: int = 32, **settings: Any) -> SparseAutoEncoder:
    """A dictionary with encoder tied to the decoder, whose input scale is known."""
    if act_fn in ("topk", "batchtopk"):
        settings = {"top_k": 4, **settings}
    cfg = SAEConfig(
        hook_point_in=HOOK, hook_point_out=HOOK, d_model=D, expansion_factor=latents / D, act_fn=act_fn, **settings
    )
    torch.manual_seed(seed)
    threshold = -1.0 if act_fn == "jumprelu" else None
    start = InitializerConfig(decoder_uniform_bound=0.3, init_log_jumprelu_threshold_value=threshold)
    sae = Initializer(start).initialize_sae_from_config(cfg, activation_norm={HOOK: 4.0})
    assert isinstance(sae, SparseAutoEncoder)
    return sae


def trainer_config(path: Path, **settings: Any) -> TrainerConfig:
    """Full precision, constant rate, every step reported, no checkpoints; unless said otherwise."""
    quiet: dict[str, Any] = {"amp_dtype": None, "lr": 1e-2, "log_frequency": 1, "n_checkpoints": 0}
    schedule = {} if "lr_scheduler_name" in settings else {"lr_scheduler_name": "constant"}
    return TrainerConfig(**{**quiet, **schedule, "exp_result_path": str(path), **settings})


def fit(
    sae: AbstractSparseAutoEncoder, stream: Iterable[Batch], path: Path, *, steps: int = 6, tokens: int = 16,
    eval_fn: Any = None, trainer: Trainer | None = None, **settings: Any,
) -> Fitted:  # fmt: skip
    """Train for `steps` steps of batches of `tokens` tokens."""
    settings = {"total_training_tokens": steps * tokens, **settings}
    trainer = trainer or Trainer(trainer_config(path, **settings))
    log = Recorder()
    return Fitted(sae, trainer, log, trainer.fit(sae, stream, eval_fn=eval_fn, loggers=log), path)


@pytest.fixture
def batches() -> Callable[..., list[Batch]]:
    return make_batches


@pytest.fixture
def new_sae() -> Callable[..., SparseAutoEncoder]:
    return make_sae


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Fitted]:
    """`run(sae, stream, **trainer settings)` trains into a directory of its own (`name`)."""

    def start(sae: AbstractSparseAutoEncoder, stream: Iterable[Batch], *, name: str = "run", **settings: Any) -> Fitted:
        return fit(sae, stream, tmp_path / name, **settings)

    return start
