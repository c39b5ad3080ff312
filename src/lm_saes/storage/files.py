"""Whole or absent: files and directories are drafted beside their place, flushed to disk, and renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_saes.errors import ConfigError


@contextmanager
def drafted(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file or directory to; on success it is flushed and takes `path`'s place.

    On an exception the draft is removed and what stood at `path` stays.
    """
    path = Path(path)
    fresh = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    remove(draft)
    try:
        yield draft
        flush(draft)
        if draft.is_dir() and path.exists():
            old = path.with_name(f".{path.name}.old")
            remove(old)
            os.replace(path, old)
            os.replace(draft, path)
            remove(old)
        else:
            os.replace(draft, path)
    except BaseException:
        remove(draft)
        raise
    fsync(path.parent)
    if fresh:
        fsync(path.parent.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file or leave the old one."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as a whole JSON file or leave the old one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def made(directory: str | Path, keep: Callable[[], bool]) -> Iterator[None]:
    """Within this, `directory` exists; on an exception, unless `keep()`, all that was put into it since is removed.

    If it had to be made, it is then removed too, its parents included. What was there before stays.
    """
    directory = Path(directory)
    fresh = _absent(directory)
    before = set() if fresh else set(directory.iterdir())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if not keep():
            for path in set(directory.iterdir()) - before if directory.is_dir() else ():
                remove(path)
            _remove_empty(fresh)
        raise


def check_writable(directory: str | Path, setting: str) -> None:
    """Raise `ConfigError` if files cannot be written into `directory`, which need not exist; leaves nothing behind.

    `setting` is the one that names the directory.
    """
    path, fresh = Path(directory), list[Path]()
    try:
        fresh = _absent(path)
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".", dir=path).cleanup()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = repr(str(directory)) if len(str(directory)) <= 200 else f"{str(directory)[:200]!r}..."
        raise ConfigError(
            f"{setting}={shown}: cannot be written to ({reason}); name a directory that can be"
        ) from error
    finally:
        _remove_empty(fresh)


def _absent(directory: Path) -> list[Path]:
    """The directory and its parents as far as they do not exist, the innermost first."""
    return [path for path in (directory, *directory.parents) if not os.path.exists(path)]


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        if os.path.isdir(path) and not any(path.iterdir()):  # False too for names that no file system takes
            path.rmdir()


def inside(directory: str | Path, name: str) -> Path:
    """The path of the file `name` of a directory, for names that were read from a file.

    Raises:
        ValueError: `name` is absolute, or leads out of the directory by `..` or by a symbolic link.
    """
    path = Path(directory, name)
    if "\0" in name or not path.resolve().is_relative_to(Path(directory).resolve()):
        raise ValueError(f"{name!r} leads out of the directory")
    return path


def sha256(*paths: str | Path) -> str:
    """Hash of a file, or of several files' bytes one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def share_as_usual(path: Path) -> None:
    """Give a file the permissions that new files get here; some libraries let only the owner read what they write."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or every file and folder of a directory, to disk."""
    if path.is_dir():
        for child in path.rglob("*"):
            fsync(child)
    fsync(path)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's own list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
