"""The running threshold: as many latents are active at inference as were in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes.config import build
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.trainer import Trainer, TrainerConfig

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
KINDS: dict[str, dict[str, Any]] = {
    "sae": {"hook_point_in": HOOKS[0], "hook_point_out": HOOKS[0]},
    "crosscoder": {"hook_points": HOOKS},
    "clt": {"hook_points_in": HOOKS, "hook_points_out": HOOKS[::-1]},
}


def batches(first: int, n: int) -> list[dict[str, Any]]:
    """Sparse mixtures of 48 directions in 16 dimensions, seen in two layers."""
    directions = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for i in range(first, first + n):
        draw = torch.Generator().manual_seed(i + 1)
        x = torch.relu(torch.randn(256, 48, generator=draw) - 1.5) @ directions
        layers = {HOOKS[0]: x, HOOKS[1]: 0.7 * x + 0.1 * torch.randn(x.shape, generator=draw)}
        found.append({**layers, "tokens": torch.zeros(256, dtype=torch.int64)})
    return found


@pytest.mark.parametrize("act_fn", ["batchtopk", "batchlayertopk"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_sparse_at_inference_as_in_training(tmp_path: Path, kind: str, act_fn: str) -> None:
    config = BaseSAEConfig.kind(kind)
    if act_fn not in config.activation_functions:
        act_fn = "batchtopk"
    cfg = build(config, {"d_model": 16, "expansion_factor": 4, "act_fn": act_fn, "top_k": 5, **KINDS[kind]})
    torch.manual_seed(0)
    stream = batches(0, 400)
    start = InitializerConfig() if kind == "clt" else InitializerConfig(decoder_uniform_bound=0.3)
    dictionary = Initializer(start).initialize_sae_from_config(cfg, stream)
    settings = {"total_training_tokens": 400 * 256, "lr": 3e-3, "lr_warm_up_steps": 0, "n_checkpoints": 0}
    Trainer(build(TrainerConfig, settings | {"exp_result_path": str(tmp_path)})).fit(dictionary, stream)
    loaded = AbstractSparseAutoEncoder.from_pretrained(tmp_path)
    in_training = [float(dictionary.train().record(b).counts.sum()) for b in batches(400, 8)]
    at_inference = [float(loaded.record(b).counts.sum()) for b in batches(400, 8)]
    assert sum(at_inference) == pytest.approx(sum(in_training), rel=0.1)
