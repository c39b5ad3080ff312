"""Whole tensors in one safetensors file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_saes.errors import CheckpointError
from lm_saes.storage.files import drafted, share_as_usual


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
