"""A training run, from its settings to its report."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lm_saes.axes.axis import Axes
from lm_saes.axes.together import exchange, require_same
from lm_saes.config import build
from lm_saes.data.seeding import generator
from lm_saes.data.share import SharedStream
from lm_saes.data.stream import ActivationStream
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.weight_files import weight_files
from lm_saes.evaluation.evaluator import Evaluation, numbers, write_evaluation
from lm_saes.initializer import Initializer
from lm_saes.machine import keep_freed_memory
from lm_saes.models.base import LanguageModel
from lm_saes.parallel.launch import joined, n_started, note_begun, was_begun
from lm_saes.parallel.mesh import DeviceMesh, axes_of
from lm_saes.parallel.mesh import start as start_mesh
from lm_saes.report.report import write_report
from lm_saes.runs.evaluate import HeldOut
from lm_saes.runs.preflight import check_first_batch, check_run
from lm_saes.runs.reading import open_model, open_stream, open_texts
from lm_saes.runs.settings import (
    TrainCLTSettings,
    TrainCrossCoderSettings,
    TrainLorsaSettings,
    TrainMOLTSettings,
    TrainSAESettings,
    TrainSettings,
    held_out,
    train_settings_class,
)
from lm_saes.storage.files import made, write_json
from lm_saes.storage.manifest import listed
from lm_saes.storage.provenance import versions
from lm_saes.trainer import Trainer
from lm_saes.training.checkpoint import STREAM, read_json, read_run_id
from lm_saes.training.loggers import JsonlLogger, LoggedRun, Loggers
from lm_saes.training.resume import where_to_begin
from lm_saes.training.signals import stopping

Stream = ActivationStream | SharedStream


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


def train_from_config(data: dict[str, Any], *, resume: bool = False) -> Path:
    """Train what a config file describes; returns the path of the report."""
    keep_freed_memory()
    sae = data.get("sae")
    sae_type = sae.get("sae_type", "sae") if isinstance(sae, dict) else "sae"
    settings = build(train_settings_class(sae_type), data | ({"resume": True} if resume else {}))
    _train(settings)
    return Path(settings.trainer.exp_result_path) / "report.html"


def _train(settings: TrainSettings) -> AbstractSparseAutoEncoder:
    sizes = settings.mesh_sizes
    with joined() as everyone:
        require_same(everyone, {"settings": settings.to_json(), "versions": versions()})
        if math.prod(sizes.values()) == n_started() == 1:
            return _train_on(settings, None, Axes())
        mesh = start_mesh(**sizes, device_type=settings.device_type)
        return _train_on(settings, mesh, axes_of(mesh))


def _train_on(settings: TrainSettings, mesh: DeviceMesh | None, axes: Axes) -> AbstractSparseAutoEncoder:
    """The run on this process, of those that the axes cut."""
    run, is_first = Path(settings.trainer.exp_result_path), axes.everywhere.place == 0
    check_run(settings, mesh, axes)
    again = any(exchange(axes.everywhere, was_begun(run)))
    start = where_to_begin(settings.trainer, settings.sae, axes.everywhere, resume=settings.resume, again=again)
    if start is None:
        Initializer(settings.initializer).check(settings.sae)
    texts = open_texts({name: settings.datasets[name] for name in _read_by(settings)})
    apart = open_texts(held_out(settings.datasets)) if settings.eval else {}
    model = open_model(settings.model, settings.device_type)
    trainer = Trainer(
        settings.trainer.model_copy(update={"from_pretrained_path": None if start is None else str(start)})
    )
    with (
        open_stream(settings.activation_factory, settings.seed, model, texts) as whole,
        _directory(run, trainer, start) if is_first else nullcontext(),
    ):
        stream = _checked(whole, settings, start, axes)
        note_begun(run)
        if is_first:
            write_json(run / "settings.json", settings.to_json())
        sae = _dictionary(settings, stream, start, mesh, model)
        evaluation = HeldOut(settings.eval, model, apart) if settings.eval and model else None
        with stopping(trainer.stop):
            if start is not None:
                trainer.go_on_from(sae, start)
            loggers = _loggers(settings, run, start) if is_first else None
            ended_early = trainer.fit(sae, stream, eval_fn=evaluation, loggers=loggers)
    if evaluation and (ended_early or not evaluation.last):  # else the last step was evaluated
        evaluation(sae)
    _conclude(run, sae, evaluation.last if evaluation else {}, is_first)
    return sae


def _read_by(settings: TrainSettings) -> list[str]:
    """The names of the texts that are trained on."""
    return [source.name for source in settings.activation_factory.dataset_sources]


def _directory(run: Path, trainer: Trainer, start: Path | None) -> AbstractContextManager[object]:
    """The run's directory, which a run that fails before its first step does not leave behind."""
    return made(run, keep=lambda: start is not None or trainer.cur_step > 0)


def _checked(whole: ActivationStream, settings: TrainSettings, start: Path | None, axes: Axes) -> Stream:
    """This process's share of the stream, looked at before anything is written."""
    stream = whole if axes.tokens.size == 1 else SharedStream(whole, axes.tokens)
    if start is None:
        check_first_batch(stream, settings.sae, axes)
    elif (start / STREAM).exists():  # else the run's batches came from elsewhere
        stream.check_state(read_json(start / STREAM))
    return stream


def _dictionary(
    settings: TrainSettings, stream: Stream, start: Path | None, mesh: DeviceMesh | None, model: LanguageModel | None
) -> AbstractSparseAutoEncoder:
    """The dictionary to train: fresh, or with weights still to be read from a checkpoint."""
    cfg = settings.sae.model_copy(update={"device": settings.device_type})
    torch.manual_seed(generator(settings.seed, "initialisation").initial_seed())
    if start is None:
        initializer = Initializer(settings.initializer)
        sae = initializer.initialize_sae_from_config(cfg, stream, device_mesh=mesh, model=model)
    else:
        sae = AbstractSparseAutoEncoder.from_config(cfg, mesh)
    read_by = {} if model is None else model.provenance()
    if settings.model_name is not None:
        read_by["model_name"] = settings.model_name
    sae.provenance = {"name": settings.sae_name, "series": settings.sae_series, "model": read_by}
    return sae


def _loggers(settings: TrainSettings, run: Path, start: Path | None) -> Loggers:
    about = LoggedRun(run, settings.to_json(), None if start is None else read_run_id(start))
    return Loggers([JsonlLogger(run / "metrics.jsonl")], [cfg.make(about) for cfg in settings.chosen_loggers])


def _conclude(run: Path, sae: AbstractSparseAutoEncoder, result: Evaluation, is_first: bool) -> None:
    """Note the evaluation, if there is one, with the dictionary and beside it, and write the report."""
    sae.provenance = (sae.provenance or {}) | {"metrics": numbers(result)}
    if is_first:
        if result:
            write_evaluation(run, result)
        saved = listed(run)
        sae.save_provenance(run, {name: saved[name] for name in weight_files(run) if name in saved})
        write_report(run)
