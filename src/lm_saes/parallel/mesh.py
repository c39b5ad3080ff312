"""The mesh of a run's processes: data x head x model, and the axes that dictionaries see of it."""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lm_saes.axes.axis import ALONE, Axes, Axis
from lm_saes.axes.cuts import DATA, HEAD, MODEL
from lm_saes.errors import ConfigError
from lm_saes.parallel.axis import SharedAxis
from lm_saes.parallel.launch import join, n_started

_AXES = "lm_saes_axes"


def start(data: int, model: int, head: int = 1, device_type: str = "cpu") -> DeviceMesh:
    """Join the processes that torchrun has started to a mesh of `data x head x model` (without `head` if that is 1).

    Raises:
        ConfigError: torchrun has started another number of them, or more on this node than it has devices.
    """
    sizes = {DATA: data, MODEL: model} | ({HEAD: head} if head > 1 else {})
    world, wanted = n_started(), data * model * head
    if wanted != world:
        settings = ", ".join(f"{name}_parallel_size={size}" for name, size in sizes.items())
        started = f"torchrun --nproc-per-node {wanted} -m lm_saes train" if wanted > 1 else "lm-saes train"
        raise ConfigError(
            f"{settings}: {' x '.join(map(str, sizes.values()))} = {wanted} "
            f"process{'es' if wanted > 1 else ''}, but {world} run{'s' if world == 1 else ''}; change the sizes, or "
            f"start it with {started} ..."
        )
    if device_type == "cuda":
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise ConfigError(
                f"device_type='cuda': this node has {there} devices, but more processes; lower --nproc-per-node"
            )
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        join()
    names = tuple(name for name in (DATA, HEAD, MODEL) if name in sizes)
    return init_device_mesh(device_type, tuple(sizes[name] for name in names), mesh_dim_names=names)


def axes_of(mesh: DeviceMesh) -> Axes:
    """The axes of a mesh with some of the dimensions `"data"`, `"head"` and `"model"`.

    They are made once and kept by the mesh: every process has to take part in making their groups.

    Raises:
        ConfigError: it has other dimensions.
    """
    kept: Axes | None = getattr(mesh, _AXES, None)
    if kept is None:
        kept = _make_axes(mesh)
        setattr(mesh, _AXES, kept)
    return kept


def _make_axes(mesh: DeviceMesh) -> Axes:
    names = getattr(mesh, "mesh_dim_names", None)
    if not names or set(names) - {DATA, HEAD, MODEL}:
        raise ConfigError(
            f"device_mesh: its dimensions are {names}; give a DeviceMesh of 'data' and 'model' (and 'head')"
        )
    made: dict[frozenset[str], Axis] = {frozenset(): ALONE}

    def along(*wanted: str) -> Axis:
        cut = frozenset(name for name in wanted if name in names and mesh[name].size() > 1)
        if cut not in made:
            made[cut] = SharedAxis(_group(mesh, cut))
        return made[cut]

    return Axes(
        latents=along(MODEL), tokens=along(DATA), sites=along(HEAD), batch=along(DATA, MODEL),
        everywhere=along(DATA, HEAD, MODEL),
    )  # fmt: skip


def _group(mesh: DeviceMesh, along: frozenset[str]) -> dist.ProcessGroup:
    """The processes that differ from this one in these dimensions alone."""
    names = mesh.mesh_dim_names or ()
    if len(along) == 1:
        return mesh.get_group(*along)
    within, across = ([i for i, name in enumerate(names) if (name in along) == inside] for inside in (True, False))
    groups = mesh.mesh.permute(*across, *within).reshape(-1, math.prod(mesh.shape[i] for i in within)).tolist()
    own = next(ranks for ranks in groups if dist.get_rank() in ranks)
    return dist.new_group(own, use_local_synchronization=True)  # type: ignore[return-value]
