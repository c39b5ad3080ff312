"""Builds a stream of batches from its settings, a language model and datasets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from lm_saes import machine
from lm_saes.data.activity import Activity
from lm_saes.data.cache import ActivationCache, CachedSource
from lm_saes.data.contexts import ContextSource, check_context_size
from lm_saes.data.factory_config import (
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    BufferShuffleConfig,
)
from lm_saes.data.producers import ContextBatches, Producer, Reader, RowBatches, Rows, ShuffledRowBatches
from lm_saes.data.shuffle import ShuffleBuffer
from lm_saes.data.sources import Mixer, Source
from lm_saes.data.stream import ActivationStream
from lm_saes.data.text import TextDataset
from lm_saes.errors import ConfigError

if TYPE_CHECKING:
    from lm_saes.models.base import LanguageModel

_MIXED_ROWS = 128


class ActivationFactory:
    """Makes the stream that `cfg` describes; `seed` fixes how sources are mixed and shuffled."""

    def __init__(self, cfg: ActivationFactoryConfig, seed: int = 0):
        self.cfg = cfg
        self.seed = seed

    def process(
        self, model: LanguageModel | None = None, datasets: Mapping[str, TextDataset] | None = None
    ) -> ActivationStream:
        """Open the sources and return the stream; no batch is made yet.

        In 1D, a batch holds only tokens that count and has no mask; a short last batch is dropped unless it is the only
        one. In 2D it has a mask and `meta`. Batches are on the CPU, activations in float32 unless `override_dtype` is
        set.

        Args:
            model: needed with a dataset.
            datasets: the datasets by the names that the sources use.

        Raises:
            ConfigError: a model, dataset or hook point is missing, or sizes do not fit.
            DataError: a cache is missing or torn.
        """
        return _Assembly(self.cfg, self.seed, model, datasets or {}).stream()


class _Assembly:
    """One call of `process`."""

    def __init__(
        self,
        cfg: ActivationFactoryConfig,
        seed: int,
        model: LanguageModel | None,
        datasets: Mapping[str, TextDataset],
    ):
        self.cfg = cfg
        self.seed = seed
        self.model = model
        self.datasets = datasets
        self.activity = Activity()
        self.single_tokens = cfg.target == ActivationFactoryTarget.ACTIVATIONS_1D
        self.caches = {
            i: ActivationCache(source.path)
            for i, source in enumerate(cfg.sources)
            if isinstance(source, ActivationFactoryActivationsSource)
        }
        shuffle = cfg.buffer_shuffle or BufferShuffleConfig()
        self.shuffle_seed = seed if shuffle.perm_seed is None else shuffle.perm_seed
        self.shuffle_device = shuffle.generator_device
        if self.shuffle_device is not None:
            machine.check_device(self.shuffle_device, "activation_factory.buffer_shuffle.generator_device")
        self.shuffles = cfg.buffer_size is not None or cfg.buffer_shuffle is not None
        self.whole = self.single_tokens and self.shuffles and not cfg.dataset_sources and self._fits()

    def stream(self) -> ActivationStream:
        cfg = self.cfg
        self._check_model()
        for cache in self.caches.values():
            cache.check(cfg.hook_points, cfg.context_size, contexts=not self.single_tokens)
        self._check_widths()
        sources = [self._source(i, source) for i, source in enumerate(cfg.sources)]
        mixer = Mixer(sources, [source.sample_weights for source in cfg.sources], self.seed)
        model = self.model if cfg.dataset_sources else None
        reader = Reader(mixer, model, cfg.hook_points, cfg.model_batch_size, self.activity, cfg.max_norm_ratio)
        origins = [self._origin(i) for i in range(len(cfg.sources))]
        settings = cfg.to_json() | {"seed": self.seed}
        provenance = {
            "factory": settings,
            "model": None if model is None else model.provenance(),
            "sources": origins,
        }
        identity = _identity(settings, origins, provenance["model"])
        return ActivationStream(self._producer(reader), cfg.num_workers, identity, provenance, self.activity)

    def _producer(self, reader: Reader) -> Producer:
        cfg = self.cfg
        dtype = cfg.override_dtype or torch.float32
        if not self.single_tokens:
            return ContextBatches(reader, cfg.batch_size, dtype)
        kept = self._kept_dtype()
        rows = Rows(reader, kept)
        if cfg.buffer_size is None or self.whole:
            return RowBatches(rows, cfg.batch_size, dtype)
        buffer = ShuffleBuffer(cfg.buffer_size, cfg.batch_size, kept, self.shuffle_seed, self.shuffle_device)
        return ShuffledRowBatches(rows, buffer, cfg.batch_size, dtype, self.activity)

    def _source(
        self, place: int, source: ActivationFactoryDatasetSource | ActivationFactoryActivationsSource
    ) -> Source:
        cfg = self.cfg
        if isinstance(source, ActivationFactoryActivationsSource):
            return CachedSource(
                self.caches[place],
                cfg.hook_points,
                contexts=not self.single_tokens,
                piece=self._piece(),
                epochs=source.epochs,
                place=place,
                shuffle=(self.shuffle_seed, self.shuffle_device) if self.shuffles else None,
                whole=self.whole,
                dtype=(cfg.override_dtype or torch.float32) if self.whole else None,
                activity=self.activity,
            )
        if source.name not in self.datasets:
            known = ", ".join(map(repr, self.datasets)) or "none"
            raise ConfigError(f"sources.{place}.name={source.name!r} is not among the datasets given ({known})")
        if self.model is None or cfg.context_size is None:
            raise ConfigError(f"sources.{place} is a dataset, which needs a language model and context_size")
        prepend_bos = source.prepend_bos and self.model.cfg.prepend_bos
        check_context_size(cfg.context_size, prepend_bos, self.model)
        return ContextSource(
            self.datasets[source.name],
            self.model,
            name=source.name,
            size=cfg.context_size,
            pack=source.pack,
            prepend_bos=prepend_bos,
            is_tokenized=source.is_dataset_tokenized,
            epochs=source.epochs,
            ignore_token_ids=self._ignored(self.model),
            activity=self.activity,
        )

    def _piece(self) -> int:
        """Rows of a cache drawn at a time: a batch from a single source, else as many as a dataset's context has."""
        if len(self.cfg.sources) == 1:
            return self.cfg.batch_size
        return (self.cfg.context_size or _MIXED_ROWS) if self.single_tokens else 1

    def _ignored(self, model: LanguageModel) -> frozenset[int]:
        if self.cfg.ignore_token_ids is not None:
            return frozenset(self.cfg.ignore_token_ids)
        special = (model.bos_token_id, model.eos_token_id, model.pad_token_id)
        return frozenset(token for token in special if token is not None)

    def _fits(self) -> bool:
        """Whether the caches are to be shuffled as a whole, in memory."""
        if self.cfg.buffer_size is not None:
            return sum(cache.index.n_tokens for cache in self.caches.values()) <= self.cfg.buffer_size
        needed = sum(
            cache.bytes_per_token(self.cfg.hook_points) * cache.index.n_tokens for cache in self.caches.values()
        )
        memory = machine.memory_bytes()
        if needed > machine.MEMORY_SHARE * memory:
            raise ConfigError(
                f"buffer_size=None with buffer_shuffle: the caches need {needed / 2**30:.3g} of "
                f"{memory / 2**30:.3g} GiB of memory; set buffer_size, the tokens to hold at a time"
            )
        return True

    def _kept_dtype(self) -> torch.dtype:
        """The smallest dtype that loses nothing on the way from the sources to the batch."""
        dtypes = [cache.index.dtype for cache in self.caches.values()]
        if self.model is not None and self.cfg.dataset_sources:
            dtypes.append(self.model.dtype)
        kept = reduce(torch.promote_types, dtypes)
        override = self.cfg.override_dtype
        return override if override is not None and override.itemsize <= kept.itemsize else kept

    def _check_model(self) -> None:
        if not self.cfg.dataset_sources:
            return
        if self.model is None:
            raise ConfigError("a source of type 'dataset' needs a language model; give process() one")
        self.model.check_hook_points(self.cfg.hook_points)

    def _check_widths(self) -> None:
        widths: dict[str, int] = {}
        if self.model is not None and self.cfg.dataset_sources:
            widths = {hook_point: self.model.width(hook_point) for hook_point in self.cfg.hook_points}
        for cache in self.caches.values():
            for hook_point in self.cfg.hook_points:
                seen = cache.index.widths[hook_point]
                if widths.setdefault(hook_point, seen) != seen:
                    raise ConfigError(
                        f"cache {cache.path}: hook point {hook_point!r} has width {seen}, another source has "
                        f"{widths[hook_point]}; mix sources of one model only"
                    )

    def _origin(self, place: int) -> dict[str, Any]:
        source = self.cfg.sources[place]
        if isinstance(source, ActivationFactoryActivationsSource):
            return self.caches[place].provenance()
        return self.datasets[source.name].provenance()


def _identity(settings: dict[str, Any], origins: list[dict[str, Any]], model: dict[str, str] | None) -> dict[str, Any]:
    """What has to agree for a saved position to mean the same; not where files lie, nor how far the thread is ahead."""
    read_by = {key: model.get(key) for key in ("sha256", "revision", "dtype", "backend")} if model else None
    settings = {key: value for key, value in settings.items() if key != "num_workers"}
    sources = [{key: value for key, value in source.items() if key != "path"} for source in settings["sources"]]
    data = [{key: origin.get(key) for key in ("fingerprint", "documents")} for origin in origins]
    return settings | {"sources": sources, "data": data, "model": read_by}
