"""The names of a dictionary's files, and reading and checking them; old `.pt` weights are read as tensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_saes.errors import CheckpointError
from lm_saes.storage.manifest import MANIFEST, check_file, listed
from lm_saes.storage.parts import Parts
from lm_saes.storage.tensors import load_tensors

CONFIG = "config.json"
WEIGHTS, SHARDS, OLD_WEIGHTS = "sae_weights.safetensors", "sae_weights.dcp", "sae_weights.pt"
PROVENANCE = "provenance.json"
K = "current_k"
OPTIONAL_KEYS = frozenset({"activation_function.batch_topk_threshold"})


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
        k = parts.metadata.get(K)
    if k is not None and not (k.isascii() and k.isdigit() and int(k) > 0):
        raise CheckpointError(f"{weights}: {K}={k!r} is not a number of latents; save the dictionary again")
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
