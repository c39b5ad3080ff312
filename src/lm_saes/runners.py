"""The commands: one generic training run, generation of activations, evaluation."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import create_model

from lm_saes.config import build
from lm_saes.data.factory import ActivationFactory, ActivationFactoryDatasetSource
from lm_saes.data.factory_config import ActivationFactoryConfig, ActivationFactoryTarget
from lm_saes.data.language_model import LanguageModel, LanguageModelConfig, load_language_model
from lm_saes.data.seeding import generator
from lm_saes.data.stream import ActivationStream
from lm_saes.data.text import DatasetConfig, load_dataset
from lm_saes.data.writer import ActivationWriter
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.evaluation.evaluator import EvalConfig, Evaluation, Evaluator, numbers, write_evaluation
from lm_saes.files import write_text
from lm_saes.initializer import Initializer
from lm_saes.memory import keep_freed_memory
from lm_saes.report.report import write_report
from lm_saes.settings import (
    EvaluateSAESettings,
    GenerateActivationsSettings,
    TrainCLTSettings,
    TrainCrossCoderSettings,
    TrainLorsaSettings,
    TrainMOLTSettings,
    TrainSAESettings,
    TrainSettings,
    check_evaluation,
    held_out,
)
from lm_saes.trainer import Trainer
from lm_saes.training.checkpoint import saved_steps
from lm_saes.training.loggers import ConsoleLogger, JsonlLogger, Loggers, TensorBoardLogger, WandbLogger

__all__ = [
    "EvaluateSAESettings",
    "GenerateActivationsSettings",
    "TrainCLTSettings",
    "TrainCrossCoderSettings",
    "TrainLorsaSettings",
    "TrainMOLTSettings",
    "TrainSAESettings",
    "evaluate_sae",
    "generate_activations",
    "train_clt",
    "train_crosscoder",
    "train_lorsa",
    "train_molt",
    "train_sae",
]


def train_sae(settings: TrainSAESettings) -> AbstractSparseAutoEncoder:
    """Train a sparse autoencoder or transcoder.

    The run's directory then holds weights, metrics, evaluation and report.
    """
    return _train(settings)


def train_crosscoder(settings: TrainCrossCoderSettings) -> AbstractSparseAutoEncoder:
    """Train a crosscoder; as `train_sae`."""
    return _train(settings)


def train_clt(settings: TrainCLTSettings) -> AbstractSparseAutoEncoder:
    """Train a cross-layer transcoder; as `train_sae`."""
    return _train(settings)


def train_molt(settings: TrainMOLTSettings) -> AbstractSparseAutoEncoder:
    """Train a mixture of linear transforms; as `train_sae`."""
    return _train(settings)


def train_lorsa(settings: TrainLorsaSettings) -> AbstractSparseAutoEncoder:
    """Train a low-rank sparse attention; as `train_sae`."""
    return _train(settings)


def _train(settings: TrainSettings) -> AbstractSparseAutoEncoder:
    run = Path(settings.trainer.exp_result_path)
    trainer_cfg = settings.trainer.model_copy()
    if settings.resume:
        trainer_cfg.from_pretrained_path = trainer_cfg.from_pretrained_path or str(run)
    elif saved_steps(run) or (run / "sae_weights.safetensors").exists():
        raise ConfigError(
            f"trainer.exp_result_path={str(run)!r}: holds a run already; resume it, remove it, or name another"
        )
    cfg = settings.sae.model_copy(update={"device": settings.device_type})
    if trainer_cfg.from_pretrained_path is None:
        Initializer(settings.initializer).check(cfg)
    model = None if settings.model is None else _load_model(settings.model, settings.device_type)
    datasets = {source.name: settings.datasets[source.name] for source in _dataset_sources(settings)}
    with _stream(settings.activation_factory, settings.seed, model, datasets) as stream:
        _write_json(run / "settings.json", settings.to_json())
        torch.manual_seed(generator(settings.seed, "initialisation").initial_seed())
        if trainer_cfg.from_pretrained_path is None:
            sae = Initializer(settings.initializer).initialize_sae_from_config(cfg, stream, model=model)
        else:
            sae = AbstractSparseAutoEncoder.from_config(cfg)
        trainer = Trainer(trainer_cfg)
        evaluation = _HeldOut(settings.eval, model, settings.datasets) if settings.eval and model else None
        ended_early = trainer.fit(sae, stream, eval_fn=evaluation, loggers=_loggers(settings, run))
        read_by = {} if model is None else model.provenance()
        if settings.model_name is not None:
            read_by["model_name"] = settings.model_name
        provenance = {"model": read_by, "data": stream.provenance()}
    result: Evaluation = {}
    if evaluation:
        if ended_early or not evaluation.last:  # else the last step was evaluated
            evaluation(sae)
        result = evaluation.last
        write_evaluation(run, result)
    names = {"name": settings.sae_name, "series": settings.sae_series}
    progress = {"tokens": trainer.cur_tokens, "steps": trainer.cur_step, "metrics": numbers(result)}
    _write_json(run / "provenance.json", {**names, **_versions(), **provenance, **progress})
    write_report(run)
    return sae


class _HeldOut:
    """Evaluates on held-out text during training, and keeps the last result."""

    def __init__(self, cfg: EvalConfig, model: LanguageModel, datasets: Mapping[str, DatasetConfig]) -> None:
        self.cfg, self.model, self.datasets = cfg, model, datasets
        self.last: Evaluation = {}

    def __call__(self, sae: AbstractSparseAutoEncoder) -> dict[str, float]:
        self.last = evaluate_held_out(sae, self.cfg, self.model, self.datasets)
        return {name.replace("metrics/", "eval/") if "downstream" not in name else name: value
                for name, value in numbers(self.last).items()}  # fmt: skip


def evaluate_held_out(
    sae: AbstractSparseAutoEncoder, cfg: EvalConfig, model: LanguageModel, datasets: Mapping[str, DatasetConfig]
) -> Evaluation:
    """Measure a dictionary on the held-out documents of every dataset, as `model` reads them."""
    apart = held_out(dict(datasets))
    factory = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name=name) for name in apart],
        target=ActivationFactoryTarget.ACTIVATIONS_2D,
        hook_points=sae.cfg.associated_hook_points,
        batch_size=cfg.batch_size,
        model_batch_size=cfg.batch_size,
        context_size=min(cfg.context_size, model.max_length),
        num_workers=0,
    )
    with _stream(factory, 0, model, apart) as stream:
        return Evaluator(cfg).evaluate(sae, stream, model)  # type: ignore[arg-type]


def generate_activations(settings: GenerateActivationsSettings) -> Path:
    """Write the activations of a language model reading text to a cache directory, and return it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    model = load_language_model(settings.model)
    with _stream(settings.activation_factory, settings.seed, model, settings.datasets) as stream, Progress(
        TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    ) as bar:  # fmt: skip
        task = bar.add_task("tokens", total=settings.writer.total_generating_tokens)
        writer = ActivationWriter(settings.writer)
        return writer.process(stream, lambda done, total: bar.update(task, completed=done, total=total))


