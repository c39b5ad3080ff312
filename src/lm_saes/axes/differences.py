"""Comparing settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    """Every place where two JSON values differ, as `path: theirs there, ours here`."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            yield from differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        yield from differences(dict(enumerate(theirs)), dict(enumerate(ours)), path)
    elif theirs != ours:
        yield f"{path}: {theirs!r} there, {ours!r} here"


def first_difference(theirs: Any, ours: Any) -> str | None:
    """Where two JSON values differ first; None if they do not."""
    return next(differences(theirs, ours), None)
