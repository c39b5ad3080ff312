"""Bad configs and inputs, through the command line: one line that names setting, value, rule and remedy; exit code 2;
no traceback; nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Run
from ..tiny_run import HOOK
from .bad_inputs import (
    Place,
    change_weights,
    copy_place,
    edit_json,
    fill,
    make_whole_place,
    mask_nothing_but,
    snapshot,
    spoil_shard,
    truncate,
)

CASES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("bad_inputs.toml").read_text(encoding="utf-8")
)
SPOIL: dict[str, Callable[[Place], object]] = {
    "text that is a directory": lambda place: (place.path / "d.txt").mkdir(),
    "empty text": lambda place: place.text(""),
    "blank text": lambda place: place.text("\n \n\n"),
    "text too short to hold out": lambda place: place.text("word3"),
    "text in another encoding": lambda place: place.text(b"word3\nword5 \xff\n"),
    "a torn line": lambda place: place.text('{"text":"word3"}\n{"text":\n', "t.jsonl"),
    "a line too deep": lambda place: place.text("[" * 100_000, "t.jsonl"),
    "a number without end": lambda place: place.text("9" * 5000, "t.jsonl"),
    "another column": lambda place: place.text('{"body":"word3"}\n', "t.jsonl"),
    "half a character": lambda place: place.text('{"text":"word3 \\ud800"}\n' * 9, "t.jsonl"),
    "tokens beyond the vocabulary": lambda place: place.text('{"text":[3,500]}\n' * 9, "t.jsonl"),
    "tokens for text": lambda place: place.text('{"text":[3,5]}\n' * 9, "t.jsonl"),
    "no Parquet": lambda place: place.text("PAR1PAR1PAR1", "t.parquet"),
    "a shard that is gone": lambda place: (place.cache / "shard-00000.safetensors").unlink(),
    "a torn shard": lambda place: truncate(place.cache / "shard-00000.safetensors", 500),
    "an altered shard": lambda place: spoil_shard(place.cache, fill(HOOK, 1.0), honest=False),
    "NaN": lambda place: spoil_shard(place.cache, fill(HOOK, float("nan"))),
    "an infinity": lambda place: spoil_shard(place.cache, fill(HOOK, float("inf"))),
    "a shard of another width": lambda place: spoil_shard(
        place.cache, lambda t: t | {HOOK: t[HOOK][:, :8].contiguous()}
    ),
    "a shard without a hook point": lambda place: spoil_shard(place.cache, lambda t: {"tokens": t["tokens"]}),
    "tokens that are no numbers of tokens": lambda place: spoil_shard(
        place.cache, lambda t: t | {"tokens": t["tokens"].float()}
    ),
    "a torn index": lambda place: truncate(place.cache / "index.json", 50),
    "an index too deep": lambda place: (place.cache / "index.json").write_text("[" * 100_000),
    "an index of another version": lambda place: edit_json(
        place.cache / "index.json", lambda index: index.update(format_version=9)
    ),
    "an index without shards": lambda place: edit_json(
        place.cache / "index.json", lambda index: index.update(shards=[])
    ),
    "a mask of nothing": lambda place: spoil_shard(place.contexts, mask_nothing_but(0)),
    "a mask of nothing, as single tokens": lambda place: spoil_shard(place.contexts, mask_nothing_but(0)),
    "a mask of another shape": lambda place: spoil_shard(
        place.contexts, lambda t: t | {"mask": t["mask"][:, :8].contiguous()}
    ),
    "contexts from single tokens": lambda place: edit_json(
        place.cache / "index.json", lambda index: index["widths"].update({"blocks.0.hook_attn_out": 16})
    ),
    "a torn model config": lambda place: truncate(place.path / "model" / "config.json", 30),
    "a model without weights": lambda place: (place.path / "model" / "model.safetensors").unlink(),
    "torn model weights": lambda place: truncate(place.path / "model" / "model.safetensors", 3000),
    "a torn tokenizer": lambda place: truncate(place.path / "model" / "tokenizer.json", 100),
    "torn weights": lambda place: truncate(place.trained / "sae_weights.safetensors", 300),
    "torn weights of an older run": lambda place: (
        truncate(place.trained / "sae_weights.safetensors", 300),
        place.forget_manifests(),
    ),
    "no weights": lambda place: ((place.trained / "sae_weights.safetensors").unlink(), place.forget_manifests()),
    "a missing tensor": lambda place: change_weights(
        place, lambda t: {name: x for name, x in t.items() if name != "W_D"}
    ),
    "a tensor of another shape": lambda place: change_weights(place, lambda t: t | {"W_D": t["W_D"][:8].contiguous()}),
    "weights that are not finite": lambda place: change_weights(place, lambda t: t | {"W_D": t["W_D"] * float("nan")}),
    "a torn config of a dictionary": lambda place: (
        truncate(place.trained / "config.json", 30),
        place.forget_manifests(),
    ),
    "torn settings of a run": lambda place: truncate(place.trained / "settings.json", 30),
    "a run without a model": lambda place: (place.trained / "settings.json").unlink(),
    "torn checkpoints": lambda place: [
        truncate(file, 10) for file in place.trained.glob("checkpoints/*/optimizer.safetensors")
    ],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_whole_place(tmp_path_factory.mktemp("original"))


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    return copy_place(original, tmp_path)


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers shows one while it loads weights, which is no part of a mistake."""
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)


