"""What processes that save together agree on: whether all could write, and which files there are."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch

from lm_saes.files import drafted, write_json
from lm_saes.latents.axis import Axis
from lm_saes.manifest import MANIFEST, entry

T = TypeVar("T")


def exchange(axis: Axis, value: Any) -> list[Any]:
    """The JSON values that the processes of an axis bring, in order of their places. All have to come."""
    line = bytearray(json.dumps(value).encode() + b"\n")
    lines = bytes(axis.join(torch.frombuffer(line, dtype=torch.uint8)).tolist())
    return [json.loads(line) for line in lines.splitlines()]


def agree(axis: Axis, act: Callable[[], T]) -> list[T]:
    """Let every process act, and wait for all; the JSON values that came of it, in order of places.

    Raises:
        OSError: in one process; then it is raised in all. (`act` must not wait for other processes.)
    """
    failure, value = None, None
    try:
        value = act()
    except OSError as error:
        failure = error
    answers = exchange(axis, {"value": value, "failure": None if failure is None else _told(failure)})
    if failure is not None:
        raise failure
    for answer in answers:
        if answer["failure"] is not None:
            raise OSError(*answer["failure"])
    return [answer["value"] for answer in answers]


def _told(failure: OSError) -> tuple[int, str, str | None]:
    where = None if failure.filename is None else str(failure.filename)
    return failure.errno or errno.EIO, failure.strerror or str(failure), where


def by_first(axis: Axis, act: Callable[[], object]) -> None:
    """Let the first process act while the others wait.

    Raises:
        OSError: in all of them, if the first one raised it.
    """

    def act_if_first() -> None:
        if axis.place == 0:
            act()

    agree(axis, act_if_first)


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
        entries = dict(sorted(item for own in agree(axis, write_own) for item in own.items()))
        by_first(axis, publish)
    return entries
