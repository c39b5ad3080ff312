"""A process's part of a dictionary: parameters cut along latents, and heads, as the kind's `dim_maps` says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lm_saes.axes.axis import Axis
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.latents.gradients.rows import storage_order
from lm_saes.parallel.mesh import HEAD, MODEL, axes_of
from lm_saes.storage.parts import Cut, Held

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
    from lm_saes.dictionaries.config import BaseSAEConfig

Kind = TypeVar("Kind", bound="AbstractSparseAutoEncoder")
OF_LATENTS = {MODEL: -1}
"""The `dim_maps` entry of statistics of latents."""


def build_part(kind: type[Kind], cfg: BaseSAEConfig, mesh: DeviceMesh) -> Kind:
    """This process's part of a dictionary, all zeros, without the rest ever having been there.

    Raises:
        ConfigError: the latents, or the heads, cannot be cut evenly, or there are no heads to cut.
    """
    axes = axes_of(mesh)
    with torch.device("meta"):
        part = kind(cfg)
    if axes.sites.size > 1 and not any(HEAD in dims for dims in part.dim_maps().values()):
        raise ConfigError(f"device_mesh: sae_type={cfg.sae_type!r} has no heads to cut; only a crosscoder has")
    part.attach(axes)
    maps = part.dim_maps()
    for name, whole in [*part.named_parameters(), *part.named_buffers()]:
        owner, _, own_name = name.rpartition(".")
        shape = list(whole.shape)
        for along, dim in maps.get(name, {}).items():
            n = _axis(part, along).size
            for run in _runs(part, along, shape[dim]):
                _check_even(cfg, along, run, n)
            shape[dim] //= n
        order = storage_order(whole)
        stored = torch.zeros([shape[i] for i in order], dtype=whole.dtype, device=cfg.device)
        tensor = stored.permute([order.index(i) for i in range(whole.ndim)])
        if isinstance(whole, nn.Parameter):
            part.get_submodule(owner)._parameters[own_name] = nn.Parameter(tensor)
        else:
            part.get_submodule(owner)._buffers[own_name] = tensor
    return part


def runs_of(dictionary: AbstractSparseAutoEncoder, size: int) -> list[int]:
    """The stretches of a dimension of `size` latents (of all processes) that are each cut evenly."""
    runs = dictionary.latent_runs
    return runs if size == sum(runs) else [size]


def own_part(dictionary: AbstractSparseAutoEncoder, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of whole tensors, by their names in files, that belong to this process."""
    maps, parts = dictionary.file_dim_maps(), dict(whole)
    for name, tensor in whole.items():
        for cut in cuts_of(dictionary, maps.get(name, {}), tensor.shape):
            parts[name] = cut.part(parts[name])
    return parts


def latent_numbers(dictionary: AbstractSparseAutoEncoder) -> Tensor:
    """The number, among all, of each latent of this process, by its place in `dead_shape` (flattened)."""
    n, shape = dictionary.axes.latents.size, dictionary.dead_shape
    numbers = torch.arange(math.prod(shape) * n, device=dictionary.cfg.device).view(*shape[:-1], -1)
    for cut in cuts_of(dictionary, OF_LATENTS, numbers.shape):
        numbers = cut.part(numbers)
    return numbers.flatten()


def cuts_of(dictionary: AbstractSparseAutoEncoder, dims: Mapping[str, int], shape: Sequence[int]) -> tuple[Cut, ...]:
    """How a tensor of a shape is cut along the axes of a mesh, of each of which `dims` names the dimension.

    Raises:
        CheckpointError: it cannot be.
    """
    cuts = []
    for along, dim in dims.items():
        axis = _axis(dictionary, along)
        if not shape or axis.size == 1:
            continue
        runs = _runs(dictionary, along, shape[dim])
        if any(run % axis.size for run in runs):
            raise CheckpointError(f"a tensor of shape {tuple(shape)} cannot be cut for {axis.size} processes: {runs}")
        cuts.append(Cut(dim % len(shape), tuple(runs), axis))
    return tuple(cuts)


def held(
    dictionary: AbstractSparseAutoEncoder, tensors: Mapping[str, Tensor], maps: Mapping[str, Mapping[str, int]]
) -> dict[str, Held]:
    """This process's tensors, and how they are cut from the whole, by their `dim_maps` (of those that have one)."""
    found = dict[str, Held]()
    for name, tensor in tensors.items():
        dims, shape = maps.get(name, {}), list(tensor.shape)
        for along, dim in dims.items() if shape else ():
            shape[dim] *= _axis(dictionary, along).size
        found[name] = tensor, cuts_of(dictionary, dims, shape)
    return found


def _axis(dictionary: AbstractSparseAutoEncoder, along: str) -> Axis:
    return {MODEL: dictionary.axes.latents, HEAD: dictionary.axes.sites}[along]


def _runs(dictionary: AbstractSparseAutoEncoder, along: str, size: int) -> list[int]:
    return runs_of(dictionary, size) if along == MODEL else [size]


def _check_even(cfg: BaseSAEConfig, along: str, size: int, n: int) -> None:
    if size % n:
        what = "heads" if along == HEAD else "latents (or heads, or transforms of one rank)"
        raise ConfigError(
            f"{along}_parallel_size={n}: does not divide the {size} {what} of sae_type={cfg.sae_type!r} evenly; use a "
            "divisor"
        )
