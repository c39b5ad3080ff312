"""Saving and loading of dictionaries: named tensors, `save_pretrained`, what each process writes and reads.

A dictionary whose parts many processes hold has `sae_weights.dcp/` instead of the one file.
`manifest.json` holds their sizes and hashes, `provenance.json` where the dictionary comes from; both may be absent. A k
in use that is not the config's `top_k` (a k schedule that has not ended) is noted in the weights' metadata.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_saes.axes.axis import Axes, Axis
from lm_saes.axes.cuts import cuts_of, held, own_part
from lm_saes.axes.together import by_first, exchange
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.weight_files import (
    CONFIG,
    OLD_WEIGHTS,
    OPTIONAL_KEYS,
    PROVENANCE,
    SHARDS,
    WEIGHTS,
    K,
    check_fit,
    files_to_check,
    load_weights,
    weight_files,
)
from lm_saes.errors import CheckpointError
from lm_saes.storage.drafts import save_together
from lm_saes.storage.files import remove, write_json
from lm_saes.storage.manifest import MANIFEST, check_file, write_manifest
from lm_saes.storage.parts import Parts, write_parts
from lm_saes.storage.tensors import save_tensors

_NORM_KEY = "dataset_average_activation_norm."


class Stored(nn.Module, ABC):
    """The part of a dictionary that turns it into named tensors and files, and back."""

    cfg: BaseSAEConfig
    dataset_average_activation_norm: dict[str, float] | None
    selection_norm: Tensor | None
    axes: Axes
    provenance: dict[str, Any] | None = None
    """Where it comes from, as JSON values: versions, model, data, tokens, metrics; saved and loaded with it."""

    @property
    @abstractmethod
    def current_k(self) -> int | None:
        """The k that the top-k family uses now; None for other activation functions."""

    @abstractmethod
    def dim_maps(self) -> dict[str, dict[str, int]]:
        """Which dimension of each parameter is cut along which mesh axis."""

    def file_dim_maps(self) -> dict[str, dict[str, int]]:
        """The same of each tensor, by its name in files."""
        return self.dim_maps() | {"selection_norm": {"model": -1}}

    @property
    def latent_runs(self) -> list[int]:
        """Lengths of the stretches of all latents that are each cut evenly along the model axis."""
        return [self.cfg.d_sae]

    def attach(self, axes: Axes) -> None:
        """Let latents, batches, and the weights of sites be parts of what these axes cut."""
        self.axes = axes

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every tensor that defines this dictionary, under its name in files."""
        norms = self.dataset_average_activation_norm or {}
        extra = {_NORM_KEY + hook: torch.tensor(norm, dtype=torch.float64) for hook, norm in norms.items()}
        return {**self.state_dict(), **extra}

    def load_full_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Load what `full_state_dict` gave.

        Raises:
            CheckpointError: with `strict`, names are missing or unexpected; in any case, if shapes differ.
        """
        if "selection_norm" in state:
            self.selection_norm = state["selection_norm"].clone()
        norms = {name: t.squeeze() for name, t in state.items() if name.startswith(_NORM_KEY)}
        weights = {name: t for name, t in state.items() if name not in norms}
        wanted = dict.fromkeys([_NORM_KEY + hook for hook in self.cfg.associated_hook_points], torch.zeros(()))
        unused = wanted.keys() if self.cfg.norm_activation != "dataset-wise" else set[str]()
        check_fit({**self.state_dict(), **wanted}, {**weights, **norms}, strict, optional=OPTIONAL_KEYS | unused)
        self.load_state_dict(weights, strict=False)
        if norms:
            self.dataset_average_activation_norm = {name.removeprefix(_NORM_KEY): float(t) for name, t in norms.items()}

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the weights to one safetensors file."""
        save_tensors(self.full_state_dict(), path, self.file_metadata)

    @property
    def file_metadata(self) -> dict[str, str] | None:
        """What the weights' header notes: the k in use, where it is not the config's."""
        scheduled = self.current_k not in (None, self.cfg.top_k)
        return {K: str(self.current_k)} if scheduled else None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights, `config.json`, provenance and their manifest, as trained (nothing folded).

        Processes that each hold a part have to call it together; each writes its own.
        """
        directory = Path(directory)
        together = self.axes.everywhere

        def begin() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / MANIFEST).unlink(missing_ok=True)  # else it would contradict the new files if one fails

        def finish() -> None:
            for name in (WEIGHTS, OLD_WEIGHTS, SHARDS):
                if name not in kept:
                    remove(directory / name)
            self.cfg.save_hyperparameters(directory)
            self.save_provenance(directory, entries)

        by_first(together, begin)
        entries = dict[str, Any]()
        if together.size == 1:
            kept = {WEIGHTS, OLD_WEIGHTS}
            self.save_checkpoint(directory / WEIGHTS)
        else:
            kept = {SHARDS}
            written = save_together(directory / SHARDS, together, self.write_parts)
            entries = {f"{SHARDS}/{name}": entry for name, entry in written.items()}
        by_first(together, finish)

    def write_parts(self, folder: Path) -> list[Path]:
        """Write this process's share of the weights into a folder; the files."""
        own = held(self, self.full_state_dict(), self.file_dim_maps())
        return write_parts(folder, own, self.axes, self.file_metadata)

    def save_provenance(self, directory: str | Path, known: Mapping[str, Any] | None = None) -> None:
        """Write `provenance.json`, if there is any, and the manifest of the dictionary's files.

        Args:
            known: the manifest's entries of files that have been hashed already.
        """
        directory = Path(directory)
        self.write_provenance(directory)
        own = [CONFIG, *([] if self.provenance is None else [PROVENANCE])]
        write_manifest(directory, [*own, *(weight_files(directory) or [WEIGHTS])], known)

    def write_provenance(self, directory: Path) -> None:
        """Write `provenance.json`, if there is any."""
        if self.provenance is None:
            (directory / PROVENANCE).unlink(missing_ok=True)  # that of what lay here before
        else:
            write_json(directory / PROVENANCE, self.provenance)

    def read_weights(self, path: str | Path) -> dict[str, Tensor]:
        """The tensors of a dictionary's directory (or of one file), as far as this process holds them.

        Where there is a manifest, each file is hashed by one of the processes.

        Raises:
            CheckpointError: in all processes, if files are not as they were saved; if there are none, or they do not
                fit.
        """
        path = Path(path)
        if path.is_dir():
            _check_together(path, self.axes.everywhere)
        where = next((path / name for name in (WEIGHTS, OLD_WEIGHTS, SHARDS) if (path / name).exists()), path)
        if where.name == OLD_WEIGHTS or (where == path and path.is_dir()):
            return own_part(self, load_weights(path))
        maps = self.file_dim_maps()
        with Parts(where) as parts:
            return {name: parts.read(name, cuts_of(self, maps.get(name, {}), n)) for name, n in parts.shapes.items()}


def _check_together(directory: Path, axis: Axis) -> None:
    wrong = None
    try:
        for name in files_to_check(directory)[axis.place :: axis.size]:
            check_file(directory, name)
    except CheckpointError as error:
        wrong = str(error)
    for told in exchange(axis, wrong):
        if told is not None:
            raise CheckpointError(told)