def check_line(result: tuple[int, str, str], says: str) -> None:
    """Exit code 2, nothing on stdout, and on stderr one line (besides what was logged) that says what it should."""
    code, out, err = result
    logged, mistake = err.rstrip("\n").rpartition("lm-saes: error: ")[::2]
    assert (code, out) == (2, ""), err
    assert mistake and "\n" not in mistake and "Traceback" not in err, err
    assert all(line.startswith("lm-saes: checkpoints: ") for line in logged.splitlines()), err
    at = 0
    for phrase in says.split("..."):
        found = mistake.find(phrase.strip(), at)
        assert found >= 0, f"{phrase!r} is not in {mistake!r}"
        at = found + len(phrase.strip())


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60 and set(SPOIL) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(lm_saes_command: Run, place: Place, name: str) -> None:
    case, here = CASES[name], str(place.path)
    config = place.path / "config.json"
    config.write_text(json.dumps(place.config(case["config"])))
    if name in SPOIL:
        SPOIL[name](place)
    before = snapshot(place.path)
    arguments = [word for setting in case.get("set", []) for word in ("--set", setting.replace("{place}", here))]
    arguments += ["--resume"] if case.get("resume") else []
    command = case["config"] if case["config"] in ("generate", "evaluate") else "train"
    check_line(lm_saes_command(command, config, *arguments), case["says"].replace("{place}", here))
    assert snapshot(place.path) == before


def test_the_configs_that_are_spoilt_work(lm_saes_command: Run, place: Place) -> None:
    """Else a test above might pass for another reason."""
    config = place.path / "config.json"
    for name in ("train", "cached", "contexts", "generate", "evaluate"):
        data = place.config(name)
        if "trainer" in data:
            data["trainer"]["exp_result_path"] = str(place.path / name)
        config.write_text(json.dumps(data))
        code, _, err = lm_saes_command(name if name in ("generate", "evaluate") else "train", config)
        assert code == 0, err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.toml", None, "config {path}: cannot be read (No such file or directory); give a TOML, YAML or"),
        ("run.ini", "a = 1", "config {path}: ending '.ini' is not known; use .toml, .yaml or .json"),
        ("run.toml", "sae = ", "config {path}: not valid TOML: ... (at end of document); correct the file"),
        ("run.json", '{"sae": ', "config {path}: not valid JSON: ...; correct the file"),
        ("run.json", "[1]", "config {path}: the top level must be a table of settings, not list"),
        ("run.json", "[" * 100_000, "config {path}: not valid JSON: maximum recursion depth ...; correct the file"),
        ("run.yaml", "a: [1", "config {path}: not valid YAML: ...; correct the file"),
        ("run.yaml", "", "config {path}: the top level must be a table of settings, not NoneType"),
        ("run.toml", b"\xff\xfe", "config {path}: cannot be read ('utf-8' codec ...); give a TOML, YAML or JSON file"),
        ("run.json", "{}", "sae: required, but not set; add it; and 1 more mistake"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_a_config_that_is_none(
    lm_saes_command: Run, tmp_path: Path, command: str, name: str, content: str | bytes | None, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = snapshot(tmp_path)
    if content == "{}" and command != "train":
        says = {"generate": "set; add it; and 3 more", "evaluate": "sae: required, but not set"}[command]
    check_line(lm_saes_command(command, path), says.replace("{path}", str(path)))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("config", "setting"), [("train", "model.device"), ("cached", "device_type")])
def test_cuda_where_there_is_none(place: Place, config: str, setting: str) -> None:
    path = place.path / "config.json"
    path.write_text(json.dumps(place.config(config)))
    done = subprocess.run(  # a process of its own, as CUDA's devices can be hidden only before it looks for them
        [sys.executable, "-m", "lm_saes", "train", str(path), "--set", f"{setting}=cuda"],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    says = f"{setting.removeprefix('model.')}='cuda' is not available here (...); use 'cpu'"
    check_line((done.returncode, done.stdout, done.stderr), says)
    assert not place.run.exists()


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read and write everything: be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("config", "forbidden", "mode", "says"),
    [
        ("train", "config.json", 0o000, "config {place}/config.json: cannot be read (Permission denied); give"),
        ("train", "text.txt", 0o000, "'{place}/text.txt': cannot be read (Permission denied); give"),
        ("train", "model/model.safetensors", 0o000, "model_name='{place}/model': the model cannot be loaded ("),
        ("train", "out", 0o555, "trainer.exp_result_path='{place}/out/run': cannot be written to (Permission denied)"),
        ("generate", "out", 0o555, "writer.cache_dir='{place}/out': cannot be written to (Permission denied); name"),
        ("cached", "cache/shard-00000.safetensors", 0o000, "cannot be read (... Permission denied"),
        ("cached", "cache", 0o000, "cache {place}/cache: index.json cannot be read (Permission denied); see to"),
        ("evaluate", "trained", 0o555, "sae='{place}/trained': cannot be written to (Permission denied); name"),
        ("evaluate", "trained/config.json", 0o000, "{place}/trained: config.json: cannot be read (Permission denied)"),
        ("evaluate", "trained/sae_weights.safetensors", 0o000, "cannot be read (Permission denied"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_or_written(
    lm_saes_command: Run, original: Place, config: str, forbidden: str, mode: int, says: str
) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to others
        place = copy_place(original, Path(name))
        (place.path / "out").mkdir()
        path = place.path / "config.json"
        path.write_text(json.dumps(place.config(config)))
        for each in (place.path, *place.path.rglob("*")):
            os.chmod(each, 0o777 if each.is_dir() else 0o666)
        before = snapshot(place.path)
        (place.path / forbidden).chmod(mode)
        with without_privileges():
            result = lm_saes_command(config if config in ("generate", "evaluate") else "train", path)
        (place.path / forbidden).chmod(0o777)
        check_line(result, says.replace("{place}", name))
        assert snapshot(place.path) == before
