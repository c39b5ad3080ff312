"""What the processes of a test do with files."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lm_saes import Trainer
from lm_saes.data.peek import peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError
from lm_saes.training.checkpoint import saved_steps

from .work import Case, batches, initialise, settings, share_of, take_step, train, weights_of


def loaded(case: Case, mesh: DeviceMesh, place: str, directory: str, save_to: str = "") -> dict[str, Tensor]:
    """The weights that `from_pretrained` reads; they are saved again to `save_to`."""
    sae = AbstractSparseAutoEncoder.from_pretrained(directory, device_mesh=mesh, fold_activation_scale=False)
    if save_to:
        sae.save_pretrained(save_to)
    return weights_of(sae)


def refused(case: Case, mesh: DeviceMesh, place: str, directory: str, why: str) -> dict[str, Tensor]:
    """Try to resume, and to load, from a directory: in every process both have to fail, for one reason."""
    attempts = {
        "resumed": lambda: train(case, mesh, place, resume=directory),
        "loaded": lambda: loaded(case, mesh, place, directory),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except CheckpointError as error:
            if why not in str(error):
                raise
        else:
            raise RuntimeError(f"{directory}: {name} all the same")
    return {}


def full_disk(case: Case, mesh: DeviceMesh, place: str, run: str, full: int) -> dict[str, Tensor]:
    """Save every step of three; at the second the process at place `full` can write 4 KiB to a file and no more."""
    torch.manual_seed(5)
    own = share_of(batches(case), mesh)
    sae = initialise(case, own, mesh)
    trainer, stream = Trainer(settings(case, run)), peekable(own)
    started = trainer._prepare(sae, stream)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = []
    for step in range(3):
        take_step(trainer, started, [next(stream)])
        if step == 1 and sae.axes.everywhere.place == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        saved.append(trainer._try_to_save(started))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        there = sorted(path.name for path in Path(run, "checkpoints").iterdir())
        if sae.axes.everywhere.place == 0 and step == 1 and (there != ["step_1"] or list(saved_steps(run)) != [1]):
            raise RuntimeError(f"left behind: {there}")
    return {"saved": torch.tensor(saved)}
