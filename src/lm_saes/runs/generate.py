"""Generation: the activations of a language model reading text, kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_saes.config import build
from lm_saes.data.writer import ActivationWriter
from lm_saes.machine import keep_freed_memory
from lm_saes.models.load import load_language_model
from lm_saes.parallel.launch import alone
from lm_saes.runs.reading import open_stream, open_texts
from lm_saes.runs.settings import GenerateActivationsSettings
from lm_saes.storage.files import check_writable


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
    datasets = open_texts(settings.datasets)
    model = load_language_model(settings.model)
    bar = Progress(TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = bar.add_task("tokens", total=settings.writer.total_generating_tokens)

    def show(done: int, total: int | None) -> None:
        bar.start()  # not before there is a batch: until then, mistakes are told
        bar.update(task, completed=done, total=total)

    try:
        with open_stream(settings.activation_factory, settings.seed, model, datasets) as stream:
            return ActivationWriter(settings.writer).process(stream, show)
    finally:
        if bar.live.is_started:
            bar.stop()


def generate_from_config(data: dict[str, Any]) -> Path:
    """Generate what a config file describes; returns the cache directory."""
    keep_freed_memory()
    return generate_activations(build(GenerateActivationsSettings, data))
