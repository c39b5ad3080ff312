"""What it takes to add a kind, an activation function or a sparsity loss: one class, and no edit elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lm_saes.config import build
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.sae import SAEConfig, SparseAutoEncoder
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.latents.activations import ActivationFunction
from lm_saes.latents.activations.relu import ReLU
from lm_saes.latents.record import Record
from lm_saes.losses import sparsity
from lm_saes.losses.settings import LossSettings
from lm_saes.runs.runners import train_settings_class
from lm_saes.runs.settings import TrainSettings
from lm_saes.trainer import Trainer, TrainerConfig

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(ActivationFunction, "registry", dict(ActivationFunction.registry))
    monkeypatch.setattr(AbstractSparseAutoEncoder, "kinds", dict(AbstractSparseAutoEncoder.kinds))
    monkeypatch.setattr(BaseSAEConfig, "registry", dict(BaseSAEConfig.registry))
    monkeypatch.setattr(TrainSettings, "kinds", dict(TrainSettings.kinds))
    monkeypatch.setattr(sparsity, "SPARSITY_LOSSES", dict(sparsity.SPARSITY_LOSSES))


def batches(n: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{HOOK: torch.randn(32, 8, generator=draw), "tokens": torch.zeros(32, dtype=torch.int64)} for _ in range(n)]


def trained(path: Path, sae: dict[str, Any], **trainer: Any) -> AbstractSparseAutoEncoder:
    """Ten steps with the given settings, then saved and loaded again."""
    cfg = build(BaseSAEConfig.kind(sae.get("sae_type", "sae")), {"d_model": 8, "expansion_factor": 3, **sae})
    stream = batches(10)
    dictionary = Initializer(InitializerConfig(decoder_uniform_bound=0.5)).initialize_sae_from_config(cfg, stream)
    settings = {"total_training_tokens": 320, "lr_warm_up_steps": 0, "n_checkpoints": 1, "exp_result_path": str(path)}
    Trainer(build(TrainerConfig, settings | trainer)).fit(dictionary, stream)
    return type(dictionary).from_pretrained(path)


def test_an_activation_function_is_one_class(tmp_path: Path) -> None:
    class AboveHalf(ReLU):
        name = "above-half"

        def keep(self, s_NF: Tensor, mask_N: Tensor | None) -> Tensor:
            return s_NF > 0.5

        def candidates(self, s_BF: Tensor, rows: slice) -> Tensor:
            return s_BF > 0.5

    sae = trained(tmp_path, {"hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "above-half"})
    kept = sae.record(batches(1)[0]).code.dense().detach()
    s = kept * sae.decoder_norm().detach()
    assert float(s[kept > 0].min()) > 0.5 and 0 < int((kept > 0).sum()) < kept.numel()


def test_a_sparsity_loss_is_one_function(tmp_path: Path) -> None:
    seen: list[LossSettings] = []

    @sparsity.sparsity_loss("count-of-squares")
    def squares(record: Record, settings: LossSettings) -> Tensor:
        seen.append(settings)
        return record.row_mean(record.code.sum_rows(record.code.values.square()))

    sae = {"hook_point_in": HOOK, "hook_point_out": HOOK}
    shrunk = trained(tmp_path / "with", sae, sparsity_loss_type="count-of-squares", l1_coefficient=5.0, lr=0.05)
    plain = trained(tmp_path / "without", sae, lr=0.05)
    strength = [float(d.record(batches(1)[0]).code.dense().detach().square().sum()) for d in (shrunk, plain)]
    assert len(seen) == 10 and strength[0] < 0.5 * strength[1]


def test_a_kind_is_one_file(tmp_path: Path) -> None:
    class ToyConfig(SAEConfig):
        sae_type: Literal["toy"] = "toy"  # type: ignore[assignment]

    class Toy(SparseAutoEncoder):
        config_class = ToyConfig

    toy = {"sae_type": "toy", "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "topk", "top_k": 3}
    assert isinstance(trained(tmp_path, toy), Toy)
    source = {"type": "activations", "path": "cache"}
    factory = {"sources": [source], "target": "activations-1d", "hook_points": [HOOK], "batch_size": 4}
    settings = build(
        train_settings_class("toy"),
        {"sae": {"d_model": 8, "expansion_factor": 3, **toy}, "activation_factory": factory},
    )
    assert isinstance(settings.sae, ToyConfig)
