"""Directories that the processes of a run write together: whole or absent, whoever fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_saes.axes.axis import Axis
from lm_saes.axes.together import by_first, each, exchange
from lm_saes.storage.files import drafted, write_json
from lm_saes.storage.manifest import MANIFEST, entry


def save_together(
    path: Path, axis: Axis, write: Callable[[Path], Iterable[Path]], *, with_manifest: bool = False
) -> dict[str, Any]:
    """Write a directory by all processes of an axis, whole or not at all; the manifest's entries of its files.

    The first process makes the draft and, once all have written, renames it.

    Args:
        write: writes this process's files into the draft, and says which they are.

    Raises:
        OSError: in all processes, if one could not write; what stood at `path` stays.
    """
    draft = path.with_name(f".{path.name}.draft")
    with ExitStack() as unfinished:

        def begin() -> None:
            unfinished.enter_context(drafted(path))
            draft.mkdir()

        def write_own() -> dict[str, Any]:
            return {file.relative_to(draft).as_posix(): entry(file) for file in write(draft)}

        def publish() -> None:
            if with_manifest:
                write_json(draft / MANIFEST, {"files": entries})
            unfinished.close()

        by_first(axis, begin)
        entries = dict(sorted(item for own in exchange(axis, each(axis, write_own)) for item in own.items()))
        by_first(axis, publish)
    return entries
