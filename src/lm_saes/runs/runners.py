"""The commands: one generic training run, generation of activations, evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import create_model

from lm_saes.axes.axis import Axes
from lm_saes.axes.together import by_first, exchange, require_same
from lm_saes.config import build, read_document
from lm_saes.data.factory import ActivationFactory, ActivationFactoryDatasetSource
from lm_saes.data.factory_config import ActivationFactoryConfig, ActivationFactoryTarget
from lm_saes.data.seeding import generator
from lm_saes.data.share import SharedStream
from lm_saes.data.stream import ActivationStream
from lm_saes.data.text import DatasetConfig, TextDataset, load_dataset
from lm_saes.data.writer import ActivationWriter
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.files import weight_files
from lm_saes.errors import CheckpointError
from lm_saes.evaluation.evaluator import EvalConfig, Evaluation, Evaluator, numbers, write_evaluation
from lm_saes.initializer import Initializer
from lm_saes.machine import keep_freed_memory
from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.load import load_language_model
from lm_saes.parallel.launch import alone, joined, n_started, note_begun, was_begun
from lm_saes.parallel.mesh import DeviceMesh, axes_of
from lm_saes.parallel.mesh import start as start_mesh
from lm_saes.report.report import write_report
from lm_saes.report.saved_run import SavedRun
from lm_saes.runs.preflight import check_first_batch, check_run
from lm_saes.runs.settings import (
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
from lm_saes.storage.files import check_writable, made, write_json
from lm_saes.storage.manifest import listed
from lm_saes.storage.provenance import versions
from lm_saes.trainer import Trainer
from lm_saes.training.checkpoint import STREAM, all_steps, find_checkpoint, put_back, read_json, read_run_id
from lm_saes.training.loggers import JsonlLogger, LoggedRun, Loggers
from lm_saes.training.resume import refuse_changes, refuse_older_run
from lm_saes.training.signals import stopping

log = logging.getLogger(__name__)

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
    sizes = settings.mesh_sizes
    with joined() as everyone:
        require_same(everyone, {"settings": settings.to_json(), "versions": versions()})
        if math.prod(sizes.values()) == n_started() == 1:
            return _train_on(settings, None, Axes())
        mesh = start_mesh(**sizes, device_type=settings.device_type)
        return _train_on(settings, mesh, axes_of(mesh))


def _train_on(settings: TrainSettings, mesh: DeviceMesh | None, axes: Axes) -> AbstractSparseAutoEncoder:
    run, is_first = Path(settings.trainer.exp_result_path), axes.everywhere.place == 0
    cfg = settings.sae.model_copy(update={"device": settings.device_type})
    check_run(settings, mesh, axes)
    again = any(exchange(axes.everywhere, was_begun(run)))
    source = by_first(axes.everywhere, lambda: _checkpoint(settings, run, again))
    start = None if source is None else Path(source)
    trainer_cfg = settings.trainer.model_copy(update={"from_pretrained_path": source})
    if start is None:
        Initializer(settings.initializer).check(cfg)
    read = [source.name for source in settings.activation_factory.dataset_sources]
    texts = _open({name: settings.datasets[name] for name in read})
    apart = _open(held_out(settings.datasets)) if settings.eval else {}
    model = None if settings.model is None else _load_model(settings.model, settings.device_type)
    trainer = Trainer(trainer_cfg)
    with (
        _stream(settings.activation_factory, settings.seed, model, texts) as whole,
        made(run, keep=lambda: start is not None or trainer.cur_step > 0) if is_first else nullcontext(),
    ):
        stream = whole if axes.tokens.size == 1 else SharedStream(whole, axes.tokens)
        if start is None:
            check_first_batch(stream, cfg, axes)
        elif (start / STREAM).exists():  # else the run's batches came from elsewhere
            stream.check_state(read_json(start / STREAM))
        note_begun(run)
        if is_first:
            write_json(run / "settings.json", settings.to_json())
        torch.manual_seed(generator(settings.seed, "initialisation").initial_seed())
        if start is None:
            sae = Initializer(settings.initializer).initialize_sae_from_config(
                cfg, stream, device_mesh=mesh, model=model
            )
        else:
            sae = AbstractSparseAutoEncoder.from_config(cfg, mesh)
        read_by = {} if model is None else model.provenance()
        if settings.model_name is not None:
            read_by["model_name"] = settings.model_name
        sae.provenance = {"name": settings.sae_name, "series": settings.sae_series, "model": read_by}
        evaluation = _HeldOut(settings.eval, model, apart) if settings.eval and model else None
        with stopping(trainer.stop):
            if start is not None:
                trainer.go_on_from(sae, start)
            loggers = _loggers(settings, run, start) if is_first else None
            ended_early = trainer.fit(sae, stream, eval_fn=evaluation, loggers=loggers)
    result: Evaluation = {}
    if evaluation:
        if ended_early or not evaluation.last:  # else the last step was evaluated
            evaluation(sae)
        result = evaluation.last
    sae.provenance |= {"metrics": numbers(result)}
    if is_first:
        if evaluation:
            write_evaluation(run, result)
        saved = listed(run)
        sae.save_provenance(run, {name: saved[name] for name in weight_files(run) if name in saved})
        write_report(run)
    return sae


class _HeldOut:
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
    with _stream(factory, 0, model, datasets) as stream:
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

    alone("generate")
    check_writable(settings.writer.cache_dir.absolute().parent, "writer.cache_dir")
    datasets = _open(settings.datasets)
    model = load_language_model(settings.model)
    bar = Progress(TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = bar.add_task("tokens", total=settings.writer.total_generating_tokens)

    def show(done: int, total: int | None) -> None:
        bar.start()  # not before there is a batch: until then, mistakes are told
        bar.update(task, completed=done, total=total)

    try:
        with _stream(settings.activation_factory, settings.seed, model, datasets) as stream:
            return ActivationWriter(settings.writer).process(stream, show)
    finally:
        if bar.live.is_started:
            bar.stop()


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
    apart = _open(held_out(datasets))
    result = evaluate_held_out(sae, cfg, load_language_model(model_cfg), apart)
    if is_run:
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


def _check_finite(sae: AbstractSparseAutoEncoder, path: Path) -> None:
    for name, parameter in sae.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite; give an earlier checkpoint")


def _load_model(cfg: LanguageModelConfig, device: str) -> LanguageModel:
    return load_language_model(cfg.model_copy(update={"device": device}) if device != "cpu" else cfg)


def _stream(
    cfg: ActivationFactoryConfig, seed: int, model: LanguageModel | None, datasets: Mapping[str, TextDataset]
) -> ActivationStream:
    data_seed = generator(seed, "data").initial_seed() >> 1
    return ActivationFactory(cfg, seed=data_seed).process(model=model, datasets=datasets)


def _open(datasets: Mapping[str, DatasetConfig]) -> dict[str, TextDataset]:
    return {name: load_dataset(cfg) for name, cfg in datasets.items()}


def _checkpoint(settings: TrainSettings, run: Path, again: bool) -> str | None:
    """The checkpoint to go on from; None for a new run, which must not overwrite another.

    Args:
        again: the processes were started again after a failure of this run.
    """
    path = settings.trainer.from_pretrained_path
    resumes = settings.resume or again
    if resumes:
        put_back(run)
    if again and all_steps(run):
        path = None  # where it was begun from is behind
    killed_early = resumes and (run / "settings.json").exists() and not all_steps(run)
    if path is None and (killed_early or not resumes):
        refuse_older_run(run)
        if killed_early:
            log.warning("%s: was stopped before its first checkpoint; it starts at step 0", run)
        return None
    start = find_checkpoint(run if path is None else path)
    refuse_older_run(run, start)
    refuse_changes(start, settings.sae, settings.trainer)
    return str(start)


def _loggers(settings: TrainSettings, run: Path, start: Path | None) -> Loggers:
    about = LoggedRun(run, settings.to_json(), None if start is None else read_run_id(start))
    return Loggers([JsonlLogger(run / "metrics.jsonl")], [cfg.make(about) for cfg in settings.chosen_loggers])
