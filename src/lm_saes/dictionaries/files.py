"""Dictionary files: `sae_weights.safetensors` and `config.json`; old weights in `.pt` are read as tensors only.

A dictionary whose parts many processes hold has `sae_weights.dcp/` instead of the one file.
`manifest.json` holds their sizes and hashes, `provenance.json` where the dictionary comes from; both may be absent. A k
in use that is not the config's `top_k` (a k schedule that has not ended) is noted in the weights' metadata.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_saes.axes.axis import Axes
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import CheckpointError
from lm_saes.storage.files import remove, write_json
from lm_saes.storage.manifest import MANIFEST, check_file, listed, write_manifest
from lm_saes.storage.parts import Parts
from lm_saes.storage.tensors import load_tensors, save_tensors

CONFIG = "config.json"
WEIGHTS, SHARDS, OLD_WEIGHTS = "sae_weights.safetensors", "sae_weights.dcp", "sae_weights.pt"
PROVENANCE = "provenance.json"
_K = "current_k"
_NORM_KEY = "dataset_average_activation_norm."
OPTIONAL_KEYS = frozenset({"activation_function.batch_topk_threshold"})


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
        return {_K: str(self.current_k)} if scheduled else None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights, `config.json`, provenance and their manifest, as trained (nothing folded).

        Processes that each hold a part have to call it together; each writes its own.
        """
        directory = Path(directory)
        if self.axes.everywhere.size > 1:
            from lm_saes.parallel.dictionaries import save_parts

            save_parts(self, directory)  # type: ignore[arg-type]
            return
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)  # else it would contradict the new files if one fails
        self.save_checkpoint(directory / WEIGHTS)
        remove(directory / SHARDS)
        self.cfg.save_hyperparameters(directory)
        self.save_provenance(directory)

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
        """The tensors of a dictionary's directory, as far as this process holds them.

        Raises:
            CheckpointError: there are none, or they cannot be read.
        """
        if self.axes.everywhere.size == 1:
            return load_weights(path)
        from lm_saes.parallel.dictionaries import read_parts

        return read_parts(self, Path(path))  # type: ignore[arg-type]


def weight_files(directory: Path) -> list[str]:
    """Names of the files in a dictionary's directory that hold weights."""
    one = [WEIGHTS] if (directory / WEIGHTS).exists() else []
    return one + sorted(f"{SHARDS}/{file.name}" for file in (directory / SHARDS).glob("*"))


def files_to_check(directory: Path) -> list[str]:
    """Names of the files that weights are read from: the one, or all shards."""
    return [WEIGHTS] if (directory / WEIGHTS).exists() else shards_to_check(directory)


def shards_to_check(directory: Path) -> list[str]:
    """Names of all shards of weights, those that only the manifest names too."""
    named = listed(directory) if (directory / MANIFEST).exists() else ()
    return sorted({name for name in [*weight_files(directory), *named] if name.startswith(f"{SHARDS}/")})


def load_weights(directory: str | Path) -> dict[str, Tensor]:
    """All weights in a dictionary's directory: `sae_weights.safetensors`, else `.pt` (tensors only), else `.dcp`.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    directory = Path(directory)
    if directory.is_file():
        return load_tensors(directory)
    if (directory / WEIGHTS).exists():
        check_file(directory, WEIGHTS)
        return load_tensors(directory / WEIGHTS)
    old = directory / OLD_WEIGHTS
    if not old.exists() and (directory / SHARDS).exists():
        for name in files_to_check(directory):
            check_file(directory, name)
        with Parts(directory / SHARDS) as parts:
            return {name: parts.read(name) for name in parts.shapes}
    if not old.exists():
        raise CheckpointError(f"{directory}: holds no {WEIGHTS}; give the directory that save_pretrained wrote")
    try:
        loaded: Any = torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{old}: cannot be read as plain tensors ({' '.join(str(error).split())[:200]}); what else it holds is not "
            "loaded, as it could run code: save its tensors as safetensors where you trust it"
        ) from error
    loaded = loaded.get("sae", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{old}: does not hold named tensors")
    return loaded


def check_fit(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], strict: bool, optional: Set[str] = frozenset()
) -> None:
    """Raise `CheckpointError` unless `given` tensors have the shapes, and with `strict` the names, of one's `own`."""
    for name in sorted(set(own) & set(given)):
        if given[name].shape != own[name].shape:
            raise CheckpointError(
                f"weights: {name} has shape {tuple(given[name].shape)}, wanted {tuple(own[name].shape)}; "
                "does config.json belong to these weights?"
            )
    missing, unexpected = sorted(set(own) - set(given) - optional), sorted(set(given) - set(own))
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"weights: missing {missing}, unexpected {unexpected}; pass strict_loading=False to ignore"
        )


def read_k(directory: str | Path) -> int | None:
    """The k that was in use when a dictionary was saved, where that was not yet its config's `top_k`."""
    weights = Path(directory, WEIGHTS if Path(directory, WEIGHTS).exists() else SHARDS)
    if not weights.exists():
        return None
    with Parts(weights) as parts:
        k = parts.metadata.get(_K)
    if k is not None and not (k.isascii() and k.isdigit() and int(k) > 0):
        raise CheckpointError(f"{weights}: {_K}={k!r} is not a number of latents; save the dictionary again")
    return None if k is None else int(k)


def read_provenance(directory: str | Path) -> dict[str, Any] | None:
    """What `provenance.json` says; None if there is none."""
    file = Path(directory, PROVENANCE)
    if not file.exists():
        return None
    check_file(directory, PROVENANCE)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); remove it to do without") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, not a table; remove it to do without")
    return found
