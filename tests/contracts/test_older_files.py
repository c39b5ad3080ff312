"""Files that commit 2733100 wrote (`fixtures/before_rooms/make_them.py`) still load, and its runs still go on."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lm_saes import cli
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.storage.tensors import load_tensors
from lm_saes.training.verify import verify

from ..tiny_run import HOOK

FIXTURES = Path(__file__).parents[1] / "fixtures" / "before_rooms"
RUNS = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures, from which their configs name model, text and runs."""
    copy = shutil.copytree(FIXTURES, tmp_path / "before")
    monkeypatch.chdir(copy)
    return copy


def test_every_kind_has_a_run() -> None:
    assert RUNS == ["clt", "crosscoder", "lorsa", "molt", "sae-batchtopk", "sae-jumprelu", "sae-topk"]


@every_run
def test_a_dictionary_loads_and_writes_the_same_files(name: str, tmp_path: Path) -> None:
    saved = FIXTURES / "runs" / name / "checkpoints" / "step_6"
    assert verify(saved)[0] == []
    dictionary = AbstractSparseAutoEncoder.from_pretrained(saved, fold_activation_scale=False)
    dictionary.save_pretrained(tmp_path)
    for file in ("config.json", "provenance.json", "sae_weights.safetensors"):
        assert (tmp_path / file).read_bytes() == (saved / file).read_bytes(), file


@every_run
def test_a_run_goes_on_to_the_weights_that_it_had(name: str, place: Path) -> None:
    cli.app(["train", f"{name}.yaml", "--resume"], standalone_mode=False)
    wanted, found = (
        load_tensors(place / f"{name}.safetensors"),
        load_tensors(place / "runs" / name / "sae_weights.safetensors"),
    )
    assert found.keys() == wanted.keys()
    before = load_tensors(place / "runs" / name / "checkpoints" / "step_6" / "sae_weights.safetensors")
    assert any(not torch.equal(before[key], tensor) for key, tensor in wanted.items())
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


def test_a_cache_is_kept_and_trains(place: Path) -> None:
    before = {path: path.read_bytes() for path in (place / "cache").iterdir()}
    cli.app(["generate", "cache.yaml"], standalone_mode=False)  # finds it made with the same settings
    assert {path: path.read_bytes() for path in (place / "cache").iterdir()} == before
    settings = yaml.safe_load(Path("sae-topk.yaml").read_text(encoding="utf-8"))
    del settings["model"], settings["datasets"]
    rows = {"type": "activations", "name": "cached", "path": "cache"}
    settings["activation_factory"] = {"sources": [rows], "target": "activations-1d", "hook_points": [HOOK],
                                      "batch_size": 64}  # fmt: skip
    settings["trainer"] |= {"exp_result_path": "cached", "total_training_tokens": 256}
    Path("cached.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    cli.app(["train", "cached.yaml"], standalone_mode=False)
    assert verify(place / "cached")[0] == []
