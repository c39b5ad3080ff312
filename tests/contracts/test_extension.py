"""What it takes to add a kind, an activation function or a sparsity loss: one class, and no edit elsewhere."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.config import build
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.sae import SAEConfig, SparseAutoEncoder
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.latents.activations import ActivationFunction
from lm_saes.latents.activations.base import SelectionSettings
from lm_saes.latents.activations.batchtopk import BatchTopK
from lm_saes.latents.activations.relu import ReLU
from lm_saes.latents.activations.topk import TopK
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.record import Record
from lm_saes.latents.selection import strategies
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.wants import BestOfBatch, BestPerToken, Judged
from lm_saes.losses.sparsity import SparsityLoss
from lm_saes.runners import train_settings_class
from lm_saes.trainer import Trainer, TrainerConfig

from . import toy

HOOK = "blocks.0.hook_resid_post"


pytestmark = pytest.mark.usefixtures("own_registries")


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

        def wants(self) -> Judged:  # type: ignore[override]
            return Judged(lambda s_BF, rows: s_BF > 0.5)

    sae = trained(tmp_path, {"hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "above-half"})
    kept = sae.record(batches(1)[0]).code.dense().detach()
    s = kept * sae.decoder_norm().detach()
    assert float(s[kept > 0].min()) > 0.5 and 0 < int((kept > 0).sum()) < kept.numel()


def declaring() -> dict[str, type[ActivationFunction]]:
    """Activation functions that say what they want, and nothing about how to find it."""

    class TopKAboveHalf(TopK):
        """A descendant with another rule: of the k largest, those above a half."""

        name = "topk-above-half"

        def wants(self) -> BestPerToken:
            return BestPerToken(self.k, least=0.5)

    class BatchTopKAboveHalf(BatchTopK):
        """The same of a batch."""

        name = "batchtopk-above-half"

        def wants(self) -> BestOfBatch | Judged:
            want = super().wants()
            return replace(want, least=0.5) if isinstance(want, BestOfBatch) else want

    class TopTwo(ActivationFunction):
        """One from nothing, that declares what it wants."""

        name = "top-two"

        def wants(self) -> BestPerToken:
            return BestPerToken(2)

    return {"topk": TopKAboveHalf, "batchtopk": BatchTopKAboveHalf, "two": TopTwo}


@pytest.mark.parametrize("precision", ["full", "screened", "half"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "two"])
def test_fast_ways_are_taken_by_declaration(monkeypatch: pytest.MonkeyPatch, name: str, precision: str) -> None:
    taken: list[str] = []
    ways = ["top_in_full", "top_screened", "top_in_half", "batch_screened", "batch_in_half"]
    for way in ways:
        take = getattr(strategies, way)
        monkeypatch.setattr(strategies, way, lambda *given, way=way, take=take: taken.append(way) or take(*given))
    monkeypatch.setattr(strategies, "precision", lambda *_: precision)
    draw = torch.Generator().manual_seed(0)
    x_ND, W_FD = torch.randn(300, 24, generator=draw), torch.randn(640, 24, generator=draw) / 5
    encoder, settings = LinearEncoder(W_FD.T, torch.zeros(640)), SelectionSettings(2, 2.0, (640,), 1)
    code = encode(x_ND, encoder, Selector(declaring()[name](settings)), None, None)
    batchwide = name == "batchtopk"
    expected = {"full": [] if batchwide else ["top_in_full"],
                "screened": ["batch_screened" if batchwide else "top_screened"],
                "half": ["batch_in_half" if batchwide else "top_in_half"]}[precision]  # fmt: skip
    assert taken[:1] == expected  # a screening that fails looks at the rest in full
    s_NF = x_ND @ W_FD.T
    if batchwide:
        wanted_NF = s_NF >= s_NF.flatten().topk(2 * len(x_ND)).values[-1]
    else:
        wanted_NF = torch.zeros_like(s_NF, dtype=torch.bool).scatter_(1, s_NF.topk(2, dim=1).indices, True)
    wanted_NF &= s_NF > (0 if name == "two" else 0.5)
    if precision != "half":
        assert torch.equal(code.dense() > 0, wanted_NF)
    torch.testing.assert_close(code.dense().sum(), s_NF[wanted_NF].sum(), rtol=5e-3, atol=0)  # bfloat16 has eight bits


def test_a_sparsity_loss_is_one_class(tmp_path: Path) -> None:
    seen: list[Record] = []

    class CountOfSquares(SparsityLoss):
        name = "count-of-squares"

        def __call__(self, record: Record) -> Tensor:
            seen.append(record)
            return record.row_mean(record.code.sum_rows(record.code.values.square()))

    sae = {"hook_point_in": HOOK, "hook_point_out": HOOK}
    shrunk = trained(tmp_path / "with", sae, sparsity_loss_type="count-of-squares", l1_coefficient=5.0, lr=0.05)
    plain = trained(tmp_path / "without", sae, lr=0.05)
    strength = [float(d.record(batches(1)[0]).code.dense().detach().square().sum()) for d in (shrunk, plain)]
    assert len(seen) == 10 and strength[0] < 0.5 * strength[1]


@torch.no_grad()
def loss_of(sae: AbstractSparseAutoEncoder) -> float:
    return float(sae.compute_loss(sae.normalize_activations(batches(10)[-1]), return_aux_data=False))  # type: ignore[arg-type]


def test_a_kind_is_one_class(tmp_path: Path) -> None:
    """It trains, is saved, folds and resumes; that it can be cut is shown in tests/parallel/test_same_numbers.py."""
    assert len(inspect.getsource(toy.Tied).splitlines()) < 60
    settings = {"sae_type": "tied", "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "topk", "top_k": 3}
    cfg = build(BaseSAEConfig.kind("tied"), {"d_model": 8, "expansion_factor": 3, **settings})
    one = Initializer(InitializerConfig(decoder_uniform_bound=0.5)).initialize_sae_from_config(cfg, batches(10))
    before = loss_of(one)
    whole = TrainerConfig(
        total_training_tokens=320, lr=0.01, lr_warm_up_steps=0, n_checkpoints=2, check_point_save_mode="linear",
        auxk_coefficient=0.1, dead_threshold=40, exp_result_path=str(tmp_path / "whole"), amp_dtype=None,
    )  # fmt: skip
    Trainer(whole).fit(one, batches(10))
    after = loss_of(one)
    assert after < 0.9 * before
    other = AbstractSparseAutoEncoder.from_config(cfg)
    resumed = Trainer.from_checkpoint(other, tmp_path / "whole" / "checkpoints" / "step_5")
    resumed.cfg = resumed.cfg.model_copy(update={"exp_result_path": str(tmp_path / "resumed")})
    resumed.fit(other, batches(10)[5:])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        want = one.eval().reconstruct(batches(1)[0])
        folded = AbstractSparseAutoEncoder.from_pretrained(tmp_path / "whole")
        assert isinstance(folded, toy.Tied) and folded.cfg.norm_activation == "inference"
        torch.testing.assert_close(folded.reconstruct(batches(1)[0]), want, rtol=1e-5, atol=1e-5)
    source = {"type": "activations", "path": "cache"}
    factory = {"sources": [source], "target": "activations-1d", "hook_points": [HOOK], "batch_size": 4}
    data = {"sae": {"d_model": 8, "expansion_factor": 3, **settings}, "activation_factory": factory}
    made = build(train_settings_class("tied"), data)
    assert isinstance(made.sae, toy.TiedConfig)


@pytest.mark.parametrize("name", sorted(AbstractSparseAutoEncoder.__abstractmethods__))
def test_a_kind_that_lacks_a_method_cannot_be_built(name: str) -> None:
    given = {method: getattr(SparseAutoEncoder, method) for method in AbstractSparseAutoEncoder.__abstractmethods__}
    whole, less = (
        type("Less", (AbstractSparseAutoEncoder,), {k: v for k, v in given.items() if k != left_out})
        for left_out in (None, name)
    )
    cfg = SAEConfig(hook_point_in="a", hook_point_out="a", d_model=8, expansion_factor=3)
    whole(cfg)
    with pytest.raises(TypeError, match=rf"abstract method '?{name}'?$"):
        less(cfg)
