"""Directories that are made only if what is to go into them works, and names that stay inside."""

import hashlib
from pathlib import Path

import pytest

from lm_saes.errors import ConfigError
from lm_saes.storage.files import check_writable, inside, made, sha256


def names(path: Path) -> set[str]:
    return {str(item.relative_to(path)) for item in path.rglob("*")}


@pytest.mark.parametrize("keep", [False, True])
def test_what_was_made_for_nothing_is_removed_unless_it_is_to_be_kept(tmp_path: Path, keep: bool) -> None:
    with pytest.raises(ZeroDivisionError), made(tmp_path / "a" / "b", keep=lambda: keep):
        (tmp_path / "a" / "b" / "file").write_text("x")
        (tmp_path / "a" / "b" / "folder" / "in").mkdir(parents=True)
        raise ZeroDivisionError
    assert names(tmp_path) == ({"a", "a/b", "a/b/file", "a/b/folder", "a/b/folder/in"} if keep else set())


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(KeyboardInterrupt), made(tmp_path, keep=lambda: False):
        (tmp_path / "new").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == {"mine"}


def test_what_works_stays(tmp_path: Path) -> None:
    with made(tmp_path / "a" / "b", keep=lambda: False):
        pass
    assert names(tmp_path) == {"a", "a/b"}


def test_a_directory_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_writable(tmp_path, "out")
    check_writable(tmp_path / "a" / "b", "out")
    assert names(tmp_path) == set()
    (tmp_path / "file").write_text("x")
    for wrong, reason in ((tmp_path / "file", "File exists"), (tmp_path / "new" / ("x" * 300), "File name too long")):
        with pytest.raises(ConfigError, match=rf"^out='.*: cannot be written to \({reason}\); name a directory"):
            check_writable(wrong, "out")
    assert names(tmp_path) == {"file"}


def test_names_that_lead_out_of_a_directory(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "out").symlink_to(tmp_path)
    (place / "in").symlink_to(place)
    for name in ("a", "a/b", "a/../b", "in/a", "in/in/a"):
        assert inside(place, name) == place / name
    for name in ("..", "../place2/a", "a/../../b", "/etc/passwd", "out/a", "in/out/a", "a\0b"):
        with pytest.raises(ValueError, match="leads out of the directory"):
            inside(place, name)


def test_files_are_hashed_as_if_they_were_one(tmp_path: Path) -> None:
    contents = [b"", b"abc", bytes(range(256)) * 5000]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert sha256(*paths) == hashlib.sha256(b"".join(contents)).hexdigest()
    assert sha256(str(paths[2])) == hashlib.sha256(contents[2]).hexdigest()
    assert sha256() == hashlib.sha256().hexdigest()
