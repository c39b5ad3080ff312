"""The mesh of a run's processes: data x model, and the axes that dictionaries see of it."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lm_saes.errors import ConfigError
from lm_saes.latents.axis import Axes, Axis
from lm_saes.parallel.axis import SharedAxis

DATA, MODEL = "data", "model"
TIMEOUT = timedelta(minutes=10)
"""After so long without an answer a process takes the others for dead."""


def start(data: int, model: int, device_type: str = "cpu") -> DeviceMesh:
    """Join the processes that torchrun has started to a mesh of `data x model`.

    Raises:
        ConfigError: torchrun has started another number of them.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if data * model != world:
        raise ConfigError(
            f"data_parallel_size={data}, model_parallel_size={model}: {data} x {model} = {data * model} processes, but "
            f"{world} run; start it with torchrun --nproc-per-node {data * model} -m lm_saes train ..."
        )
    if not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
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
        return Axis()
    return SharedAxis(mesh.get_group(name))  # type: ignore[arg-type]
