"""A process's part of a dictionary: every parameter cut along its latents, as the kind's `dim_maps` says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.latents.row_gradients import storage_order
from lm_saes.parallel.mesh import MODEL, axes_of
from lm_saes.parts import Cut, Held

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
    from lm_saes.dictionaries.config import BaseSAEConfig

Kind = TypeVar("Kind", bound="AbstractSparseAutoEncoder")


def build_part(kind: type[Kind], cfg: BaseSAEConfig, mesh: DeviceMesh) -> Kind:
    """This process's part of a dictionary, all zeros, without the rest ever having been there.

    Raises:
        ConfigError: the latents cannot be cut evenly.
    """
    axes = axes_of(mesh)
    with torch.device("meta"):
        part = kind(cfg)
    dims, n = latent_dims(part.dim_maps()), axes.latents.size
    for name, whole in [*part.named_parameters(), *part.named_buffers()]:
        owner, _, own_name = name.rpartition(".")
        shape, dim = list(whole.shape), dims.get(name)
        if dim is not None:
            for run in runs_of(part, shape[dim]):
                _check_even(cfg, run, n)
            shape[dim] //= n
        order = storage_order(whole)
        stored = torch.zeros([shape[i] for i in order], dtype=whole.dtype, device=cfg.device)
        tensor = stored.permute([order.index(i) for i in range(whole.ndim)])
        if isinstance(whole, nn.Parameter):
            part.get_submodule(owner)._parameters[own_name] = nn.Parameter(tensor)
        else:
            part.get_submodule(owner)._buffers[own_name] = tensor
    part.attach(axes)
    return part


def runs_of(dictionary: AbstractSparseAutoEncoder, size: int) -> list[int]:
    """The stretches of a dimension of `size` latents (of all processes) that are each cut evenly."""
    runs = dictionary.latent_runs
    return runs if size == sum(runs) else [size]


def own_part(dictionary: AbstractSparseAutoEncoder, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of whole tensors, by their names in files, that belong to this process."""
    dims = latent_dims(dictionary.file_dim_maps())
    cuts = {name: cut_of(dictionary, dims.get(name), tensor.shape) for name, tensor in whole.items()}
    return {name: tensor if (cut := cuts[name]) is None else cut.part(tensor) for name, tensor in whole.items()}


def latent_numbers(dictionary: AbstractSparseAutoEncoder) -> Tensor:
    """The number, among all, of each latent of this process, by its place in `dead_shape` (flattened)."""
    n, shape = dictionary.axes.latents.size, dictionary.dead_shape
    whole = torch.arange(math.prod(shape) * n, device=dictionary.cfg.device).view(*shape[:-1], -1)
    cut = cut_of(dictionary, -1, whole.shape)
    return (whole if cut is None else cut.part(whole)).flatten()


def cut_of(dictionary: AbstractSparseAutoEncoder, dim: int | None, shape: Sequence[int]) -> Cut | None:
    """How a tensor of a shape is cut along its latents, which are in dimension `dim` (None: nowhere).

    Raises:
        CheckpointError: it cannot be.
    """
    latents = dictionary.axes.latents
    if dim is None or not shape or latents.size == 1:
        return None
    dim %= len(shape)
    runs = runs_of(dictionary, shape[dim])
    if any(run % latents.size for run in runs):
        raise CheckpointError(f"a tensor of shape {tuple(shape)} cannot be cut for {latents.size} processes: {runs}")
    return Cut(dim, tuple(runs), latents)


def held(
    dictionary: AbstractSparseAutoEncoder, tensors: Mapping[str, Tensor], dims: Mapping[str, int]
) -> dict[str, Held]:
    """This process's tensors, and how they are cut from the whole: along dimension `dims[name]`, if there is one."""
    n, found = dictionary.axes.latents.size, dict[str, Held]()
    for name, tensor in tensors.items():
        dim, shape = dims.get(name), list(tensor.shape)
        if dim is not None and shape:
            shape[dim] *= n
        found[name] = tensor, cut_of(dictionary, dim, shape)
    return found


def latent_dims(maps: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The dimension of latents of each tensor that has one, from `dim_maps()` or `file_dim_maps()`."""
    return {name: dims[MODEL] for name, dims in maps.items() if MODEL in dims}


def _check_even(cfg: BaseSAEConfig, size: int, n: int) -> None:
    if size % n:
        raise ConfigError(
            f"model_parallel_size={n}: does not divide the {size} latents (or heads, or transforms of one rank) of "
            f"sae_type={cfg.sae_type!r} evenly; use a divisor"
        )
