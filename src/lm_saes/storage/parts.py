"""Tensors in parts: folders `NAME.dcp/`, into which each process writes what it holds, and each reads its own.

The format is that of torch's distributed checkpoint with safetensors storage, which can read it: every file is a
safetensors file that holds at most one part of a tensor, under the tensor's name, and says in its header where in the
tensor that part begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.axes.cuts import Cut, Held
from lm_saes.errors import CheckpointError
from lm_saes.storage.tensors import save_tensors

_BEGINS, _BEGIN = "DCP_SHARDING_INFO", "saved_offsets"
"""Where the headers of torch's distributed checkpoint say where parts begin."""


def write_parts(
    folder: Path, held: Mapping[str, Held], axes: Axes, metadata: Mapping[str, str] | None = None
) -> list[Path]:
    """Write what this process is to write of tensors (what several hold alike, one of them writes); the files."""
    folder.mkdir(exist_ok=True)
    files: list[dict[str, Tensor]] = []
    begins: list[dict[str, Any]] = []
    for i, (name, (tensor, cuts)) in enumerate(sorted(held.items(), key=_largest_first)):
        place, n = _among_those_alike(cuts, axes)
        if i % n != place:
            continue
        for number, (begin, part) in enumerate(_pieces(tensor, cuts)):
            if number == len(files):
                files.append({})
                begins.append({})
            files[number][name], begins[number][name] = part, {_BEGIN: begin}
    shard = f"shard-{axes.everywhere.place + 1:05d}"
    paths = [folder / f"{shard}-model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    for path, tensors, begin in zip(paths, files, begins, strict=True):
        save_tensors(tensors, path, {_BEGINS: json.dumps(begin), **(metadata or {})})
    return paths


def _largest_first(item: tuple[str, Held]) -> tuple[int, str]:
    name, (tensor, _) = item
    return -tensor.nbytes, name


def _among_those_alike(cuts: Sequence[Cut], axes: Axes) -> tuple[int, int]:
    """This process's place among those that hold the same of a tensor, and how many these are."""
    cut_along = [cut.axis for cut in cuts]
    place, n = 0, 1
    for axis in (axes.tokens, axes.sites, axes.latents):
        wider = [axes.everywhere] if axis is axes.sites else [axes.batch, axes.everywhere]
        if not any(cut is one for cut in cut_along for one in (axis, *wider)):
            place, n = place * axis.size + axis.place, n * axis.size
    return place, n


def _pieces(tensor: Tensor, cuts: Sequence[Cut]) -> list[tuple[list[int], Tensor]]:
    """What a process holds, in pieces that each are one box of the whole tensor, and where these begin."""
    pieces = [([0] * tensor.ndim, tensor)]
    for cut in cuts:
        begins, lengths = zip(*cut.spans(), strict=True)
        pieces = [
            (_with(corner, cut.dim, begin), part)
            for corner, piece in pieces
            for begin, part in zip(begins, piece.split(lengths, cut.dim), strict=True)
        ]
    return pieces


@dataclass(frozen=True)
class _Part:
    file: Any
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(begin + n for begin, n in zip(self.begin, self.shape, strict=True))


class Parts:
    """The tensors of a folder of parts, or of one safetensors file, read as far as they are asked for."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            CheckpointError: there are none, they cannot be read, or some are missing.
        """
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the whole tensors."""
        self._parts: dict[str, list[_Part]] = {}
        self._files = ExitStack()
        paths = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not paths:
            raise CheckpointError(f"{self.path}: holds no safetensors files; restore them")
        for file in paths:
            self._open(file)
        for name, parts in self._parts.items():
            if len({(part.dtype, len(part.shape)) for part in parts}) == 1:
                self.shapes[name] = tuple(map(max, zip(*(part.end for part in parts), strict=True)))
            if sum(math.prod(part.shape) for part in parts) != math.prod(self.shapes.get(name, (0,))):
                raise CheckpointError(f"{self.path}: the parts of {name} do not make up one tensor; restore its files")

    def _open(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            metadata = file.metadata() or {}
            begins = json.loads(metadata.pop(_BEGINS, "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                here = file.get_slice(name)
                shape = tuple(here.get_shape())
                begin = begins[name][_BEGIN] if begins else [0] * len(shape)
                if len(begin) != len(shape) or not all(type(number) is int and number >= 0 for number in begin):
                    raise ValueError(f"{name} begins at {begin}")
                self._parts.setdefault(name, []).append(_Part(file, tuple(begin), shape, here.get_dtype()))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); restore the file") from error
        self.metadata |= metadata

    def read(self, name: str, cuts: Sequence[Cut] = ()) -> Tensor:
        """A tensor, or this process's part of it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: has no {name!r}; go on from another checkpoint")
        return self._read(name, [0] * len(self.shapes[name]), list(self.shapes[name]), cuts)

    def _read(self, name: str, begin: list[int], size: list[int], cuts: Sequence[Cut]) -> Tensor:
        if not cuts:
            return self.box(name, begin, size)
        dim = cuts[0].dim
        parts = [
            self._read(name, _with(begin, dim, first), _with(size, dim, length), cuts[1:])
            for first, length in cuts[0].spans()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def box(self, name: str, begin: Sequence[int], size: Sequence[int]) -> Tensor:
        """The entries of a tensor from `begin` on, `size` of them in each dimension."""
        if not begin:
            return self._parts[name][0].file.get_tensor(name).clone()
        if self._parts[name][0].shape == self.shapes[name] == tuple(size):  # mapped, not copied
            return self._parts[name][0].file.get_tensor(name)
        out = torch.zeros(tuple(size), dtype=self.dtype(name))
        for part in self._parts[name]:
            low = [max(pair) for pair in zip(begin, part.begin, strict=True)]
            high = [min(a + n, end) for a, n, end in zip(begin, size, part.end, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here, there = _box(low, high, begin), _box(low, high, part.begin)
                out[here] = part.file.get_slice(name)[there]
        return out

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor's entries."""
        file = self._parts[name][0].file
        return (file.get_slice(name)[:0] if self.shapes[name] else file.get_tensor(name)).dtype

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._files.close()


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _with(numbers: Sequence[int], place: int, number: int) -> list[int]:
    return [number if i == place else other for i, other in enumerate(numbers)]
