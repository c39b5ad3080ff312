"""Manifests: size and hash of every file of a saved directory, so that a torn or altered one is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lm_saes.errors import CheckpointError
from lm_saes.storage.files import sha256, write_json

MANIFEST = "manifest.json"
_ENTRY = {"size": int, "sha256": str}


def write_manifest(
    directory: str | Path, names: Iterable[str] | None = None, known: Mapping[str, Any] | None = None
) -> None:
    """Write `manifest.json` for the files `names` of a directory (None: all that are there).

    Args:
        known: entries of files that have been hashed already.
    """
    directory, known = Path(directory), known or {}
    named = sorted(files_of(directory) if names is None else names)
    write_json(directory / MANIFEST, {"files": {n: known[n] if n in known else entry(directory / n) for n in named}})


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def problems(
    directory: str | Path, *, hashes: bool = True, whole: bool = False, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """What is wrong with a directory that has a manifest, one line a file; nothing if every file is as it was saved.

    Args:
        hashes: False looks at sizes only.
        whole: the manifest is of the whole directory, so files that it does not name are wrong too.
        share: `(place, n)`: hash every nth file only, as one of n processes that look at all of them together.
    """
    directory = Path(directory)
    try:
        entries = _entries(directory)
    except CheckpointError as error:
        return [str(error)]
    place, n = share
    found = [
        what
        for i, (name, said) in enumerate(sorted(entries.items()))
        if (what := _wrong(directory, name, said, hashes and i % n == place))
    ]
    extra = sorted(files_of(directory) - entries.keys()) if whole else []
    return found + [f"{name}: is not in {MANIFEST}" for name in extra]


def listed(directory: str | Path) -> Mapping[str, Any]:
    """The files that the manifest of a directory names, with size and hash.

    Raises:
        CheckpointError: there is no manifest, or it cannot be read.
    """
    return _entries(Path(directory))


def files_of(directory: Path) -> set[str]:
    """All files of a directory and its folders but the manifest."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix() for path in paths} - {MANIFEST}


def check_file(directory: str | Path, name: str) -> None:
    """Raise `CheckpointError` if a manifest lies beside the file and says otherwise (older files have none)."""
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        return
    entries = _entries(directory)
    wrong = _wrong(directory, name, entries[name], True) if name in entries else f"{name}: is not in {MANIFEST}"
    if wrong:
        raise CheckpointError(
            f"{directory}: {wrong}; restore the file, or remove {MANIFEST} if it was changed on purpose"
        )


def _entries(directory: Path) -> Mapping[str, Any]:
    try:
        data = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST}: is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: cannot be read ({' '.join(str(error).split())})") from error
    files = data["files"] if isinstance(data, dict) and list(data) == ["files"] else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{MANIFEST}: does not list files with their sizes and hashes")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
            raise CheckpointError(f"{MANIFEST}: names {name!r}, which is not a file of its directory")
    return files


def _is_entry(said: Any) -> bool:
    return isinstance(said, dict) and {key: type(value) for key, value in said.items()} == _ENTRY


def _wrong(directory: Path, name: str, said: Mapping[str, Any], hashes: bool) -> str:
    path = directory / name
    try:
        if not path.is_file():
            return f"{name}: is missing"
        if (size := path.stat().st_size) != said["size"]:
            return f"{name}: has {size} bytes, not {said['size']}"
        if hashes and sha256(path) != said["sha256"]:
            return f"{name}: altered since it was saved"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror or error})"
    return ""
