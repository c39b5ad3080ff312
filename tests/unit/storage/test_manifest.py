"""Manifests: every flipped bit and every cut is noticed, and names stay inside their directory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from lm_saes import Initializer, InitializerConfig, SAEConfig, SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.errors import CheckpointError
from lm_saes.storage.manifest import MANIFEST, check_file, problems, write_manifest
from lm_saes.training.checkpoint import find_checkpoint, saved_steps
from lm_saes.training.verify import verify

HOOK = "blocks.0.hook_resid_post"


class Positioned:
    """A stream with a position and a buffer, so that a checkpoint has every file that there can be."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Positioned:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        self.at += 1
        generator = torch.Generator().manual_seed(self.at)
        return {HOOK: torch.randn(8, 4, generator=generator), "tokens": torch.arange(8)}

    def state_dict(self) -> dict[str, object]:
        return {"at": self.at, "buffer": torch.arange(20) * self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class WandbRun:
    id = "abc123"

    def log(self, metrics: dict[str, float], step: int) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    path = tmp_path_factory.mktemp("run")
    sae = new_sae()
    cfg = TrainerConfig(
        total_training_tokens=32, n_checkpoints=2, check_point_save_mode="linear", lr_warm_up_steps=0,
        amp_dtype=None, log_frequency=1, exp_result_path=str(path),
    )  # fmt: skip
    Trainer(cfg).fit(sae, Positioned(), wandb_logger=WandbRun())
    assert list(saved_steps(path)) == [2, 4]
    return path


def new_sae() -> SparseAutoEncoder:
    cfg = SAEConfig(hook_point_in=HOOK, hook_point_out=HOOK, d_model=4, expansion_factor=2, act_fn="topk", top_k=2)
    sae = Initializer(InitializerConfig()).initialize_sae_from_config(cfg, activation_norm={HOOK: 2.0})
    assert isinstance(sae, SparseAutoEncoder)
    return sae


@pytest.fixture
def step(run: Path, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint."""
    return Path(shutil.copytree(run / "checkpoints" / "step_4", tmp_path / "step_4"))


# --- what is noticed -------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(step: Path) -> None:
    """200 at random: each file of a checkpoint in turn, the manifest itself among them."""
    dice = random.Random(0)
    files = sorted(step.iterdir())
    assert len(files) == 10 and problems(step, whole=True) == []
    missed = []
    for i in range(200):
        file = files[i % len(files)]
        content = file.read_bytes()
        bit = dice.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        found = problems(step, whole=True)
        if not any(file.name in line or MANIFEST in line or file.name == MANIFEST for line in found):
            missed.append((file.name, bit))
        with pytest.raises(
            CheckpointError, match=r"^from_pretrained_path='.*step_4': torn, .*; use an older checkpoint$"
        ):
            find_checkpoint(step)
        file.write_bytes(content)
    assert missed == [] and find_checkpoint(step) == step


def test_every_bit_of_a_manifest_counts(step: Path) -> None:
    """There are no bits in it that mean nothing (every seventh is tried: all places of a byte, all kinds of bytes)."""
    content = (step / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (step / MANIFEST).write_bytes(flipped)
        assert problems(step, whole=True), (bit, content[bit // 8 - 20 : bit // 8 + 20])


def test_every_cut_is_noticed(step: Path) -> None:
    dice = random.Random(1)
    files = sorted(step.iterdir())
    for i in range(50):
        file = files[i % len(files)]
        content = file.read_bytes()
        file.write_bytes(content[: dice.randrange(len(content))])
        assert any(file.name in line for line in problems(step, hashes=False, whole=True)), file
        with pytest.raises(CheckpointError, match="torn"):
            find_checkpoint(step)
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "sae_weights.safetensors", "provenance.json", MANIFEST])
def test_a_changed_dictionary_is_not_loaded(run: Path, tmp_path: Path, name: str) -> None:
    """Of a saved dictionary every file is read at loading, so flips in every one are noticed then."""
    new_sae().save_pretrained(tmp_path)
    SparseAutoEncoder.from_pretrained(run).save_pretrained(tmp_path)
    dice, content = random.Random(2), (tmp_path / name).read_bytes()
    for _ in range(25):
        bit = dice.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(CheckpointError) as error:
            SparseAutoEncoder.from_pretrained(tmp_path)
        assert name in str(error.value) or MANIFEST in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / name).write_bytes(content)
    SparseAutoEncoder.from_pretrained(tmp_path)


def test_a_dictionary_without_a_manifest_loads_without_a_word(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SparseAutoEncoder.from_pretrained(run).save_pretrained(tmp_path)
    (tmp_path / MANIFEST).unlink()
    caplog.clear()
    SparseAutoEncoder.from_pretrained(tmp_path)
    assert caplog.messages == []


def test_a_dictionary_that_was_saved_again_half_is_not_called_altered(run: Path, tmp_path: Path) -> None:
    """The weights are new, then the process dies: the old manifest must be gone by then."""
    old, new = SparseAutoEncoder.from_pretrained(run), new_sae()
    old.save_pretrained(tmp_path)

    def dies(directory: object) -> None:
        raise KeyboardInterrupt

    new.cfg = new.cfg.model_copy()
    object.__setattr__(new.cfg, "save_hyperparameters", dies)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


# --- what it may say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", "", "a\\b"])
def test_names_stay_inside(step: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("")
    data = json.loads((step / MANIFEST).read_text())
    data["files"][name] = data["files"]["config.json"]
    (step / MANIFEST).write_text(json.dumps(data))
    assert problems(step) == [f"{MANIFEST}: names {name!r}, which is not a file of its directory"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"size": "1", "sha256": ""}}}',
     '{"files": {"a": {"size": true, "sha256": ""}}}', '{"files": {}, "more": 1}', "\xff"],
)  # fmt: skip
def test_what_is_not_a_manifest(step: Path, text: str) -> None:
    (step / MANIFEST).write_bytes(text.encode("latin-1"))
    (line,) = problems(step)
    assert line.startswith(f"{MANIFEST}: ") and "\n" not in line
    with pytest.raises(CheckpointError, match=MANIFEST):
        check_file(step, "config.json")


def test_files_that_nobody_listed(step: Path) -> None:
    (step / "more.json").write_text("{}")
    assert problems(step, whole=True) == ["more.json: is not in manifest.json"]
    assert problems(step) == []  # a run's directory has others too


def test_a_manifest_of_folders(tmp_path: Path) -> None:
    (tmp_path / "weights.dcp").mkdir()
    (tmp_path / "weights.dcp" / "0.safetensors").write_bytes(b"x")
    write_manifest(tmp_path)
    assert problems(tmp_path, whole=True) == []
    (tmp_path / "weights.dcp" / "0.safetensors").write_bytes(b"y")
    assert problems(tmp_path, whole=True) == ["weights.dcp/0.safetensors: altered since it was saved"]


# --- lm-saes verify --------------------------------------------------------------------------------------------------


def test_a_run_a_checkpoint_and_a_dictionary_are_verified(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert verify(copy) == ([], 3 + 9 + 9, 3)
    assert verify(copy / "checkpoints" / "step_2") == ([], 9, 1)
    SparseAutoEncoder.from_pretrained(run).save_pretrained(tmp_path / "alone")
    assert verify(tmp_path / "alone") == ([], 3, 1)

    (copy / "config.json").unlink()
    (copy / "checkpoints" / "step_2" / "optimizer.safetensors").write_bytes(b"")
    (copy / "checkpoints" / "step_4" / "stray").write_bytes(b"")
    wrong, *_ = verify(copy)
    assert [line.removeprefix(f"{copy}/") for line in wrong] == [
        "config.json: is missing",
        f"checkpoints/step_2/optimizer.safetensors: has 0 bytes, not "
        f"{(run / 'checkpoints' / 'step_2' / 'optimizer.safetensors').stat().st_size}",
        "checkpoints/step_4/stray: is not in manifest.json",
    ]
    (copy / "checkpoints" / "step_4" / MANIFEST).unlink()
    assert f"{copy}/checkpoints/step_4/manifest.json: is missing" in verify(copy)[0]
    with pytest.raises(CheckpointError, match=r"has neither manifest.json nor checkpoints; give a run's"):
        verify(tmp_path)
