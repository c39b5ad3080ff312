"""The command line: what a newcomer reads, and mistakes told in one line."""

import importlib
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import lm_saes
from lm_saes import cli
from lm_saes.config import BaseConfig, build
from lm_saes.errors import ConfigError, LMSaesError

from ..conftest import Run

pytestmark = pytest.mark.usefixtures("logging_as_before")


class Part(BaseConfig):
    lr: float = 1.0
    """The learning rate, which is described here in so many words that they have to be folded into several lines."""


class Settings(BaseConfig):
    part: Part = Field(default_factory=Part)
    name: str
    """What to call it."""


class Runners(types.ModuleType):
    """Stands where the real runners are: keeps what it is given, or raises what it is told to."""

    TrainSAESettings = GenerateActivationsSettings = EvaluateSAESettings = Settings

    def __init__(self) -> None:
        super().__init__("lm_saes.runners")
        self.calls: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error:
            raise self.error

    def train_from_config(self, data: dict[str, Any], *, resume: bool) -> Path:
        self._call("train", data, resume)
        return Path("results/report.html")

    def generate_from_config(self, data: dict[str, Any]) -> Path:
        self._call("generate", data)
        return Path("cache")

    def evaluate_from_config(self, data: dict[str, Any]) -> dict[str, float]:
        self._call("evaluate", data)
        return {"metrics/l0": 32.0}


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> Runners:
    stand_in = Runners()
    monkeypatch.setitem(sys.modules, "lm_saes.runners", stand_in)
    monkeypatch.setattr(lm_saes, "runners", stand_in, raising=False)
    return stand_in


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[trainer]\nlr = 1.0\n[[sources]]\nname = "a"\n')
    return path


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_shows_the_commands_and_examples(lm_saes_command: Run, arguments: list[str]) -> None:
    code, out, err = lm_saes_command(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: lm-saes")
    for expected in (
        "  train ",
        "  generate ",
        "  evaluate ",
        "  verify ",
        "  export ",
        "  settings ",
        "lm-saes train examples/quickstart.toml",
    ):
        assert expected in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "verify", "export", "settings"])
def test_every_command_explains_itself_with_an_example(lm_saes_command: Run, command: str) -> None:
    code, out, _ = lm_saes_command(command, "--help")
    assert code == 0
    assert f"    lm-saes {command} " in out
    if command not in ("settings", "verify", "export"):
        assert "--set a.b=VALUE" in out and ".toml, .yaml or .json" in out
    assert ("--resume" in out) == (command == "train")


def test_the_examples_in_the_help_are_files_that_exist(lm_saes_command: Run) -> None:
    _, out, _ = lm_saes_command("--help")
    root = Path(__file__).parents[2]
    assert all((root / word).exists() for word in out.split() if word.startswith("examples/"))


def test_version(lm_saes_command: Run) -> None:
    assert lm_saes_command("--version") == (0, f"lm-saes {lm_saes.__version__}\n", "")


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lm_saes", "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lm-saes: error: Missing argument 'CONFIG'. (see lm-saes --help)\n"


# --- what reaches the runners ----------------------------------------------------------------------------------------


def test_train_passes_on_the_file_the_overrides_and_resume(
    lm_saes_command: Run, runners: Runners, run_toml: Path
) -> None:
    code, out, err = lm_saes_command(
        "train", run_toml, "--set", "trainer.lr=2e-4", "--set", "sources.0.name=b", "--set", "seed=1", "--resume"
    )
    assert (code, out, err) == (0, "report: results/report.html\n", "")
    assert runners.calls == [("train", {"trainer": {"lr": 2e-4}, "sources": [{"name": "b"}], "seed": 1}, True)]


def test_train_does_not_resume_unasked(lm_saes_command: Run, runners: Runners, run_toml: Path) -> None:
    lm_saes_command("train", run_toml)
    assert runners.calls == [("train", {"trainer": {"lr": 1.0}, "sources": [{"name": "a"}]}, False)]


def test_generate_and_evaluate(lm_saes_command: Run, runners: Runners, run_toml: Path) -> None:
    assert lm_saes_command("generate", run_toml, "--set", "a=1") == (0, "activations: cache\n", "")
    code, out, _ = lm_saes_command("evaluate", run_toml, "--set", "b=2")
    assert code == 0 and json.loads(out) == {"metrics/l0": 32.0}
    assert [(call[0], call[1].get("a"), call[1].get("b")) for call in runners.calls] == [
        ("generate", 1, None),
        ("evaluate", None, 2),
    ]


