"""Whole or absent: files and directories are drafted beside their place, flushed to disk, and renamed into it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def drafted(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file or directory to; on success it is flushed and takes `path`'s place.

    On an exception the draft is removed and what stood at `path` stays.
    """
    path = Path(path)
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


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file or leave the old one."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