def evaluate_sae(settings: EvaluateSAESettings) -> dict[str, float]:
    """Measure a trained dictionary on held-out text; a run's directory also gets `evaluation.json` and a new report."""
    saved = settings.sae / "settings.json"
    own = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    train = None if not own else build(train_settings_class(own.get("sae", {}).get("sae_type")), own, f"{saved}: ")
    model_cfg = settings.model or (train.model if train else None)
    datasets = settings.datasets if settings.datasets is not None else (train.datasets if train else {})
    cfg = settings.eval or (train.eval if train else None) or EvalConfig()
    check_evaluation(model_cfg, datasets)
    assert model_cfg is not None
    sae = AbstractSparseAutoEncoder.from_pretrained(settings.sae)
    result = evaluate_held_out(sae, cfg, load_language_model(model_cfg), datasets)
    if (settings.sae / "metrics.jsonl").exists():
        write_evaluation(settings.sae, result)
        write_report(settings.sae)
    return numbers(result)


# -- from config files -------------------------------------------------------------------------------------------------


def train_settings_class(sae_type: Any) -> type[TrainSettings]:
    """The settings of a training run for a kind of dictionary; made on the spot for a kind that brings none."""
    config = BaseSAEConfig.kind(sae_type)
    if sae_type not in TrainSettings.kinds:
        create_model("TrainSettings", __base__=TrainSettings, sae=(config, ...))  # registers itself
    return TrainSettings.kinds[sae_type]


def train_from_config(data: dict[str, Any], *, resume: bool = False) -> Path:
    """Train what a config file describes; returns the path of the report."""
    keep_freed_memory()
    sae = data.get("sae")
    sae_type = sae.get("sae_type", "sae") if isinstance(sae, dict) else "sae"
    settings = build(train_settings_class(sae_type), data | ({"resume": True} if resume else {}))
    _train(settings)
    return Path(settings.trainer.exp_result_path) / "report.html"


def generate_from_config(data: dict[str, Any]) -> Path:
    """Generate what a config file describes; returns the cache directory."""
    keep_freed_memory()
    return generate_activations(build(GenerateActivationsSettings, data))


def evaluate_from_config(data: dict[str, Any]) -> dict[str, float]:
    """Evaluate what a config file describes; returns the metrics."""
    keep_freed_memory()
    return evaluate_sae(build(EvaluateSAESettings, data))


# -- parts -------------------------------------------------------------------------------------------------------------


def _dataset_sources(settings: TrainSettings) -> list[ActivationFactoryDatasetSource]:
    sources = settings.activation_factory.dataset_sources
    for source in sources:
        if source.name not in settings.datasets:
            raise ConfigError(
                f"activation_factory.sources: no dataset {source.name!r}; datasets has {sorted(settings.datasets)}"
            )
    return sources


def _load_model(cfg: LanguageModelConfig, device: str) -> LanguageModel:
    return load_language_model(cfg.model_copy(update={"device": device}) if device != "cpu" else cfg)


def _stream(
    cfg: ActivationFactoryConfig, seed: int, model: LanguageModel | None, datasets: Mapping[str, DatasetConfig]
) -> ActivationStream:
    data_seed = generator(seed, "data").initial_seed() >> 1
    opened = {name: load_dataset(dataset) for name, dataset in datasets.items()}
    return ActivationFactory(cfg, seed=data_seed).process(model=model, datasets=opened)


def _loggers(settings: TrainSettings, run: Path) -> Loggers:
    required: list[Any] = [ConsoleLogger()] if "console" in settings.loggers else []
    required.append(JsonlLogger(run / "metrics.jsonl"))
    optional: list[Any] = []
    if "tensorboard" in settings.loggers:
        optional.append(TensorBoardLogger(run / "tensorboard"))
    if settings.wandb is not None:
        resumed = None
        if settings.resume and (steps := saved_steps(run)):
            saved = list(steps.values())[-1] / "wandb_run_id.json"
            resumed = json.loads(saved.read_text(encoding="utf-8"))["wandb_run_id"] if saved.exists() else None
        optional.append(WandbLogger(settings.wandb, settings.to_json(), run, resume_id=resumed))
    return Loggers(required, optional)


def _versions() -> dict[str, Any]:
    found = {}
    for name in ("lm-saes", "torch", "transformers", "datasets", "safetensors", "numpy"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = None
    return {**found, "python": platform.python_version()}


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
