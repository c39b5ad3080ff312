"""Writing a stream of activations to a cache directory, which appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lm_saes.axes.differences import first_difference
from lm_saes.config import BaseConfig, DType
from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.cache import FORMAT_VERSION, INDEX, ActivationCache, CacheIndex, CacheShard
from lm_saes.data.stream import ActivationStream
from lm_saes.errors import ConfigError, DataError
from lm_saes.storage.files import flush, fsync, made, remove
from lm_saes.storage.provenance import versions

_LOG = logging.getLogger(__name__)
_SHARD_BYTES = 128 * 2**20


class ActivationWriterConfig(BaseConfig):
    """What to write, and where."""

    cache_dir: Path
    """The directory to make. It may exist only if it is empty, or a cache made with the same settings (then kept)."""
    hook_points: list[str] = Field(min_length=1)
    """The hook points whose activations are written."""
    total_generating_tokens: int | None = Field(default=None, gt=0)
    """Stop after this many tokens that count; contexts are written whole. None: until the stream ends."""
    n_samples_per_chunk: int | None = Field(default=None, gt=0)
    """Rows in each file: tokens (1D) or contexts (2D). None: about 128 MiB."""
    dtype: DType | None = None
    """The dtype on disk; None is the stream's."""


class ActivationWriter:
    """Writes batches to `shard-*.safetensors` (one tensor per hook point, `tokens`, for contexts `mask`) and an index.

    Masked tokens of 1D batches, contexts that are masked altogether, and `meta` are left out. The files are drafted
    beside, flushed and renamed.
    """

    def __init__(self, cfg: ActivationWriterConfig):
        self.cfg = cfg

    def process(self, stream: Iterable[Batch], progress: Callable[[int, int | None], None] | None = None) -> Path:
        """Write `stream` and return the directory. A complete cache with the same settings is kept as it is.

        Args:
            stream: batches with `tokens` and every hook point. It is read only as far as needed.
            progress: called after each batch with the tokens written so far and `total_generating_tokens`.

        Raises:
            ConfigError: the directory holds something else, or a cache made with other settings.
            DataError: a batch is not what it should be, the disk is too small, or an existing cache is torn.
        """
        path = self.cfg.cache_dir.absolute()
        settings = self._settings(stream)
        if self._is_there(settings):
            _LOG.info("cache %s: complete and made with the same settings; kept as it is", path)
            return path
        draft = path.with_name(f".{path.name}.draft")
        with _reporting(path):
            remove(draft)
        with made(draft, keep=lambda: False):
            index = self._write(stream, draft, settings, progress)
            with _reporting(path):
                (draft / INDEX).write_text(json.dumps(index.to_json(), indent=1), encoding="utf-8")
                flush(draft)
                draft.rename(path)
                fsync(path.parent)
        return path

    def _settings(self, stream: Iterable[Batch]) -> dict[str, Any]:
        settings: dict[str, Any] = {"writer": self.cfg.to_json()}
        del settings["writer"]["cache_dir"]
        if isinstance(stream, ActivationStream):
            settings["stream"] = stream.origin()
        return json.loads(json.dumps(settings))

    def _is_there(self, settings: dict[str, Any]) -> bool:
        path = self.cfg.cache_dir
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return False
        if not (path / INDEX).is_file():
            raise ConfigError(f"cache_dir={str(path)!r} exists and is not a cache; choose another directory")
        theirs = ActivationCache(path).index.settings
        if difference := first_difference(theirs, settings):
            raise ConfigError(
                f"cache_dir={str(path)!r} was made with other settings ({difference}); "
                "delete it or choose another directory"
            )
        return True

    def _write(
        self,
        stream: Iterable[Batch],
        draft: Path,
        settings: dict[str, Any],
        progress: Callable[[int, int | None], None] | None,
    ) -> CacheIndex:
        total = self.cfg.total_generating_tokens
        shards: _Shards | None = None
        for batch in stream:
            if shards is None:
                shards = _Shards(self.cfg, draft, batch)
            shards.add(batch)
            if progress is not None:
                progress(shards.n_tokens, total)
            if total is not None and shards.n_tokens >= total:
                break
        if shards is None or not shards.n_tokens:
            raise DataError(
                f"cache_dir={str(self.cfg.cache_dir)!r}: the stream gave no tokens to write; see to ignore_token_ids"
            )
        if total is not None and shards.n_tokens < total:
            warnings.warn(f"the stream ended after {shards.n_tokens} of {total} tokens to generate", stacklevel=3)
        return shards.finish(settings)


