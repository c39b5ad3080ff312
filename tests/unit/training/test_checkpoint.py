"""Checkpoints: their files, whole or absent, which one is found, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_saes import SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.storage import manifest
from lm_saes.storage.manifest import write_manifest
from lm_saes.training import checkpoint
from lm_saes.training.checkpoint import find_checkpoint, join_tensors, saved_steps, split_tensors

New = Callable[..., Any]
PLAIN = {
    "config.json", "trainer.json", "manifest.json", "provenance.json",
    "sae_weights.safetensors", "optimizer.safetensors", "state.safetensors",
}  # fmt: skip


class Numbered:
    """A stream that can say where it is."""

    def __init__(self, batches: list[Any], tensor: bool = True) -> None:
        self.batches, self.at, self.tensor = batches, 0, tensor

    def __iter__(self) -> Numbered:
        return self

    def __next__(self) -> Any:
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "nested": {"list": [1, None, "x"]}} | (
            {"t": torch.arange(self.at)} if self.tensor else {}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class WandbRun:
    id = "abc123"

    def log(self, metrics: dict[str, float], step: int) -> None: ...


@pytest.fixture
def saved(run: New, new_sae: New, batches: New) -> Path:
    """A run directory with checkpoints at steps 2, 4 and 6."""
    return run(
        new_sae("topk"), batches(6), n_checkpoints=3, check_point_save_mode="linear", clip_grad_norm=1.0
    ).path  # fmt: skip


def newest(run: Path) -> Path:
    return list(saved_steps(run).values())[-1]


def test_files_of_a_step(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["step_2", "step_4", "step_6"]
    for path in (saved / "checkpoints").iterdir():
        assert {file.name for file in path.iterdir()} == PLAIN


@pytest.mark.parametrize("tensor", [False, True])
def test_files_of_a_step_with_a_stream_and_a_wandb_run(
    new_sae: New, batches: New, tmp_path: Path, tensor: bool
) -> None:
    cfg = TrainerConfig(total_training_tokens=32, n_checkpoints=1, amp_dtype=None, exp_result_path=str(tmp_path))
    Trainer(cfg).fit(new_sae("topk"), Numbered(batches(9), tensor), wandb_logger=WandbRun())
    path = tmp_path / "checkpoints" / "step_2"
    more = {"stream.json", "wandb_run_id.json"} | ({"stream.safetensors"} if tensor else set())
    assert {file.name for file in path.iterdir()} == PLAIN | more
    assert json.loads((path / "wandb_run_id.json").read_text()) == {"wandb_run_id": "abc123"}
    state = checkpoint.read_stream(path)
    assert state is not None and state["at"] == 2 and state["nested"] == {"list": [1, None, "x"]}


def test_the_manifest_has_every_size_and_hash(saved: Path) -> None:
    path = newest(saved)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == PLAIN - {"manifest.json"}
    for name, entry in listed.items():
        content = (path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_nothing_is_pickled(saved: Path) -> None:
    for file in saved.rglob("*"):
        if file.is_file():
            start = file.read_bytes()[:8]
            assert not zipfile.is_zipfile(file) and start[:1] != b"\x80", file
            assert start[:1] == b"{" if file.suffix == ".json" else file.suffix == ".safetensors", file


def test_weights_and_settings_are_those_of_that_step(saved: Path, new_sae: New, run: New, batches: New) -> None:
    short = run(new_sae("topk"), batches(4), name="short", steps=6, clip_grad_norm=1.0)
    four = saved / "checkpoints" / "step_4"
    stored = load_file(four / "sae_weights.safetensors")
    for name, p in short.sae.named_parameters():
        assert torch.equal(stored[name], p)
    progress = json.loads((four / "trainer.json").read_text())
    assert (progress["cur_step"], progress["cur_tokens"]) == (4, 64)
    assert TrainerConfig.model_validate(progress["cfg"]).clip_grad_norm == 1.0
    sae = SparseAutoEncoder.from_pretrained(four, fold_activation_scale=False)
    assert all(torch.equal(stored[name], p) for name, p in sae.named_parameters())


# --- whole or absent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["save_tensors", "_write_json", "write_manifest"])
def test_a_failure_while_saving_leaves_nothing_new_and_the_old_intact(
    saved: Path, new_sae: New, batches: New, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = {path: path.read_bytes() for path in (saved / "checkpoints").rglob("*") if path.is_file()}
    sae = new_sae("topk")
    trainer = Trainer.from_checkpoint(sae, saved / "checkpoints" / "step_4")
    trainer.cfg.exp_result_path = str(saved)
    calls, real = [], getattr(checkpoint, function)

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (2 if function == "save_tensors" else 1):
            raise OSError("disk full")
        return real(*args)

    trainer.cur_step = 5
    monkeypatch.setattr(checkpoint, function, failing)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(sae, saved)
    assert {path: path.read_bytes() for path in (saved / "checkpoints").rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["step_2", "step_4", "step_6"]
    monkeypatch.setattr(checkpoint, function, real)
    trainer.save_checkpoint(sae, saved)  # and the next attempt works
    assert list(saved_steps(saved)) == [2, 4, 5, 6]


def test_a_new_run_does_not_mix_with_an_older_one(saved: Path, run: New, new_sae: New, batches: New) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"exp_result_path='.*run': holds a run already; resume it, remove it, or"):
        run(new_sae("topk"), batches(2), steps=2, n_checkpoints=1)
    (saved / "sae_weights.safetensors").rename(saved / "moved")
    with pytest.raises(ConfigError, match="holds a run already"):  # checkpoints are enough
        run(new_sae("topk"), batches(2), steps=2, n_checkpoints=1)
    other = saved.parent / "other"
    run(new_sae("topk"), batches(2), steps=2, n_checkpoints=1, name="other")
    with pytest.raises(ConfigError, match="other': holds a run already"):  # nor does one that goes on from elsewhere
        run(new_sae("topk"), batches(9), steps=9, name="other", clip_grad_norm=1.0, from_pretrained_path=str(saved))
    (saved / "moved").rename(saved / "sae_weights.safetensors")
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert list(saved_steps(other)) == [2]


def test_a_step_that_is_there_already_is_replaced(saved: Path, new_sae: New, batches: New) -> None:
    """A run that goes on from an older step writes the later ones again, also over an altered one."""
    (saved / "checkpoints" / "step_6" / "state.safetensors").write_bytes(b"")
    sae = new_sae("topk")
    trainer = Trainer.from_checkpoint(sae, saved / "checkpoints" / "step_4")
    trainer.fit(sae, batches(6)[4:])
    assert find_checkpoint(saved) == saved / "checkpoints" / "step_6"
    stored = load_file(saved / "checkpoints" / "step_6" / "sae_weights.safetensors")
    assert torch.equal(stored["W_E"], sae.W_E)


# --- which one -------------------------------------------------------------------------------------------------------


def test_a_run_means_its_newest_step_and_a_step_itself(saved: Path) -> None:
    assert find_checkpoint(saved) == saved / "checkpoints" / "step_6"
    assert find_checkpoint(str(saved / "checkpoints" / "step_2")) == saved / "checkpoints" / "step_2"
    shutil.copytree(saved / "checkpoints" / "step_6", saved / "checkpoints" / "step_10")
    assert find_checkpoint(saved).name == "step_10"  # by number, not by name
    (saved / "checkpoints" / "step_x").mkdir()
    assert list(saved_steps(saved)) == [2, 4, 6, 10]


def tear_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def tear_file(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def tear_end(path: Path) -> None:
    content = (path / "sae_weights.safetensors").read_bytes()
    (path / "sae_weights.safetensors").write_bytes(content[:-1])


@pytest.mark.parametrize("tear", [tear_manifest, tear_file, tear_end])
def test_a_torn_step_is_passed_over(saved: Path, tear: Callable[[Path], None]) -> None:
    tear(saved / "checkpoints" / "step_6")
    assert find_checkpoint(saved).name == "step_4"
    with pytest.raises(CheckpointError, match=r"step_6'?: torn, .*; use an older checkpoint"):
        find_checkpoint(saved / "checkpoints" / "step_6")


def test_drafts_are_not_checkpoints(saved: Path) -> None:
    (saved / "checkpoints" / "step_6").rename(saved / "checkpoints" / ".step_6.draft")
    assert find_checkpoint(saved).name == "step_4"


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "state.safetensors", "trainer.json"])
def test_an_altered_file_is_noticed(saved: Path, new_sae: New, file: str, caplog: pytest.LogCaptureFixture) -> None:
    path = newest(saved) / file
    content = bytearray(path.read_bytes())
    digit = next(i for i in range(len(content) - 1, 0, -1) if 48 <= content[i] <= 56 or file.endswith("tensors"))
    content[digit] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"step_6'?: torn, {file}: altered since it was saved; use an older"):
        Trainer.from_checkpoint(new_sae("topk"), newest(saved))
    with caplog.at_level("WARNING"):
        assert Trainer.from_checkpoint(new_sae("topk"), saved).cur_step == 4
    assert f"step_6: torn, {file}: altered since it was saved; going on from step_4 instead" in caplog.text


@pytest.mark.parametrize("way", ["from_checkpoint", "from_pretrained_path"])
def test_every_file_is_hashed_once(
    saved: Path, new_sae: New, run: New, batches: New, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    real, hashed = manifest.sha256, list[Path]()

    def counted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(manifest, "sha256", counted)
    if way == "from_checkpoint":
        Trainer.from_checkpoint(new_sae("topk"), saved)
    else:
        run(new_sae("topk"), batches(1), steps=7, clip_grad_norm=1.0, from_pretrained_path=str(saved))
    step = saved / "checkpoints" / "step_6"
    assert sorted(path.name for path in hashed if path.parent == step) == sorted(PLAIN - {"manifest.json"})


@pytest.mark.parametrize("field", ["cfg", "batch_tokens", "cur_step", "cur_tokens"])
def test_progress_that_says_too_little_is_refused(saved: Path, new_sae: New, field: str) -> None:
    """However honest its manifest: nothing starts again from 0 unasked."""
    directory = newest(saved)
    progress = json.loads((directory / "trainer.json").read_text())
    del progress[field]
    (directory / "trainer.json").write_text(json.dumps(progress))
    (directory / "manifest.json").unlink()
    write_manifest(directory)
    with pytest.raises(CheckpointError, match=rf"trainer.json: has no '{field}'; go on from another checkpoint"):
        Trainer.from_checkpoint(new_sae("topk"), directory)


@pytest.mark.parametrize("name", ["rng.cpu", "tokens_since_last_activation"])
def test_statistics_that_are_not_there_are_named(saved: Path, new_sae: New, name: str) -> None:
    directory = newest(saved)
    tensors = load_file(directory / "state.safetensors")
    del tensors[name]
    save_file(tensors, directory / "state.safetensors")
    (directory / "manifest.json").unlink()
    write_manifest(directory)
    with pytest.raises(CheckpointError, match=rf"state.safetensors: has no '{name}'"):
        Trainer.from_checkpoint(new_sae("topk"), directory)


# --- refusals --------------------------------------------------------------------------------------------------------


def other_shape(new_sae: New, saved: Path) -> AbstractSparseAutoEncoder:
    return new_sae("topk", latents=40)


def other_kind(new_sae: New, saved: Path) -> AbstractSparseAutoEncoder:
    return new_sae("jumprelu")


def folded(new_sae: New, saved: Path) -> AbstractSparseAutoEncoder:
    return SparseAutoEncoder.from_pretrained(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folded, r"norm_activation='inference' but was trained with 'dataset-wise'; .*fold_activation_scale=False"),
        (
            other_shape,
            r"made with other settings \(sae.expansion_factor: 4.0 there, 5.0 here\); set them back, or start",
        ),
        (other_kind, r"\(sae.act_fn: 'topk' there, 'jumprelu' here; sae.top_k: 4 there, 50 here\)"),
    ],
)
def test_another_dictionary_is_refused(
    saved: Path, new_sae: New, make: Callable[..., AbstractSparseAutoEncoder], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Trainer.from_checkpoint(make(new_sae, saved), saved)
    assert "\n" not in str(caught.value)


def test_the_remedy_for_a_folded_dictionary_works(saved: Path) -> None:
    sae = SparseAutoEncoder.from_pretrained(saved, fold_activation_scale=False)
    assert Trainer.from_checkpoint(sae, saved).cur_step == 6


def test_no_checkpoint_at_all(tmp_path: Path, new_sae: New) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="holds no whole checkpoint; give a run's or a step's directory"):
            Trainer.from_checkpoint(new_sae("topk"), path)


def test_nothing_to_save_before_training(tmp_path: Path, new_sae: New) -> None:
    with pytest.raises(ConfigError, match="save_checkpoint: nothing was trained yet; call fit first"):
        Trainer(TrainerConfig()).save_checkpoint(new_sae("topk"), tmp_path)


# --- nested state ----------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"a": 1, "b": [True, None, 2.5, "x"], "c": {"d": {}}},
        {"t": torch.arange(3), "deep": {"list": [torch.zeros(2, 2), {"u": torch.ones((), dtype=torch.bool)}, 5]}},
        {"bf16": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)},
        # names that look the same when joined
        {"a.b": {"c": torch.zeros(1)}, "a": {"b.c": torch.ones(1)}},
        {"a/b": {"c": torch.zeros(1)}, "a": {"b/c": torch.ones(1)}, "a~1b": {"c": torch.ones(2)}},
    ],
)
def test_tensors_are_split_off_and_put_back(state: dict[str, Any]) -> None:
    values, tensors = split_tensors(state)
    assert same(join_tensors(json.loads(json.dumps(values)), tensors), state)


def test_a_tuple_comes_back_as_a_list_and_what_is_not_a_tensor_has_no_tensors() -> None:
    values, tensors = split_tensors({"t": (1, torch.zeros(1))})
    assert join_tensors(values, tensors) == {"t": [1, torch.zeros(1)]}
    assert split_tensors({"a": [1, {"b": "c"}]}) == ({"a": [1, {"b": "c"}]}, {})
