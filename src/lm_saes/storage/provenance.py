"""Where an artefact comes from: the versions that made it, the settings, the data, and how far it has come."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lm_saes.config import BaseConfig

PACKAGES = ("lm-saes", "torch", "transformers", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of this package, of those that its numbers depend on (None: not installed), and of Python."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = None
    return {**found, "python": platform.python_version()}


def record(
    known: Mapping[str, Any] | None,
    stream: Any,
    trainer: BaseConfig,
    step: int,
    tokens: int,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """The provenance of a dictionary in training, as JSON values; `known` is what was noted of it before."""
    describe = getattr(stream, "provenance", None)
    return {
        **(known or {}),
        **versions(),
        "data": describe() if callable(describe) else {"stream": type(stream).__name__},
        "trainer": trainer.to_json(),
        "tokens": tokens,
        "steps": step,
        "training_metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
    }


def started_from(known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a new run notes of the dictionary that it begins with: if it was trained before, where it came from."""
    if known is None or "steps" not in known:
        return None if known is None else dict(known)
    return {"started_from": dict(known)}
