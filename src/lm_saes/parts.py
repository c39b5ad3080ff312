"""Tensors in parts: folders `NAME.dcp/`, into which each process writes what it holds, and each reads its own.

The format is that of torch's distributed checkpoint with safetensors storage, which can read it: every file is a
safetensors file that holds at most one part of a tensor, under the tensor's name, and says in its header where in the
tensor that part begins.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_saes.errors import CheckpointError
from lm_saes.latents.axis import ALONE, Axes, Axis
from lm_saes.tensors import save_tensors

_BEGINS, _BEGIN = "DCP_SHARDING_INFO", "saved_offsets"
"""Where the headers of torch's distributed checkpoint say where parts begin."""


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut along an axis: every run of a dimension evenly."""

    dim: int
    runs: tuple[int, ...]
    """Lengths of the runs, which follow each other, in the whole tensor."""
    axis: Axis

    def spans(self) -> list[tuple[int, int]]:
        """Beginning and length, in the whole dimension, of the stretches that are this process's part."""
        place, n = self.axis.place, self.axis.size
        if n == 1:
            return [(0, sum(self.runs))]
        begins = itertools.accumulate(self.runs, initial=0)
        return [(begin + place * (run // n), run // n) for begin, run in zip(begins, self.runs, strict=False)]

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor."""
        return torch.cat([whole.narrow(self.dim, begin, length) for begin, length in self.spans()], self.dim)


Held = tuple[Tensor, Cut | None]
"""What a process holds of a tensor, and how that is cut from the whole (None: it is the whole)."""


def write_parts(
    folder: Path, held: Mapping[str, Held], axes: Axes, metadata: Mapping[str, str] | None = None
) -> list[Path]:
    """Write what this process is to write of tensors (what several hold alike, one of them writes); the files."""
    folder.mkdir(exist_ok=True)
    files: list[dict[str, Tensor]] = []
    begins: list[dict[str, Any]] = []
    for i, (name, (tensor, cut)) in enumerate(sorted(held.items(), key=_largest_first)):
        alike = _who_holds_the_same(cut, axes)
        if i % alike.size != alike.place:
            continue
        for number, (begin, part) in enumerate(_pieces(tensor, cut)):
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


def _who_holds_the_same(cut: Cut | None, axes: Axes) -> Axis:
    if cut is None or cut.axis.size == 1:
        return axes.everywhere
    if cut.axis is axes.everywhere:
        return ALONE
    return axes.tokens if cut.axis is axes.latents else axes.latents


def _pieces(tensor: Tensor, cut: Cut | None) -> Iterator[tuple[list[int], Tensor]]:
    if cut is None:
        yield [0] * tensor.ndim, tensor
        return
    spans = cut.spans()
    for (begin, _), piece in zip(spans, tensor.split([length for _, length in spans], cut.dim), strict=True):
        yield [begin if i == cut.dim else 0 for i in range(tensor.ndim)], piece


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

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """A tensor, or this process's part of it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: has no {name!r}; go on from another checkpoint")
        shape = self.shapes[name]
        if cut is None:
            return self.box(name, [0] * len(shape), shape)
        boxes = [
            self.box(name, _with([0] * len(shape), cut.dim, begin), _with(shape, cut.dim, length))
            for begin, length in cut.spans()
        ]
        return boxes[0] if len(boxes) == 1 else torch.cat(boxes, cut.dim)

    def box(self, name: str, begin: Sequence[int], size: Sequence[int]) -> Tensor:
        """The entries of a tensor from `begin` on, `size` of them in each dimension."""
        if not begin:
            return self._parts[name][0].file.get_tensor(name).clone()
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
