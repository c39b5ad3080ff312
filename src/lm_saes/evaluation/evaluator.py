"""Measures a trained dictionary on held-out text: reconstruction, sparsity, downstream loss, examples.

Letters: N tokens, d width of the activation, F latents.
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

from lm_saes.config import BaseConfig
from lm_saes.data.batch import Batch, check_batch
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import DataError
from lm_saes.evaluation.downstream import DownstreamLoss
from lm_saes.evaluation.examples import LatentExample, SnippetCollector
from lm_saes.models.base import LanguageModel
from lm_saes.parallel.sharding import latent_numbers
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
        cfg, here = self.cfg, sae.axes.latents
        parameter = next(sae.parameters())
        own = latent_numbers(sae)
        d_sae = len(own) * here.size
        sites = [_Reconstruction() for _ in sae.cfg.hook_points_written]
        reconstruction = sites[0]
        snippets = SnippetCollector(own, d_sae, cfg.n_snippets, cfg.snippet_context)
        fired = torch.zeros_like(own, dtype=torch.float64)
        active = torch.zeros((), dtype=torch.float64)
        downstream = DownstreamLoss(sae, model) if model is not None and cfg.downstream_tokens else None

        for raw in stream:
            seen = reconstruction.n_tokens
            check_batch(raw, sae.cfg.widths)
            batch, tokens, valid = _prepared(raw, sae.cfg.associated_hook_points, parameter)
            if downstream is not None and seen < cfg.downstream_tokens:
                downstream.add(tokens, _first(cfg.downstream_tokens - seen, valid))
            mask = batch["mask"] = _first(cfg.max_tokens - seen, valid)
            record = sae.record(batch)
            fired += sae.latent_counts(record).flatten()
            active += record.counts.sum().item() / (record.code_sites if sae.averages_sites else 1)
            snippets.add(sae.latent_entries(record), tokens, mask)
            y = sae.prepare_label(batch)
            y_hat = sae.denormalize_activations(batch, record.reconstruction.view_as(y))
            flat_mask = mask.flatten()
            for site, y_site, y_hat_site in zip(sites, *(t.view(record.label.shape) for t in (y, y_hat)), strict=True):
                site.add(y_hat_site[flat_mask], y_site[flat_mask])
            if reconstruction.n_tokens >= cfg.max_tokens:
                break

        n_tokens = reconstruction.n_tokens
        if n_tokens == 0:
            raise DataError(
                "evaluation: the stream holds no valid token; give it held-out text (held_out_fraction > 0)"
            )
        fired = here.join(fired)[here.join(own).argsort()]
        snippets.join(here)
        frequency = fired / n_tokens
        result: Evaluation = {
            "metrics/l0": float(here.total(active)) / n_tokens,
            "sparsity/silent": (fired == 0).double().mean().item(),
            "details/n_evaluated_tokens": float(n_tokens),
            **_averaged([site.metrics() for site in sites]),
        }
        if downstream is not None:
            result |= downstream.metrics()
            result["details/n_downstream_positions"] = float(downstream.n_positions)
        result["sparsity/frequency"] = frequency.tolist()
        decode = model.decode_tokens if model is not None else _ids_as_text
        result["latents"] = snippets.examples(frequency, cfg.n_latents, decode)
        return result


class _Reconstruction:
    """Float64 sums that the reconstruction metrics are made from: batches combine by addition.

    The variance is summed about the first token, which loses no digits where the mean is large against the spread.
    """

    def __init__(self) -> None:
        self.n_tokens = self.n_legacy = 0
        self.pivot: Tensor | None = None
        self.shifted: Tensor | float = 0.0
        self.squared_shifted = self.squared_error = self.label_norm = self.error_norm = self.legacy = 0.0

    def add(self, y_hat_Nd: Tensor, y_Nd: Tensor) -> None:
        """Take in the valid tokens of a batch."""
        if len(y_Nd) == 0:
            return
        y = y_Nd.double()
        self.pivot = y[0] if self.pivot is None else self.pivot
        shifted = y - self.pivot
        squared_error = (y_hat_Nd.double() - y).square().sum(-1)
        squared_distance = (y - y.mean(0)).square().sum(-1)
        apart = squared_distance > 0
        self.n_tokens += len(y)
        self.n_legacy += int(apart.sum())
        self.shifted = self.shifted + shifted.sum(0)
        self.squared_shifted += shifted.square().sum().item()
        self.squared_error += squared_error.sum().item()
        self.label_norm += y.norm(dim=-1).sum().item()
        self.error_norm += squared_error.sqrt().sum().item()
        self.legacy += (1 - squared_error[apart] / squared_distance[apart]).sum().item()

    def metrics(self) -> dict[str, float]:
        """The metrics so far; NaN where a denominator is zero."""
        variation = self.squared_shifted - torch.as_tensor(self.shifted).square().sum().item() / self.n_tokens
        return {
            "metrics/explained_variance": 1 - self.squared_error / (variation or math.nan),
            "metrics/explained_variance_legacy": self.legacy / (self.n_legacy or math.nan),
            "metrics/l2_norm_error": self.error_norm / self.n_tokens,
            "metrics/l2_norm_error_ratio": self.error_norm / (self.label_norm or math.nan),
        }


def _averaged(sites: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the hook points that are reconstructed."""
    return {name: sum(site[name] for site in sites) / len(sites) for name in sites[0]}


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
