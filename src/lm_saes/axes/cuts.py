"""How tensors are cut among processes: along latents, and heads, as the `dim_maps` of whoever holds them say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lm_saes.axes.axis import Axes, Axis
from lm_saes.errors import CheckpointError

DATA, HEAD, MODEL = "data", "head", "model"
"""What a mesh calls the dimensions along which batches, a crosscoder's heads, and latents are cut."""
OF_LATENTS = {MODEL: -1}
"""The `dim_maps` entry of statistics of latents."""


class Divided(Protocol):
    """What says how its tensors are cut: a dictionary."""

    axes: Axes

    @property
    def latent_runs(self) -> list[int]:
        """The stretches of the latents that are each cut evenly."""
        ...

    def file_dim_maps(self) -> Mapping[str, Mapping[str, int]]:
        """Which dimension of each tensor in files is cut along which axis."""
        ...


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


Held = tuple[Tensor, tuple[Cut, ...]]
"""What a process holds of a tensor, and how that is cut from the whole (not at all: it is the whole)."""


def runs_of(dictionary: Divided, size: int) -> list[int]:
    """The stretches of a dimension of `size` latents (of all processes) that are each cut evenly."""
    runs = dictionary.latent_runs
    return runs if size == sum(runs) else [size]


def own_part(dictionary: Divided, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of whole tensors, by their names in files, that belong to this process."""
    maps, parts = dictionary.file_dim_maps(), dict(whole)
    for name, tensor in whole.items():
        for cut in cuts_of(dictionary, maps.get(name, {}), tensor.shape):
            parts[name] = cut.part(parts[name])
    return parts


def latent_numbers(dictionary: Divided, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """The number, among all, of each latent of this process, whose statistics have this shape (flattened)."""
    n = dictionary.axes.latents.size
    numbers = torch.arange(math.prod(shape) * n, device=device).view(*shape[:-1], -1)
    for cut in cuts_of(dictionary, OF_LATENTS, numbers.shape):
        numbers = cut.part(numbers)
    return numbers.flatten()


def cuts_of(dictionary: Divided, dims: Mapping[str, int], shape: Sequence[int]) -> tuple[Cut, ...]:
    """How a tensor of a shape is cut along the axes of a mesh, of each of which `dims` names the dimension.

    Raises:
        CheckpointError: it cannot be.
    """
    cuts = []
    for along, dim in dims.items():
        axis = axis_along(dictionary, along)
        if not shape or axis.size == 1:
            continue
        runs = runs_along(dictionary, along, shape[dim])
        if any(run % axis.size for run in runs):
            raise CheckpointError(f"a tensor of shape {tuple(shape)} cannot be cut for {axis.size} processes: {runs}")
        cuts.append(Cut(dim % len(shape), tuple(runs), axis))
    return tuple(cuts)


def held(dictionary: Divided, tensors: Mapping[str, Tensor], maps: Mapping[str, Mapping[str, int]]) -> dict[str, Held]:
    """This process's tensors, and how they are cut from the whole, by their `dim_maps` (of those that have one)."""
    found = dict[str, Held]()
    for name, tensor in tensors.items():
        dims, shape = maps.get(name, {}), list(tensor.shape)
        for along, dim in dims.items() if shape else ():
            shape[dim] *= axis_along(dictionary, along).size
        found[name] = tensor, cuts_of(dictionary, dims, shape)
    return found


def axis_along(dictionary: Divided, along: str) -> Axis:
    """The axis that a `dim_maps` entry names."""
    return {MODEL: dictionary.axes.latents, HEAD: dictionary.axes.sites}[along]


def runs_along(dictionary: Divided, along: str, size: int) -> list[int]:
    """The stretches of a dimension of this size, of all processes, that are each cut evenly along an axis."""
    return runs_of(dictionary, size) if along == MODEL else [size]
