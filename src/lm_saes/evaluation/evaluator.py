"""Measures a trained dictionary on held-out text: reconstruction, sparsity, downstream loss, examples.

Letters: B contexts, S tokens of a context, G hook points that are reconstructed, N tokens, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from lm_saes.axes.cuts import latent_numbers
from lm_saes.config import BaseConfig
from lm_saes.data.batch import Batch, check_batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import DataError
from lm_saes.evaluation.downstream import DownstreamLoss
from lm_saes.evaluation.examples import LatentExample, SnippetCollector
from lm_saes.evaluation.reconstruction import ReconstructionSums
from lm_saes.models.base import LanguageModel
from lm_saes.storage.files import write_text

Evaluation: TypeAlias = dict[str, float | list[float] | list[LatentExample]]
"""Numbers under their metric names, `"sparsity/frequency"` (one per latent) and `"latents"` (with snippets)."""


class EvalConfig(BaseConfig):
    """How much held-out text a dictionary is measured on, and how many examples are kept."""

    max_tokens: int = Field(default=32768, ge=1)
    """Valid held-out tokens that the reconstruction and sparsity metrics are measured on."""
    downstream_tokens: int = Field(default=8192, ge=0)
    """How many of those tokens, from the first, the language model reads again for the downstream metrics; 0 = none."""
    context_size: int = Field(default=256, ge=2)
    """Tokens in a held-out context, BOS included (at most what the model reads)."""
    batch_size: int = Field(default=8, ge=1)
    """Contexts that the language model reads at a time."""
    n_latents: int = Field(default=100, ge=0)
    """Latents shown with snippets, spread evenly over the ranks of firing frequency."""
    n_snippets: int = Field(default=5, ge=1)
    """Most activating snippets kept of each latent, each from another context."""
    snippet_context: int = Field(default=12, ge=0)
    """Tokens of a snippet on either side of its peak."""


class Evaluator:
    """Measures a dictionary on a stream of held-out contexts."""

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg

    @torch.no_grad()
    def evaluate(
        self, sae: AbstractSparseAutoEncoder, stream: Iterable[Batch], model: LanguageModel | None = None
    ) -> Evaluation:
        """Measure `sae` on the first `max_tokens` valid tokens of `stream`.

        The stream yields 2D batches; only valid tokens count, anywhere. Errors and norms are those of raw
        activations. Without `model` the downstream metrics are left out and snippets show token ids.
        Where processes share the latents, each gives the whole stream, and gets the whole result.

        Raises:
            DataError: a batch is not 2D or not what it should be, or the stream is empty.
        """
        was_training, axes = sae.training, sae.axes
        sae.eval().attach(axes.of_whole_batches())
        try:
            return self._evaluate(sae, stream, model)
        finally:
            sae.train(was_training).attach(axes)

    def _evaluate(
        self, sae: AbstractSparseAutoEncoder, stream: Iterable[Batch], model: LanguageModel | None
    ) -> Evaluation:
        measurement = _Measurement(self.cfg, sae, model)
        for batch in stream:
            check_batch(batch, sae.cfg.widths)
            measurement.add(batch)
            if measurement.n_tokens >= self.cfg.max_tokens:
                break
        if measurement.n_tokens == 0:
            raise DataError(
                "evaluation: the stream holds no valid token; give it held-out text (held_out_fraction > 0)"
            )
        return measurement.result()


class _Measurement:
    """What is known of a dictionary after some batches."""

    def __init__(self, cfg: EvalConfig, sae: AbstractSparseAutoEncoder, model: LanguageModel | None) -> None:
        self._cfg, self._sae, self._model = cfg, sae, model
        self._parameter = next(sae.parameters())
        self._own = latent_numbers(sae, sae.dead_shape, sae.cfg.device)
        d_sae = len(self._own) * sae.axes.latents.size
        self.n_tokens = 0
        """Valid tokens that were taken in."""
        self._reconstruction = ReconstructionSums()
        self._snippets = SnippetCollector(self._own, d_sae, cfg.n_snippets, cfg.snippet_context)
        self._fired = torch.zeros_like(self._own, dtype=torch.float64)
        self._active = torch.zeros((), dtype=torch.float64)
        self._downstream = DownstreamLoss(sae, model) if model is not None and cfg.downstream_tokens else None

    def add(self, raw: Batch) -> None:
        """Take in the valid tokens of a batch, up to `max_tokens` in all."""
        cfg, sae, seen = self._cfg, self._sae, self.n_tokens
        batch, tokens, valid = _prepared(raw, sae.cfg.associated_hook_points, self._parameter)
        if self._downstream is not None and seen < cfg.downstream_tokens:
            self._downstream.add(tokens, _first(cfg.downstream_tokens - seen, valid))
        mask = batch["mask"] = _first(cfg.max_tokens - seen, valid)
        record = sae.record(batch)
        self._fired += sae.latent_counts(record).flatten()
        self._active += record.counts.sum().item() / (record.code_sites if sae.averages_sites else 1)
        self._snippets.add(sae.latent_entries(record), tokens, mask)
        y = sae.prepare_label(batch)
        y_hat = sae.denormalize_activations(batch, record.reconstruction.view_as(y))
        chosen = mask.flatten().nonzero().squeeze(1)
        y_hat_GND, y_GND = (t.view(record.label.shape).index_select(1, chosen) for t in (y_hat, y))
        self._reconstruction.add(y_hat_GND, y_GND)
        self.n_tokens += len(chosen)

    def result(self) -> Evaluation:
        """What there is to tell; every process has to ask, after at least one token."""
        here = self._sae.axes.latents
        fired = here.join(self._fired)[here.join(self._own).argsort()]
        self._snippets.join(here)
        frequency = fired / self.n_tokens
        result: Evaluation = {
            "metrics/l0": float(here.total(self._active)) / self.n_tokens,
            "sparsity/silent": (fired == 0).double().mean().item(),
            "details/n_evaluated_tokens": float(self.n_tokens),
            **self._reconstruction.metrics(),
        }
        if self._downstream is not None:
            result |= self._downstream.metrics()
            result["details/n_downstream_positions"] = float(self._downstream.n_positions)
        result["sparsity/frequency"] = frequency.tolist()
        decode = self._model.decode_tokens if self._model is not None else _ids_as_text
        result["latents"] = self._snippets.examples(frequency, self._cfg.n_latents, decode)
        return result


def _prepared(batch: Batch, hook_points: Iterable[str], parameter: Tensor) -> tuple[Batch, Tensor, Tensor]:
    """The batch as the dictionary computes (device, dtype), its tokens, and its mask as bools."""
    tokens: Tensor = batch["tokens"].to(parameter.device)
    if tokens.ndim != 2:
        raise DataError(
            f"evaluation: tokens of shape {tuple(tokens.shape)}; contexts are needed, [batch, seq] (activations-2d)"
        )
    mask = batch.get("mask")
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    activations = {hook_point: batch[hook_point].to(parameter) for hook_point in hook_points}
    return {**activations, "tokens": tokens, "mask": valid}, tokens, valid


def _first(n: int, valid_BS: Tensor) -> Tensor:
    """`valid_BS` with only its first `n` true entries left."""
    return valid_BS & (valid_BS.flatten().cumsum(0).view_as(valid_BS) <= n)


def _ids_as_text(tokens: list[int]) -> list[str]:
    return [f"{token} " for token in tokens]


def numbers(result: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation that are single numbers: what loggers take."""
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def write_evaluation(run_dir: Path, result: Evaluation) -> None:
    """Write `evaluation.json` (the numbers; NaN as null) and `latents.json` (frequencies, examples) into `run_dir`."""
    metrics = {name: value if math.isfinite(value) else None for name, value in numbers(result).items()}
    latents = {"frequency": result["sparsity/frequency"], "latents": result["latents"]}
    write_text(run_dir / "evaluation.json", json.dumps(metrics, indent=2))
    write_text(run_dir / "latents.json", json.dumps(latents, ensure_ascii=False))