def test_settings_prints_every_setting(lm_saes_command: Run, runners: Runners, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = lm_saes_command("settings", "generate")
    assert code == 0
    assert out == (
        "part: Part = its defaults\n"
        "part.lr: float = 1.0\n"
        "    The learning rate, which is described here in so many\n"
        "    words that they have to be folded into several lines.\n"
        "name: str (required)\n"
        "    What to call it.\n"
    )


# --- mistakes --------------------------------------------------------------------------------------------------------


def one_error_line(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("lm-saes: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("lm-saes: error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "{tmp}/missing.toml"], "missing.toml: cannot be read (No such file or directory)"),
        (["train", "{tmp}"], "cannot be read (Is a directory)"),
        (["evaluate", "{tmp}/run.ini"], "ending '.ini' is not known; use .toml, .yaml or .json"),
        (["generate", "{tmp}/broken.toml"], "broken.toml: not valid TOML: "),
        (["train", "{tmp}/run.toml", "--set", "trainer.lr"], "--set 'trainer.lr': write it as a.b=value"),
        (["train", "{tmp}/run.toml", "--set", "sources.7.name=x"], "there is no setting 'sources.7.name'"),
        (["trian", "{tmp}/run.toml"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "{tmp}/run.toml", "--rsume"], "No such option: --rsume"),
        (["train"], "Missing argument 'CONFIG'. (see lm-saes --help)"),
        (["settings", "generate", "--kind", "clt"], "--kind clt: only train has settings of a kind; remove it"),
        (["settings", "tests"], "'tests' is not one of 'train', 'generate', 'evaluate'"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    lm_saes_command: Run, runners: Runners, run_toml: Path, arguments: list[str], line: str
) -> None:
    run_toml.with_name("run.ini").write_text("")
    run_toml.with_name("broken.toml").write_text("a = \n")
    assert line in one_error_line(lm_saes_command(*(word.format(tmp=run_toml.parent) for word in arguments)))
    assert runners.calls == []


def a_validation_error() -> BaseException:
    with pytest.raises(ValueError) as caught:
        Settings.model_validate({"part": {"lr": "fast"}, "name": "x"})
    return caught.value


def a_config_error() -> BaseException:
    with pytest.raises(ConfigError) as caught:
        build(Settings, {"part": {"lrr": 3}, "name": "x"})
    return caught.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LMSaesError("trainer.lr=-1:\n must be positive"), "trainer.lr=-1: must be positive"),
        (a_config_error(), "part: unknown key 'lrr' in Part; did you mean 'lr'?"),
        (
            a_validation_error(),
            "part.lr: must be a valid number, unable to parse string as a number (got 'fast')",
        ),
        (FileNotFoundError(2, "No such file or directory", "text.txt"), "text.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", "/results"), "/results: Permission denied"),
        (OSError(30, "Read-only file system", "/results"), "/results: Read-only file system"),
    ],
)
def test_a_mistake_found_while_running_is_told_in_one_line(
    lm_saes_command: Run, runners: Runners, run_toml: Path, error: BaseException, line: str
) -> None:
    runners.error = error
    for command in ("train", "generate", "evaluate"):
        assert one_error_line(lm_saes_command(command, run_toml)) == line


def test_an_interrupt_ends_with_130(lm_saes_command: Run, runners: Runners, run_toml: Path) -> None:
    runners.error = KeyboardInterrupt()
    assert lm_saes_command("train", run_toml) == (130, "", "lm-saes: error: interrupted\n")


@pytest.mark.parametrize("bug", [ZeroDivisionError("x"), ValueError("x"), RuntimeError("x"), OSError(28, "No space")])
def test_a_bug_keeps_its_traceback(
    runners: Runners, run_toml: Path, bug: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners.error = bug
    monkeypatch.setattr(sys, "argv", ["lm-saes", "train", str(run_toml)])
    with pytest.raises(type(bug)):
        cli.main()


def test_warnings_of_the_package_are_shown_in_one_line(
    lm_saes_command: Run, runners: Runners, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger().handlers.clear()
    monkeypatch.setattr(
        runners, "generate_from_config", lambda data: logging.getLogger("lm_saes.data").info("reading %s", "text")
    )
    assert lm_saes_command("generate", run_toml)[2] == "lm-saes: reading text\n"


# --- names -----------------------------------------------------------------------------------------------------------


def test_public_names_are_lazy_listed_and_refused_when_unknown() -> None:
    assert "SparseAutoEncoder" in dir(lm_saes) and "__version__" in dir(lm_saes)
    assert lm_saes.WandbConfig is importlib.import_module("lm_saes.training.loggers.wandb").WandbConfig
    with pytest.raises(AttributeError, match="module 'lm_saes' has no attribute 'SparseAutoencoder'"):
        _ = lm_saes.SparseAutoencoder  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", lm_saes.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(lm_saes, name).__name__ == name
