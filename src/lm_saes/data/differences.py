"""Comparing settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_difference(theirs: Any, ours: Any, path: str = "") -> str | None:
    """Where two JSON values differ first, as `path: theirs there, ours here`; None if they do not."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            found = first_difference(theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return first_difference(dict(enumerate(theirs)), dict(enumerate(ours)), path)
    return None if theirs == ours else f"{path}: {theirs!r} there, {ours!r} here"
