"""Dictionary files: `sae_weights.safetensors` and `config.json`; old weights in `.pt` are read as tensors only."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import CheckpointError
from lm_saes.files import drafted, share_as_usual

WEIGHTS = "sae_weights.safetensors"
_NORM_KEY = "dataset_average_activation_norm."
_OPTIONAL_KEYS = frozenset({"activation_function.batch_topk_threshold"})


class Stored(nn.Module):
    """The part of a dictionary that turns it into named tensors and files, and back."""

    cfg: BaseSAEConfig
    dataset_average_activation_norm: dict[str, float] | None
    selection_norm: Tensor | None

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
        save_tensors(self.full_state_dict(), path)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `sae_weights.safetensors` and `config.json`, as trained (nothing folded)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.save_checkpoint(Path(directory, WEIGHTS))
        self.cfg.save_hyperparameters(directory)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, whole or not at all."""
    with drafted(path) as draft:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft, metadata)
        share_as_usual(draft)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, torn, or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def load_weights(directory: str | Path) -> dict[str, Tensor]:
    """The weights in a dictionary's directory: `sae_weights.safetensors`, else `sae_weights.pt` (tensors only).

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    directory = Path(directory)
    if directory.is_file():
        return load_tensors(directory)
    if (directory / WEIGHTS).exists():
        return load_tensors(directory / WEIGHTS)
    old = directory / "sae_weights.pt"
    if not old.exists():
        raise CheckpointError(f"{directory}: holds no {WEIGHTS}; give the directory that save_pretrained wrote")
    try:
        loaded: Any = torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{old}: cannot be read as plain tensors ({' '.join(str(error).split())[:200]})"
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
