"""`lm-saes train --resume` and `lm-saes verify` on real runs: what is refused, what is passed over, what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes import ActivationFactory, TrainSAESettings, train_sae
from lm_saes.config import build
from lm_saes.data.factory_config import ActivationFactoryConfig
from lm_saes.data.text import DatasetConfig, load_dataset
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.load import load_language_model
from lm_saes.storage import manifest
from lm_saes.training.checkpoint import saved_steps

from ...conftest import Run
from ...tiny_run import HOOK, make_place, reading, training


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run with checkpoints at steps 4, 8 and 12."""
    train(settings(place, place / "finished"))
    return place / "finished"


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run as it was when it had just saved step 8."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step_12")
    for name in ("sae_weights.safetensors", "config.json", "manifest.json", "provenance.json", "report.html"):
        (run / name).unlink()
    return run


def settings(place: Path, run: Path, **trainer: Any) -> dict[str, Any]:
    data = training(place, run, **{"n_checkpoints": 3, **trainer})
    del data["eval"]
    return data


def train(data: dict[str, Any]) -> None:
    train_sae(build(TrainSAESettings, data))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "sae_weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- which checkpoint ------------------------------------------------------------------------------------------------


def test_a_torn_newest_checkpoint_is_named_and_passed_over(
    place: Path, finished: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = stopped / "checkpoints" / "step_8" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"step_8'?: torn, optimizer.safetensors: altered since it was saved; use"
    ):
        train(settings(place, stopped, from_pretrained_path=str(file.parent)))
    train(settings(place, stopped) | {"resume": True})
    assert f"{file.parent}: torn, optimizer.safetensors: altered since it was saved; going on from step_4 instead" in (
        caplog.messages
    )
    assert same(weights(stopped), weights(finished))
    assert list(saved_steps(stopped)) == [4, 8, 12]
    for step in (8, 12):
        assert same(*(load_file(run / "checkpoints" / f"step_{step}" / "optimizer.safetensors")
                      for run in (stopped, finished)))  # fmt: skip
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    place: Path, finished: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    train(settings(place, stopped) | {"resume": True})
    assert f"{stopped}: was stopped before its first checkpoint; it starts at step 0" in caplog.messages
    assert same(weights(stopped), weights(finished))


def test_a_run_in_a_folder_called_checkpoints(place: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "checkpoints" / "mine"))
    train(settings(place, run) | {"resume": True})
    assert same(weights(run), weights(finished))


def test_a_run_goes_on_in_another_directory(place: Path, finished: Path, stopped: Path, tmp_path: Path) -> None:
    train(settings(place, tmp_path / "other", from_pretrained_path=str(stopped)))
    assert same(weights(tmp_path / "other"), weights(finished))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run already"):  # but not in one that holds another run
        train(settings(place, stopped, from_pretrained_path=str(tmp_path / "other")))
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


# --- which settings --------------------------------------------------------------------------------------------------


def test_changed_settings_are_listed_and_nothing_is_written(place: Path, stopped: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    data: dict[str, Any] = settings(place, stopped, lr=0.5, clip_grad_norm=2.0) | {"resume": True}
    data["sae"]["top_k"] = 5
    data["model"]["model_name"] = "no such model"  # it is not even looked for
    message = (
        r"sae.top_k: 4 there, 5 here; trainer.lr: 0.01 there, 0.5 here; trainer.clip_grad_norm: 0.0 there, 2.0 here"
    )
    with pytest.raises(CheckpointError, match=rf"step_8: made with other settings \({message}\); set them back"):
        train(data)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_length_logging_and_saving_may_change(place: Path, stopped: Path) -> None:
    change = {"total_training_tokens": 14 * 64, "log_frequency": 1, "n_checkpoints": 1, "keep_last": 1}
    data = settings(place, stopped, **change, check_point_save_mode="log")
    train(data | {"resume": True})
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, *range(9, 15)]


def test_other_data_and_another_model_are_refused(place: Path, stopped: Path) -> None:
    data: dict[str, Any] = settings(place, stopped) | {"resume": True}
    data["seed"] = 3
    data["activation_factory"] |= {"context_size": 8, "buffer_size": 128}
    data["model"]["dtype"] = "bfloat16"
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="stream with other settings") as error:
        train(data)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    told = str(error.value)
    for difference in ("context_size: 16 there, 8 here", "buffer_size: 256 there, 128 here", "seed: ",
                       "model.dtype: 'float32' there, 'bfloat16' here"):  # fmt: skip
        assert difference in told, difference
    assert "\n" not in told


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_going_on_hashes_every_file_of_the_checkpoint_once(
    place: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    step, real, hashed = stopped / "checkpoints" / "step_8", manifest.sha256, list[Path]()

    def counted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(manifest, "sha256", counted)
    if by_name:
        train(settings(place, stopped, from_pretrained_path=str(step)))
    else:
        train(settings(place, stopped) | {"resume": True})
    of_the_step = sorted(path.name for path in hashed if path.parent == step)
    assert of_the_step == sorted(path.name for path in step.iterdir() if path.name != manifest.MANIFEST)


@pytest.mark.parametrize("buffer", [None, 256])
@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_runs_the_model_over_one_model_batch_at_most(
    place: Path, monkeypatch: pytest.MonkeyPatch, buffer: int | None, workers: int
) -> None:
    """However much text was consumed: positions are numbers, and the buffer's rows are saved."""
    data = reading(place, [HOOK])
    data["activation_factory"] |= {"buffer_size": buffer, "num_workers": workers}
    data["activation_factory"]["sources"][0]["epochs"] = None
    cfg = build(ActivationFactoryConfig, data["activation_factory"])
    model = load_language_model(build(LanguageModelConfig, data["model"]))
    text = {"words": load_dataset(build(DatasetConfig, data["datasets"]["words"]))}
    with ActivationFactory(cfg).process(model, text) as stream:
        for _ in range(60):  # several epochs
            next(stream)
        state, wanted = stream.state_dict(), next(stream)
    forward, passes = type(model).activations, []

    def counted(self: Any, *arguments: Any) -> Any:
        passes.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(type(model), "activations", counted)
    with ActivationFactory(cfg.model_copy(update={"num_workers": 0})).process(model, text) as again:
        again.load_state_dict(state)
        assert len(passes) <= 1
        assert torch.equal(next(again)[HOOK], wanted[HOOK])
        assert len(passes) <= 1 + 2  # a batch of 64 takes two passes over 4 contexts of 16


# --- lm-saes verify --------------------------------------------------------------------------------------------------


def test_verify(finished: Path, tmp_path: Path, lm_saes_command: Run) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    told = f"{run}: 27 files in 4 directories are as they were saved\n"
    assert lm_saes_command("verify", run) == (0, told, "")
    (run / "checkpoints" / "step_4" / "stream.json").write_text("{}")
    (run / "config.json").unlink()
    code, out, err = lm_saes_command("verify", run)
    size = (finished / "checkpoints" / "step_4" / "stream.json").stat().st_size
    assert (code, err) == (2, "")
    assert out.splitlines() == [
        f"{run}/config.json: is missing",
        f"{run}/checkpoints/step_4/stream.json: has 2 bytes, not {size}",
    ]
    step = run / "checkpoints" / "step_8"
    assert lm_saes_command("verify", step)[:2] == (
        0, f"{step}: 8 files in 1 directory are as they were saved\n",
    )  # fmt: skip
    code, out, err = lm_saes_command("verify", tmp_path / "absent")
    assert code == 2 and out == "" and err.startswith(f"lm-saes: error: {tmp_path}/absent: has neither manifest.json")
