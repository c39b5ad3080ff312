"""The settings of a stream of activations."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from lm_saes.config import BaseConfig, DType


class ActivationFactoryTarget(str, Enum):  # noqa: UP042 (str(member) of a StrEnum differs)
    """What a batch holds."""

    TOKENS = "tokens"
    ACTIVATIONS_2D = "activations-2d"
    ACTIVATIONS_1D = "activations-1d"


class BufferShuffleConfig(BaseConfig):
    """How single tokens (or cached rows) are shuffled."""

    perm_seed: int | None = None
    """Seed of the permutations; None: the run's seed."""
    generator_device: str | None = None
    """Device whose random generator draws the permutations; None: the CPU."""


class ActivationFactoryDatasetSource(BaseConfig):
    """Text that a language model reads."""

    type: Literal["dataset"] = "dataset"
    """Says that the source is a dataset."""
    name: str
    """Which dataset: its key in the settings' `datasets`."""
    sample_weights: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources, in tokens (masked ones included) or contexts."""
    is_dataset_tokenized: bool = False
    """True if the dataset's column holds token ids."""
    prepend_bos: bool = True
    """Put BOS before every document and at the start of every context (unless the model's own `prepend_bos` is off)."""
    epochs: int | None = Field(default=1, gt=0)
    """How often to go through it; None: without end. Every epoch has the same contexts in the same order."""
    pack: bool = True
    """True: documents are joined, a BOS before each, and cut into full contexts. False: one document a context,
    truncated and padded."""


class ActivationFactoryActivationsSource(BaseConfig):
    """Activations that `ActivationWriter` has written."""

    type: Literal["activations"] = "activations"
    """Says that the source is a cache directory."""
    path: Path
    """The cache directory."""
    name: str = ""
    """A label for people."""
    sample_weights: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources, in tokens or contexts."""
    epochs: int | None = Field(default=1, gt=0)
    """How often to go through it; None: without end. With shuffling, every epoch has its own order."""


Source = Annotated[ActivationFactoryDatasetSource | ActivationFactoryActivationsSource, Field(discriminator="type")]


class ActivationFactoryConfig(BaseConfig):
    """Which activations, from where, in what order and in what batches."""

    sources: list[Source] = Field(min_length=1)
    """Datasets and caches, mixed by `sample_weights` at random: context by context, or by as many cached rows."""
    target: ActivationFactoryTarget
    """`activations-1d`: single tokens, only those that count (no mask). `activations-2d`: contexts with a mask.
    `tokens`: contexts without activations."""
    hook_points: list[str] = Field(default=[])
    """The hook points whose activations a batch holds."""
    batch_size: int = Field(gt=0)
    """Tokens (1D) or contexts (2D) in a batch."""
    context_size: int | None = Field(default=None, gt=0)
    """Tokens in a context, BOS included; needed with a dataset."""
    model_batch_size: int = Field(default=1, gt=0)
    """Contexts in one forward pass of the language model (with contexts as target: at most `batch_size`)."""
    override_dtype: DType | None = None
    """The dtype of the activations in batches. None: float32. A shuffle buffer keeps the model's (or the cache's)
    dtype unless this one is smaller."""
    buffer_size: int | None = Field(default=None, gt=0)
    """Tokens held for shuffling (1D). None: the order of the text, unless `buffer_shuffle` shuffles caches. Where all
    sources are caches and fit into it, they are read into memory and shuffled perfectly instead, anew in each epoch."""
    buffer_shuffle: BufferShuffleConfig | None = None
    """Seed and device of shuffling; None: the run's seed. Without `buffer_size`: whole caches are shuffled in memory
    (1D), or the order of the shards and of the contexts in each (2D)."""
    ignore_token_ids: list[int] | None = None
    """Token ids that do not count. None: BOS, EOS and padding; a list replaces these, so `[]` counts BOS too. What is
    added as padding never counts."""
    num_workers: int = Field(default=4, ge=0)
    """Batches that one background thread keeps ready; 0: no thread, batches are made when they are asked for."""
    max_norm_ratio: float | None = Field(default=None, gt=0)
    """Tokens whose activations at any hook point have a norm above this many times the median norm of the tokens that
    count in their model batch do not count."""

    @property
    def dataset_sources(self) -> list[ActivationFactoryDatasetSource]:
        return [source for source in self.sources if isinstance(source, ActivationFactoryDatasetSource)]

    @model_validator(mode="after")
    def _check_combination(self, info: ValidationInfo) -> ActivationFactoryConfig:
        self._check_sources(info)
        match self.target:
            case ActivationFactoryTarget.TOKENS:
                reason = "target='tokens' makes no activations"
                fields = ["hook_points", "model_batch_size", "override_dtype", "max_norm_ratio"]
                self.refuse_without_effect([*fields, "buffer_size", "buffer_shuffle"], reason, info)
                if len(self.dataset_sources) < len(self.sources):
                    raise ValueError("target='tokens' reads datasets only; remove the sources of type 'activations'")
            case ActivationFactoryTarget.ACTIVATIONS_2D:
                self.refuse_without_effect(["buffer_size"], "only single tokens (activations-1d) are buffered", info)
                if len(self.dataset_sources) == len(self.sources):
                    reason = "contexts from a dataset are not shuffled"
                    self.refuse_without_effect(["buffer_shuffle"], reason, info)
            case ActivationFactoryTarget.ACTIVATIONS_1D:
                self._check_buffer()
        if self.target != ActivationFactoryTarget.TOKENS and not self.hook_points:
            raise ValueError(f"hook_points is empty; target={self.target.value!r} needs at least one")
        if len(set(self.hook_points)) < len(self.hook_points):
            raise ValueError("hook_points names a hook point twice; name each once")
        return self

    def _check_sources(self, info: ValidationInfo) -> None:
        if len(self.sources) == 1:
            self.sources[0].refuse_without_effect(["sample_weights"], "there is only one source", info)
        if self.dataset_sources:
            if self.context_size is None:
                raise ValueError("context_size is missing; a source of type 'dataset' needs it")
        else:
            fields = ["model_batch_size", "ignore_token_ids", "max_norm_ratio", "context_size"]
            self.refuse_without_effect(fields, "all sources are cached activations", info)

    def _check_buffer(self) -> None:
        if self.buffer_size is None:
            if self.buffer_shuffle is not None and self.dataset_sources:
                raise ValueError("buffer_shuffle needs buffer_size with a source of type 'dataset'; set it, in tokens")
        elif self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size={self.buffer_size} is below batch_size={self.batch_size}; make it larger")
