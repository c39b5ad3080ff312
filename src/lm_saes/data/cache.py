"""Reading back a directory of activations that `ActivationWriter` wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lm_saes.config import BaseConfig, DType, build
from lm_saes.data.activity import Activity
from lm_saes.data.batch import Batch
from lm_saes.data.rows import copy_rows, take_rows
from lm_saes.data.seeding import permutation
from lm_saes.errors import ConfigError, DataError
from lm_saes.storage.files import inside, sha256

FORMAT_VERSION = 1
INDEX = "index.json"


class CacheShard(BaseConfig):
    """One file of a cache."""

    file: str
    """Its name inside the cache directory."""
    n_rows: int = Field(gt=0)
    """How many rows it holds: tokens (1D) or contexts (2D)."""
    n_tokens: int = Field(gt=0)
    """How many tokens of it count."""
    n_bytes: int = Field(gt=0)
    """The size of the file."""
    sha256: str
    """The hash of the file."""


class CacheIndex(BaseConfig):
    """What `index.json` says about a cache."""

    format_version: Literal[1]
    """The layout that this describes."""
    context_size: int | None = Field(gt=0)
    """Tokens in each context, for a cache of contexts; None for a cache of single tokens."""
    widths: dict[str, int]
    """Hook point -> size of its activations."""
    dtype: DType
    """The dtype of the activations."""
    n_rows: int = Field(gt=0)
    """Rows in all shards."""
    n_tokens: int = Field(gt=0)
    """Tokens that count, in all shards."""
    shards: list[CacheShard] = Field(min_length=1)
    """The files, in the order of the text."""
    settings: dict[str, Any]
    """What the cache was made with: a request for the same finds it complete."""
    versions: dict[str, str | None] = Field(default={})
    """The packages that it was made with."""


class ActivationCache:
    """A complete cache directory. Opening it checks that every shard is there; a shard's hash is checked on first use.

    Raises:
        DataError: no cache there, or a missing, torn or altered file; the message names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.index = _read_index(self.path)
        self._verified: set[int] = set()
        for shard in self.index.shards:
            file = self.path / shard.file
            if not file.is_file():
                raise DataError(f"cache {self.path}: {shard.file} is missing; {_REMEDY}")
            if (size := file.stat().st_size) != shard.n_bytes:
                raise DataError(f"cache {self.path}: {shard.file} has {size} bytes, not {shard.n_bytes}; {_REMEDY}")

    @property
    def fingerprint(self) -> str:
        """A hash of the whole content."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.index.shards).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        return {"cache": str(self.path), "fingerprint": self.fingerprint, "settings": self.index.settings}

    def bytes_per_token(self, hook_points: Sequence[str]) -> int:
        """Memory that one token takes, with its id."""
        return sum(self.index.widths.get(name, 0) for name in hook_points) * self.index.dtype.itemsize + 8

    def check(self, hook_points: Sequence[str], context_size: int | None, contexts: bool) -> None:
        """Raise if it lacks a hook point, or cannot give contexts (of `context_size`) where they are wanted."""
        for hook_point in hook_points:
            if hook_point not in self.index.widths:
                known = ", ".join(map(repr, self.index.widths))
                raise ConfigError(f"cache {self.path}: hook point {hook_point!r} is not in it; it has {known}")
        if contexts and self.index.context_size is None:
            raise ConfigError(
                f"cache {self.path}: holds single tokens, so target='activations-2d' cannot read it; "
                "use target='activations-1d', or generate the cache from an activations-2d stream"
            )
        if contexts and context_size not in (None, self.index.context_size):
            raise ConfigError(
                f"cache {self.path}: holds contexts of {self.index.context_size} tokens, but "
                f"context_size={context_size}; set it to {self.index.context_size}"
            )

    def read(self, shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of one shard, mapped into memory rather than read."""
        from safetensors import SafetensorError, safe_open

        entry = self.index.shards[shard]
        file = self.path / entry.file
        try:
            if shard not in self._verified:
                if sha256(file) != entry.sha256:
                    raise DataError(f"cache {self.path}: {entry.file} was altered (its hash differs); {_REMEDY}")
                self._verified.add(shard)
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise DataError(f"cache {self.path}: {entry.file} cannot be read ({error}); {_REMEDY}") from error
        for name, x in found.items():
            shape, dtype = self._layout(name, entry)
            if x.shape != shape or x.dtype != dtype:
                raise DataError(
                    f"cache {self.path}: {entry.file}: {name!r} is {x.dtype} {list(x.shape)}, but {INDEX} says {dtype} "
                    f"{list(shape)}; {_REMEDY}"
                )
        return found

    def _layout(self, name: str, shard: CacheShard) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype that a tensor of a shard has by the index."""
        rows = (shard.n_rows,) if self.index.context_size is None else (shard.n_rows, self.index.context_size)
        if name in self.index.widths:
            return (*rows, self.index.widths[name]), self.index.dtype
        return rows, torch.bool if name == "mask" else torch.int64


class CachedSource:
    """Rows of a cache: single tokens that count, or contexts with their masks.

    Without `shuffle` (seed and device), every epoch goes through the text in order. With it, each epoch has its own
    order: of the shards and of the rows in each; or, with `whole`, of all rows, which are then read into memory.
    Shuffled activations come in `dtype` (None: the cache's). With `whole`, pieces never cross a multiple of `piece`
    rows, counted over epochs, so that they are batches when `piece` is the batch size.
    """

    def __init__(
        self,
        cache: ActivationCache,
        hook_points: Sequence[str],
        *,
        contexts: bool,
        piece: int,
        epochs: int | None,
        place: int,
        shuffle: tuple[int, str | None] | None = None,
        whole: bool = False,
        dtype: torch.dtype | None = None,
        activity: Activity,
    ):
        self._cache = cache
        self._contexts = contexts
        self._has_contexts = cache.index.context_size is not None
        self._names = [*hook_points, "tokens", *(["mask"] if self._has_contexts else [])]
        self._piece = piece
        self._epochs = epochs
        self._place = place
        self._shuffle = shuffle
        self._whole = whole
        self._dtype = dtype
        self._activity = activity
        self._epoch = self._segment = self._row = 0
        self._loaded: tuple[int, dict[str, Tensor]] = (-1, {})
        self._order: tuple[tuple[int, int], Tensor | None] = ((-1, -1), None)

    def draw(self, limit: int) -> Batch | None:
        """The next rows, at most `limit`, or None after the last epoch."""
        with self._activity.doing("reading cached activations"):
            return self._draw(limit)

    def _draw(self, limit: int) -> Batch | None:
        while self._epochs is None or self._epoch < self._epochs:
            rows = self._load()
            n = rows["tokens"].shape[0]
            if not n:
                raise DataError(f"cache {self._cache.path}: a shard has no token that counts; {_REMEDY}")
            if self._row < n:
                past = (self._epoch * n + self._row) % self._piece if self._whole else 0
                end = min(n, self._row + min(limit, self._piece - past))
                order = self._order_of(n)
                start, self._row = self._row, end
                if order is None:
                    return {name: x[start:end] for name, x in rows.items()}
                return {name: take_rows(x, order[start:end], self._dtype) for name, x in rows.items()}
            self._row, self._segment = 0, self._segment + 1
            if self._segment == (1 if self._whole else len(self._cache.index.shards)):
                self._segment, self._epoch = 0, self._epoch + 1
        return None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "segment": self._segment, "row": self._row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._segment, self._row = state["epoch"], state["segment"], state["row"]

    def _order_of(self, n: int) -> Tensor | None:
        key = (self._epoch, self._segment)
        if self._shuffle and self._order[0] != key:
            seed, device = self._shuffle
            self._order = (key, permutation(n, seed, "rows", self._place, *key, device=device))
        return self._order[1]

    def _load(self) -> dict[str, Tensor]:
        """The rows of the present segment: a shard, or the whole cache."""
        shard = 0 if self._whole else self._shard()
        if self._loaded[0] != shard:
            self._loaded = (-1, {})
            self._loaded = (shard, self._read_whole() if self._whole else self._read(shard))
        return self._loaded[1]

    def _shard(self) -> int:
        if not self._shuffle:
            return self._segment
        seed, device = self._shuffle
        n = len(self._cache.index.shards)
        return int(permutation(n, seed, "shards", self._place, self._epoch, device=device)[self._segment])

    def _read(self, shard: int) -> dict[str, Tensor]:
        rows = self._cache.read(shard, self._names)
        if self._contexts or not self._has_contexts:
            return rows
        counts = rows.pop("mask").flatten().nonzero().squeeze(1)
        return {name: x.flatten(0, 1).index_select(0, counts) for name, x in rows.items()}

    def _read_whole(self) -> dict[str, Tensor]:
        index = self._cache.index
        n = index.n_rows if self._contexts else index.n_tokens
        whole: dict[str, Tensor] = {}
        start = 0
        for shard in range(len(index.shards)):
            rows = self._read(shard)
            for name, x in rows.items():
                if name not in whole:
                    whole[name] = torch.empty(n, *x.shape[1:], dtype=x.dtype)
                copy_rows(whole[name][start : start + x.shape[0]], x)
            start += rows["tokens"].shape[0]
        return whole


_REMEDY = "delete the directory and generate it again"


def _read_index(path: Path) -> CacheIndex:
    file = path / INDEX
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"cache {path}: no {INDEX} there; generate the activations first") from error
    except OSError as error:
        raise DataError(f"cache {path}: {INDEX} cannot be read ({error.strerror}); see to its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"cache {path}: {INDEX} is not valid JSON ({error}); {_REMEDY}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"cache {path}: {INDEX} has format_version={version!r}, not {FORMAT_VERSION}; {_REMEDY}")
    try:
        index = build(CacheIndex, data)
    except ConfigError as error:
        raise DataError(f"cache {path}: {INDEX}: {error}; {_REMEDY}") from error
    for shard in index.shards:
        try:
            inside(path, shard.file)
        except ValueError as error:
            raise DataError(f"cache {path}: {INDEX}: shard {error}; {_REMEDY}") from error
    if index.n_tokens != sum(shard.n_tokens for shard in index.shards):
        raise DataError(f"cache {path}: {INDEX} contradicts itself about n_tokens={index.n_tokens}; {_REMEDY}")
    return index
