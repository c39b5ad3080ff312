"""Dictionary files: `sae_weights.safetensors` and `config.json`; old weights in `.pt` are read as tensors only.

`manifest.json` holds their sizes and hashes, `provenance.json` where the dictionary comes from; both may be absent. A k
in use that is not the config's `top_k` (a k schedule that has not ended) is noted in the weights' metadata.
"""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import CheckpointError
from lm_saes.files import drafted, share_as_usual, write_json
from lm_saes.manifest import MANIFEST, check_file, write_manifest

CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
PROVENANCE = "provenance.json"
_K = "current_k"
_NORM_KEY = "dataset_average_activation_norm."
_OPTIONAL_KEYS = frozenset({"activation_function.batch_topk_threshold"})


class Stored(nn.Module):
    """The part of a dictionary that turns it into named tensors and files, and back."""

    cfg: BaseSAEConfig
    dataset_average_activation_norm: dict[str, float] | None
    selection_norm: Tensor | None
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
        check_fit({**self.state_dict(), **wanted}, {**weights, **norms}, strict, optional=_OPTIONAL_KEYS | unused)
        self.load_state_dict(weights, strict=False)
        if norms:
            self.dataset_average_activation_norm = {name.removeprefix(_NORM_KEY): float(t) for name, t in norms.items()}

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the weights to one safetensors file."""
        scheduled = self.current_k not in (None, self.cfg.top_k)
        save_tensors(self.full_state_dict(), path, {_K: str(self.current_k)} if scheduled else None)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights, `config.json`, provenance and their manifest, as trained (nothing folded)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)  # else it would contradict the new files if one fails
        self.save_checkpoint(directory / WEIGHTS)
        self.cfg.save_hyperparameters(directory)
        self.save_provenance(directory)

    def save_provenance(self, directory: str | Path) -> None:
        """Write `provenance.json`, if there is any, and the manifest of the dictionary's files."""
        file = Path(directory, PROVENANCE)
        if self.provenance is None:
            file.unlink(missing_ok=True)  # that of what lay here before
        else:
            write_json(file, self.provenance)
        write_manifest(directory, [CONFIG, WEIGHTS, *([] if self.provenance is None else [PROVENANCE])])


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, whole or not at all."""
    with drafted(path) as draft:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft, metadata)
        except SafetensorError as error:  # which is no OSError even where the disk is full
            if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        share_as_usual(draft)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, torn, or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); restore the file") from error


def load_weights(directory: str | Path) -> dict[str, Tensor]:
    """The weights in a dictionary's directory: `sae_weights.safetensors`, else `sae_weights.pt` (tensors only).

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    directory = Path(directory)
    if directory.is_file():
        return load_tensors(directory)
    if (directory / WEIGHTS).exists():
        check_file(directory, WEIGHTS)
        return load_tensors(directory / WEIGHTS)
    old = directory / "sae_weights.pt"
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
    weights = Path(directory, WEIGHTS)
    if not weights.exists():
        return None
    with safe_open(weights, framework="pt") as file:
        k = (file.metadata() or {}).get(_K)
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
