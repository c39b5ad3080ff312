"""The mesh of a run's processes: data x model, and the axes that dictionaries see of it."""

from __future__ import annotations

import os
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lm_saes.errors import ConfigError
from lm_saes.latents.axis import ALONE, Axes, Axis
from lm_saes.parallel.axis import SharedAxis
from lm_saes.parallel.launch import join, n_started

DATA, MODEL = "data", "model"


def start(data: int, model: int, device_type: str = "cpu") -> DeviceMesh:
    """Join the processes that torchrun has started to a mesh of `data x model`.

    Raises:
        ConfigError: torchrun has started another number of them, or more on this node than it has devices.
    """
    world, wanted = n_started(), data * model
    if wanted != world:
        started = f"torchrun --nproc-per-node {wanted} -m lm_saes train" if wanted > 1 else "lm-saes train"
        raise ConfigError(
            f"data_parallel_size={data}, model_parallel_size={model}: {data} x {model} = {wanted} "
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
    return init_device_mesh(device_type, (data, model), mesh_dim_names=(DATA, MODEL))


@cache
def axes_of(mesh: DeviceMesh) -> Axes:
    """The axes of a mesh with dimensions `"data"` and `"model"`, or one of them.

    Raises:
        ConfigError: it has others.
    """
    names = getattr(mesh, "mesh_dim_names", None)
    if not names or set(names) - {DATA, MODEL}:
        raise ConfigError(f"device_mesh: its dimensions are {names}; give a DeviceMesh of 'data' and 'model'")
    latents, tokens = (_axis(mesh, name) for name in (MODEL, DATA))
    if latents.size == 1 or tokens.size == 1:
        return Axes(latents, tokens, latents if tokens.size == 1 else tokens)
    return Axes(latents, tokens, SharedAxis(dist.new_group(mesh.mesh.flatten().tolist())))  # type: ignore[arg-type]


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    if name not in (mesh.mesh_dim_names or ()) or mesh[name].size() == 1:
        return ALONE
    return SharedAxis(mesh.get_group(name))  # type: ignore[arg-type]