@dataclass(frozen=True)
class _Layout:
    """What a row of the cache holds: a token, or a context of tokens."""

    widths: dict[str, int]
    """Of each hook point's activations."""
    context_size: int | None
    """Tokens of a row, where rows are contexts."""
    dtype: torch.dtype

    @classmethod
    def of(cls, cfg: ActivationWriterConfig, first: Batch) -> _Layout:
        """That of a stream, from its first batch.

        Raises:
            DataError: the batch lacks a hook point, or is not what it should be.
        """
        missing = [name for name in cfg.hook_points if not isinstance(first.get(name), Tensor)]
        if missing:
            raise DataError(f"batch: hook point {missing[0]!r} is missing; it has {', '.join(map(repr, first))}")
        widths = {name: int(first[name].shape[-1]) for name in cfg.hook_points}
        check_batch(first, widths)
        return cls(widths, _context_size(first), cfg.dtype or first[cfg.hook_points[0]].dtype)

    @property
    def row_bytes(self) -> int:
        """Size of a row on disk."""
        of_token = sum(self.widths.values()) * self.dtype.itemsize + 8
        return of_token if self.context_size is None else self.context_size * (of_token + 1)

    def room(self, n_rows: int) -> dict[str, Tensor]:
        """Tensors for so many rows."""
        shape = (n_rows,) if self.context_size is None else (n_rows, self.context_size)
        room = {name: torch.empty(*shape, width, dtype=self.dtype) for name, width in self.widths.items()}
        room["tokens"] = torch.empty(shape, dtype=torch.int64)
        return room if self.context_size is None else room | {"mask": torch.empty(shape, dtype=torch.bool)}


class _Shards:
    """Collects rows in tensors of one shard's size, filled in place, and writes them out."""

    def __init__(self, cfg: ActivationWriterConfig, directory: Path, first: Batch):
        self.n_tokens = 0
        self._cfg = cfg
        self._directory = directory
        self._written: list[CacheShard] = []
        self._filled = 0
        self._layout = layout = _Layout.of(cfg, first)
        self._size = cfg.n_samples_per_chunk or max(1, _SHARD_BYTES // layout.row_bytes)
        self._held = layout.room(self._size)
        if cfg.total_generating_tokens is not None:
            per_row = 1 if layout.context_size is None else _mask(first).sum().item() / first["tokens"].shape[0]
            self._check_space(int(cfg.total_generating_tokens / per_row * layout.row_bytes))

    def add(self, batch: Batch) -> None:
        check_batch(batch, self._layout.widths)
        if _context_size(batch) != self._layout.context_size:
            raise DataError(
                f"batch: 'tokens' has shape {list(batch['tokens'].shape)}; the first had contexts of "
                f"{self._layout.context_size}"
            )
        rows = self._rows(batch)
        start, n = 0, rows["tokens"].shape[0]
        while start < n:
            taken = min(n - start, self._size - self._filled)
            for name, held in self._held.items():
                held[self._filled : self._filled + taken].copy_(rows[name][start : start + taken])
            self._filled += taken
            start += taken
            if self._filled == self._size:
                self._write()

    def finish(self, settings: dict[str, Any]) -> CacheIndex:
        if self._filled:
            self._write()
        return CacheIndex(
            format_version=FORMAT_VERSION,
            context_size=self._layout.context_size,
            widths=self._layout.widths,
            dtype=self._layout.dtype,
            n_rows=sum(shard.n_rows for shard in self._written),
            n_tokens=self.n_tokens,
            shards=self._written,
            settings=settings,
            versions=versions(),
        )

    def _rows(self, batch: Batch) -> dict[str, Tensor]:
        """The rows to write: those that count (1D), whole contexts (2D), no more than are still wanted."""
        total = self._cfg.total_generating_tokens
        mask = _mask(batch)
        counts = mask.sum(-1) if self._layout.context_size else mask.to(torch.int64)
        wanted = counts > 0
        if total is not None:
            wanted &= counts.cumsum(0) - counts < total - self.n_tokens
        chosen = wanted.nonzero().squeeze(1)
        self.n_tokens += int(counts[chosen].sum())
        source = {**batch, "mask": mask}
        return {name: source[name].index_select(0, chosen) for name in self._held}

    def _write(self) -> None:
        from safetensors.torch import save

        self._check_space(self._filled * self._layout.row_bytes)
        tensors = {name: held[: self._filled] for name, held in self._held.items()}
        n_tokens = int(tensors["mask"].sum()) if self._layout.context_size else self._filled
        name = f"shard-{len(self._written):05d}.safetensors"
        content = save(tensors)
        with _reporting(self._cfg.cache_dir):
            (self._directory / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entry = CacheShard(file=name, n_rows=self._filled, n_tokens=n_tokens, n_bytes=len(content), sha256=digest)
        self._written.append(entry)
        self._filled = 0

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise DataError(
                f"cache_dir={str(self._cfg.cache_dir)!r}: needs {needed / 2**30:.3g} GiB, but the disk has "
                f"{free / 2**30:.3g} GiB free; lower total_generating_tokens, use a smaller dtype or another disk"
            )


def _context_size(batch: Batch) -> int | None:
    tokens = batch["tokens"]
    return tokens.shape[1] if tokens.ndim == 2 else None


def _mask(batch: Batch) -> Tensor:
    mask = batch.get("mask")
    return torch.ones_like(batch["tokens"], dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cache_dir={str(path)!r}: cannot be written ({error})") from error
