"""One file from the parts of a dictionary, in the memory of a block."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.weight_files import (
    CONFIG,
    OPTIONAL_KEYS,
    PROVENANCE,
    SHARDS,
    WEIGHTS,
    check_fit,
    shards_to_check,
)
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.storage.files import drafted
from lm_saes.storage.manifest import MANIFEST, check_file, listed, write_manifest
from lm_saes.storage.parts import Parts

BLOCK = 16 * 2**20
"""Bytes that are read and written at a time."""


def export(directory: str | Path, out: str | Path | None = None, block: int = BLOCK) -> Path:
    """Write the one safetensors file that `save_pretrained` of one process would write, from `sae_weights.dcp/`.

    Args:
        directory: of a checkpoint, a run or a saved dictionary.
        out: the file; None: `sae_weights.safetensors` in the directory. Elsewhere it gets config, provenance and
            manifest beside it.

    Returns:
        The file.

    Raises:
        CheckpointError: there are no parts, or they are not as they were saved.
        ConfigError: beside `out` lies another dictionary.
    """
    source = Path(directory)
    target = Path(out) if out is not None else source / WEIGHTS
    if not (source / SHARDS).is_dir():
        raise CheckpointError(f"{source}: holds no {SHARDS}; give the directory of a run or step of several processes")
    there = target.parent.resolve() == source.resolve()
    copied = [] if there else [name for name in (CONFIG, PROVENANCE) if (source / name).exists()]
    for name in copied:
        beside = target.parent / name
        if beside.exists() and beside.read_bytes() != (source / name).read_bytes():
            raise ConfigError(f"--out {target}: beside it lies another {name}; name a file in a directory of its own")
    for name in [CONFIG, *shards_to_check(source)]:
        check_file(source, name)
    with Parts(source / SHARDS) as parts:
        _check_complete(BaseSAEConfig.read(source), parts)
        with drafted(target) as draft:
            try:
                _write(parts, draft, block)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from error
    for name in copied:
        shutil.copyfile(source / name, target.parent / name)
    if not there:
        write_manifest(target.parent, [*copied, target.name])
    elif (source / MANIFEST).exists():
        known = {name: said for name, said in listed(source).items() if name != target.name}
        write_manifest(source, [*known, target.name], known)
    return target


def _check_complete(cfg: BaseSAEConfig, parts: Parts) -> None:
    with torch.device("meta"):
        own = AbstractSparseAutoEncoder.kind_of(cfg)(cfg).full_state_dict()
    given = {name: torch.empty(shape, device="meta") for name, shape in parts.shapes.items() if name in own}
    check_fit(own, given, strict=True, optional=OPTIONAL_KEYS)


def _write(parts: Parts, path: Path, block: int) -> None:
    """The safetensors format: length of the header, header, then all data in the header's order."""
    with path.open("wb") as file:
        header, names = _header(parts)
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            for begin, size in boxes(parts.shapes[name], block // parts.dtype(name).itemsize):
                entries = parts.box(name, begin, size).contiguous()
                file.write(entries.view(-1).view(torch.uint8).numpy().data)


def _header(parts: Parts) -> tuple[bytes, list[str]]:
    """What the library writes for empty tensors of the same names and types, with the true shapes and places."""
    empty = save({name: torch.empty(0, dtype=parts.dtype(name)) for name in parts.shapes}, parts.metadata or None)
    header, end = json.loads(empty[8:]), 0
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        shape = parts.shapes[name]
        begin, end = end, end + math.prod(shape) * parts.dtype(name).itemsize
        header[name] |= {"shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), names


def boxes(shape: Sequence[int], limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """Beginnings and sizes of boxes of at most `limit` entries (or one) that a tensor's entries are, in order."""
    if not shape:
        yield [], []
        return
    inner = math.prod(shape[1:])
    if inner > limit:
        for i in range(shape[0]):
            yield from (([i, *begin], [1, *size]) for begin, size in boxes(shape[1:], limit))
        return
    rows = max(1, limit // max(1, inner))
    for i in range(0, shape[0], rows):
        yield [i, *[0] * (len(shape) - 1)], [min(rows, shape[0] - i), *shape[1:]]
