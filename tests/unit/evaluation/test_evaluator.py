"""Reconstruction and sparsity metrics on held-out text: worked by hand, masks, batch grouping, files."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lm_saes import SparseAutoEncoder
from lm_saes.config import build
from lm_saes.data.batch import Batch
from lm_saes.errors import ConfigError, DataError
from lm_saes.evaluation.evaluator import EvalConfig, Evaluation, Evaluator, numbers, write_evaluation
from lm_saes.evaluation.examples import LatentExample
from lm_saes.latents.record import Record

from .by_hand import HOOK, dictionary, identity


def constant(value: Tensor) -> SparseAutoEncoder:
    """No latent ever fires; the reconstruction is the decoder bias."""
    d = len(value)
    return dictionary(torch.zeros(d, 2 * d), torch.zeros(2 * d, d), b_E=-1.0, b_D=value)


def integers(seed: int = 0) -> tuple[SparseAutoEncoder, Batch]:
    """Six contexts of seven tokens and a dictionary in small integers: sums are exact however they are grouped."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (6, 7, 4), generator=g).float()
    mask = torch.rand(6, 7, generator=g) < 0.7
    W_E, W_D = torch.randint(-2, 3, (4, 12), generator=g).float(), torch.randint(-2, 3, (12, 4), generator=g).float()
    batch = {HOOK: x, "tokens": torch.arange(42).view(6, 7), "mask": mask}
    return dictionary(W_E, W_D, b_E=-5.0), batch


def grouped(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch["tokens"]), size):
        yield {name: value[start : start + size] for name, value in batch.items()}


def evaluate(sae: SparseAutoEncoder, *batches: Batch, **cfg: int) -> Evaluation:
    return Evaluator(EvalConfig(**cfg)).evaluate(sae, iter(batches))


def examples_of(result: Evaluation) -> list[LatentExample]:
    return cast(list[LatentExample], result["latents"])


def test_metrics_worked_by_hand():
    # Valid labels (3,4), (0,0), (6,8): mean (3,4), squared distances from it 25 in total twice: 50.
    # Latent 0 = relu(x0 - 1) is active on the first and the third; latents 1..3 never. Reconstruction 0.
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[9.0, 9.0], [6.0, 8.0]]])
    W_E = torch.zeros(2, 4)
    W_E[0, 0] = 1.0
    sae = dictionary(W_E, torch.zeros(4, 2), b_E=-1.0)
    batch = {HOOK: x, "tokens": torch.zeros(2, 2, dtype=torch.int64), "mask": torch.tensor([[1, 1], [0, 1]])}
    result = evaluate(sae, batch)
    assert numbers(result) == pytest.approx(
        {
            "metrics/l0": 2 / 3,
            "sparsity/silent": 3 / 4,
            "details/n_evaluated_tokens": 3,
            "metrics/explained_variance": 1 - (25 + 0 + 100) / 50,
            # The first token is the batch mean itself: left out. The others: 1 - 0/25 and 1 - 100/25.
            "metrics/explained_variance_legacy": (1 - 3) / 2,
            "metrics/l2_norm_error": (5 + 0 + 10) / 3,
            "metrics/l2_norm_error_ratio": 1.0,
        },
        rel=1e-12,
    )
    assert result["sparsity/frequency"] == pytest.approx([2 / 3, 0, 0, 0])


def test_identity_explains_everything_and_the_mean_explains_nothing():
    _, batch = integers()
    mean = batch[HOOK][batch["mask"]].double().mean(0).float()
    assert evaluate(identity(4), batch)["metrics/explained_variance"] == 1.0
    assert evaluate(identity(4), batch)["metrics/l2_norm_error"] == 0.0
    # The float32 decoder bias holds the mean to 1e-7, whose square is the error.
    assert evaluate(constant(mean), *grouped(batch, 2))["metrics/explained_variance"] == pytest.approx(0, abs=1e-12)


def test_variance_keeps_its_digits_where_the_mean_is_large():
    # Float32 has steps of 64 here. The mean of the seven is predicted: error and variance are the same number.
    x = (1e9 + 64.0 * torch.arange(7)).view(1, 7, 1)
    batch = {HOOK: x, "tokens": torch.zeros(1, 7, dtype=torch.int64)}
    assert evaluate(constant(torch.tensor([1e9 + 3 * 64])), batch)["metrics/explained_variance"] == 0.0


