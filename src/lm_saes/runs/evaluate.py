"""Evaluation on held-out text: of a trained dictionary, and of one in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_saes.config import build, read_document
from lm_saes.data.factory_config import (
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
)
from lm_saes.data.text import TextDataset
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError
from lm_saes.evaluation.evaluator import EvalConfig, Evaluation, Evaluator, numbers, write_evaluation
from lm_saes.machine import keep_freed_memory
from lm_saes.models.base import LanguageModel
from lm_saes.models.load import load_language_model
from lm_saes.parallel.launch import alone
from lm_saes.report.report import write_report
from lm_saes.report.saved_run import SavedRun
from lm_saes.runs.reading import open_stream, open_texts
from lm_saes.runs.settings import EvaluateSAESettings, check_evaluation, held_out, train_settings_class
from lm_saes.storage.files import check_writable


def evaluate_sae(settings: EvaluateSAESettings) -> dict[str, float]:
    """Measure a trained dictionary on held-out text; a run's directory also gets `evaluation.json` and a new report."""
    alone("evaluate")
    sae = AbstractSparseAutoEncoder.from_pretrained(settings.sae)
    _check_finite(sae, settings.sae)
    is_run = (settings.sae / "metrics.jsonl").exists()
    if is_run:
        SavedRun.read(settings.sae)  # what is wrong with it is told before anything is measured
        check_writable(settings.sae, "sae")
    saved = settings.sae / "settings.json"
    own = read_document(saved) if saved.exists() else {}
    train = build(train_settings_class(sae.cfg.sae_type), own, f"{saved}: ") if own else None
    model_cfg = settings.model or (train.model if train else None)
    datasets = settings.datasets if settings.datasets is not None else (train.datasets if train else {})
    cfg = settings.eval or (train.eval if train else None) or EvalConfig()
    check_evaluation(model_cfg, datasets)
    assert model_cfg is not None
    apart = open_texts(held_out(datasets))
    result = evaluate_held_out(sae, cfg, load_language_model(model_cfg), apart)
    if is_run:
        write_evaluation(settings.sae, result)
        write_report(settings.sae)
    return numbers(result)


def evaluate_from_config(data: dict[str, Any]) -> dict[str, float]:
    """Evaluate what a config file describes; returns the metrics."""
    keep_freed_memory()
    return evaluate_sae(build(EvaluateSAESettings, data))


class HeldOut:
    """Evaluates on held-out text during training, and keeps the last result."""

    def __init__(self, cfg: EvalConfig, model: LanguageModel, datasets: Mapping[str, TextDataset]) -> None:
        self.cfg, self.model, self.datasets = cfg, model, datasets
        self.last: Evaluation = {}

    def __call__(self, sae: AbstractSparseAutoEncoder) -> dict[str, float]:
        self.last = evaluate_held_out(sae, self.cfg, self.model, self.datasets)
        return {name.replace("metrics/", "eval/") if "downstream" not in name else name: value
                for name, value in numbers(self.last).items()}  # fmt: skip


def evaluate_held_out(
    sae: AbstractSparseAutoEncoder, cfg: EvalConfig, model: LanguageModel, datasets: Mapping[str, TextDataset]
) -> Evaluation:
    """Measure a dictionary on held-out documents, as `model` reads them."""
    factory = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name=name) for name in datasets],
        target=ActivationFactoryTarget.ACTIVATIONS_2D,
        hook_points=sae.cfg.associated_hook_points,
        batch_size=cfg.batch_size,
        model_batch_size=cfg.batch_size,
        context_size=min(cfg.context_size, model.max_length),
        num_workers=0,
    )
    with open_stream(factory, 0, model, datasets) as stream:
        return Evaluator(cfg).evaluate(sae, stream, model)  # type: ignore[arg-type]


def _check_finite(sae: AbstractSparseAutoEncoder, path: Path) -> None:
    for name, parameter in sae.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite; give an earlier checkpoint")
