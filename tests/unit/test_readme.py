"""What README and docs show is run, or checked against what is there: code, configs, commands, links."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

import lm_saes
from lm_saes import cli
from lm_saes.config import BaseConfig, apply_overrides, build, read_document
from lm_saes.errors import ConfigError
from lm_saes.runners import train_settings_class

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
NOT_OURS = {"git", "cd", "pip", "pytest", "export"}
"""Commands that pages may show and that nothing here can check."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S[^\n]*)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: m.start()].count("\n") + 1, m.group(1) or "", m.group(2)) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.info.split(" ")[0] == language]


def settings_class(document: Mapping[str, Any]) -> type[BaseConfig]:
    """The settings that a whole config file is for, by what only they have."""
    if "trainer" in document:
        return train_settings_class(document["sae"].get("sae_type", "sae"))
    return lm_saes.GenerateActivationsSettings if "writer" in document else lm_saes.EvaluateSAESettings


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `changes` laid over it."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def check_command(words: list[str]) -> None:
    """Fail unless a shell command's program, target, subcommand, config and overrides exist."""
    match words:
        case ["make", *rest]:
            for target in (word for word in rest if "=" not in word):
                assert target in make_targets(), f"Makefile has no target {target!r}"
        case ["torchrun", *_]:
            check_command(["lm-saes", *words[words.index("lm_saes") + 1 :]])
        case ["lm-saes", command, *rest]:
            group = typer.main.get_command(cli.app)
            commands = getattr(group, "commands", {})
            assert command in commands or command.startswith("--"), f"lm-saes has no command {command!r}"
            files = [word for word in rest if word.endswith((".toml", ".yaml", ".json"))]
            overrides = [value for option, value in pairwise(rest) if option == "--set"]
            for file in files:
                document = apply_overrides(read_document(ROOT / file), overrides)
                build(settings_class(document), document)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), f"there is no file {script}"
        case [program, *_]:
            assert program in NOT_OURS, f"{program!r} is not a command that this test knows how to check"


def test_every_block_says_what_it_is() -> None:
    unknown = [str(b) for b in BLOCKS if b.info.split(" ")[0] not in {"python", "toml", "sh", "text", "json"}]
    assert not unknown, f"fences without a language that is checked here: {unknown}"
    assert {"python", "toml", "sh"} <= {block.info for block in blocks_of(ROOT / "README.md")}


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=pytest.mark.long if "long" in b.info.split() else ()) for b in of_language("python")],
    ids=str,
)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registries: None) -> None:
    """A block that takes minutes is fenced as `python long` and runs with the long tests."""
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})


def test_the_kind_that_is_shown_is_the_one_that_is_tested() -> None:
    shown = next(block for block in blocks_of(ROOT / "docs" / "EXTENDING.md") if "class Tied(" in block.text)
    tested = (ROOT / "tests" / "contracts" / "toy.py").read_text(encoding="utf-8")
    assert tested.endswith(shown.text) and shown.text.startswith("from collections.abc")


@pytest.mark.parametrize("block", of_language("toml"), ids=str)
def test_toml_is_a_valid_config(block: Block) -> None:
    """A block is a whole config, or starts with `# changes to FILE` and holds what differs from that file."""
    document = tomllib.loads(block.text)
    if base := re.match(r"# changes to (\S+)", block.text):
        document = merged(read_document(ROOT / base.group(1)), document)
    build(settings_class(document), document)


@pytest.mark.parametrize("block", of_language("sh"), ids=str)
def test_commands_exist(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            check_command(words)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid_configs(path: Path) -> None:
    document = read_document(path)
    build(settings_class(document), document)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrat",
        "lm-saes trian examples/quickstart.toml",
        "lm-saes train examples/quickstart.toml --set sae.topk=3",
        "lm-saes train examples/absent.toml",
        "python -m lm_saes.demos",
        "python benchmarks/absent.py",
        "curl somewhere",
    ],
)
def test_the_checks_can_fail(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        check_command(shlex.split(command))