def test_grouping_contexts_into_batches_changes_nothing():
    sae, batch = integers()
    whole = evaluate(sae, batch)
    for size in (1, 2, 5):
        parts = evaluate(sae, *grouped(batch, size))
        assert parts["latents"] == whole["latents"]
        assert parts["sparsity/frequency"] == whole["sparsity/frequency"]
        legacy = "metrics/explained_variance_legacy"  # defined per batch
        assert numbers(parts) | {legacy: 0} == pytest.approx(numbers(whole) | {legacy: 0}, rel=1e-12)
    assert 0.01 < numbers(whole)["metrics/l0"] < 11 and len(examples_of(whole)) > 3


def test_only_the_first_max_tokens_count_and_no_more_batches_are_taken():
    sae, batch = integers()
    stream = grouped(batch, 2)
    result = Evaluator(EvalConfig(max_tokens=7)).evaluate(sae, stream)
    assert result["details/n_evaluated_tokens"] == 7
    seventh = batch["mask"].flatten().nonzero()[6].item()
    cut = batch | {"mask": batch["mask"] & (torch.arange(42).view(6, 7) <= seventh)}
    legacy = "metrics/explained_variance_legacy"
    assert numbers(result) | {legacy: 0} == pytest.approx(numbers(evaluate(sae, cut)) | {legacy: 0}, rel=1e-12)
    assert len(list(stream)) == 2, "seven valid tokens are in the first of three batches"


def test_masked_tokens_count_nowhere():
    sae, batch = integers()
    loud = batch[HOOK].clone()
    loud[~batch["mask"]] = 1e4
    assert evaluate(sae, batch | {HOOK: loud}) == evaluate(sae, batch)
    everything = batch | {HOOK: loud, "mask": torch.ones_like(batch["mask"])}
    assert numbers(evaluate(sae, everything)) != numbers(evaluate(sae, batch))


def test_metrics_are_of_raw_activations():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, generator=g)
    sae = identity(4)
    cfg = sae.cfg.model_copy(update={"norm_activation": "dataset-wise"})
    scaled = SparseAutoEncoder(cfg)
    scaled.load_state_dict(sae.state_dict())
    scaled.set_dataset_average_activation_norm({HOOK: 40.0})
    with torch.no_grad():
        scaled.get_parameter("b_D").add_(0.05)  # of a normalised activation: 0.05 * 40 / sqrt(4) = 1 of a raw one
    result = evaluate(scaled, {HOOK: x, "tokens": torch.zeros(2, 5, dtype=torch.int64)})
    assert result["metrics/l2_norm_error"] == pytest.approx(2.0, rel=1e-6)  # sqrt(4 * 1^2)


def test_the_dictionary_is_used_in_evaluation_mode_and_put_back(monkeypatch: pytest.MonkeyPatch):
    sae, batch = integers()
    modes: list[bool] = []
    make_record = sae.make_record

    def watched(batch: Mapping[str, Any]) -> Record:
        modes.append(sae.training)
        return make_record(batch)

    monkeypatch.setattr(sae, "make_record", watched)
    for mode in (True, False):
        sae.train(mode)
        evaluate(sae, batch)
        assert sae.training is mode
    assert modes == [False, False]
    sae.train()
    with pytest.raises(DataError):
        evaluate(sae)
    assert sae.training


def test_streams_that_cannot_be_evaluated():
    sae, batch = integers()
    with pytest.raises(DataError, match="no valid token"):
        evaluate(sae)
    with pytest.raises(DataError, match="activations-2d"):
        evaluate(sae, {HOOK: batch[HOOK][0], "tokens": batch["tokens"][0]})
    with pytest.raises(DataError, match=HOOK):
        evaluate(sae, {"tokens": batch["tokens"]})


# -- settings and files ------------------------------------------------------------------------------------------------


def test_write_evaluation(tmp_path: Path):
    sae, batch = integers()
    result = evaluate(sae, batch)
    result["metrics/explained_variance"] = math.nan
    write_evaluation(tmp_path, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "latents.json"]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation == numbers(result) | {"metrics/explained_variance": None}
    latents = json.loads((tmp_path / "latents.json").read_text())
    assert latents == {"frequency": result["sparsity/frequency"], "latents": result["latents"]}


@pytest.mark.parametrize("setting", [{"max_tokens": 0}, {"n_snippets": 0}, {"snippets": 3}])
def test_settings_that_cannot_work(setting: dict[str, int]):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        build(EvalConfig, setting)
