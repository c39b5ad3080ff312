"""No file that a stranger hands over can run code, or name a file outside its own directory."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lm_saes import AbstractSparseAutoEncoder, SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.config import build, read_document
from lm_saes.data.activity import Activity
from lm_saes.data.cache import ActivationCache, CachedSource
from lm_saes.data.text import DatasetConfig, load_dataset
from lm_saes.dictionaries.weight_files import load_weights
from lm_saes.errors import LMSaesError
from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.load import load_language_model
from lm_saes.report.report import write_report
from lm_saes.runners import evaluate_from_config, train_from_config
from lm_saes.storage.manifest import write_manifest
from lm_saes.storage.tensors import load_tensors

from ..conftest import Run
from ..tiny_run import HOOK
from .bad_inputs import Place, copy_place, edit_json, make_whole_place
from .bombs import (
    BINARY,
    in_arrow,
    in_module,
    in_numpy,
    in_old_pickle,
    in_old_torch,
    in_parquet,
    in_pickle,
    in_tar,
    in_torch,
    in_yaml,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_whole_place(tmp_path_factory.mktemp("original"))
    shutil.rmtree(place.trained / "checkpoints" / "step_2")
    return place


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    return copy_place(original, tmp_path)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that must not be there in the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


Use = Callable[[Place], object]


def train(place: Place, config: str = "train", **trainer: Any) -> Path:
    data = place.config(config)
    data["trainer"] |= trainer
    return train_from_config(data, resume="from_pretrained_path" in trainer)


def refused(use: Callable[[], object]) -> None:
    with pytest.raises(LMSaesError) as caught:
        use()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # of the marker being left open
def test_the_files_would_run_code_if_they_were_unpickled(tmp_path: Path) -> None:
    unsafe: dict[Callable[[Path], bytes], Callable[[bytes], Any]] = {
        in_pickle: pickle.loads,
        in_old_pickle: pickle.loads,
        in_torch: lambda content: torch.load(io.BytesIO(content), weights_only=False),
        in_old_torch: lambda content: torch.load(io.BytesIO(content), weights_only=False),
        in_numpy: lambda content: numpy.load(io.BytesIO(content), allow_pickle=True),
        in_yaml: lambda content: yaml.unsafe_load(content),
    }
    assert set(BINARY) < set(unsafe)
    for number, (bomb, load) in enumerate(unsafe.items()):
        marker = tmp_path / str(number)
        load(bomb(marker)).close() if bomb is in_yaml else load(bomb(marker))
        assert marker.exists()
    exec(in_module(tmp_path / "code"))
    assert (tmp_path / "code").exists()


# --- dictionaries ----------------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": AbstractSparseAutoEncoder.from_pretrained,
    "from_pretrained, not strict": lambda path: SparseAutoEncoder.from_pretrained(path, strict_loading=False),
    "from_local": lambda path: SparseAutoEncoder.from_local(path, fold_activation_scale=False),
    "evaluate": lambda path: evaluate_from_config({"sae": str(path)}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "sae_weights.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("manifest", ["none", "honest"])
def test_dictionaries(place: Place, marker: Path, loader: str, name: str, manifest: str) -> None:
    for bomb in BINARY:
        place.forget_manifests()
        if name == "sae_weights.pt":
            (place.trained / "sae_weights.safetensors").unlink(missing_ok=True)
        (place.trained / name).write_bytes(bomb(marker))
        if manifest == "honest" and name != "manifest.json":
            write_manifest(place.trained, ["config.json", *(path.name for path in place.trained.glob("sae_weights.*"))])
        refused(lambda: LOADERS[loader](place.trained))
        assert not marker.exists()


def test_weights_given_as_files(tmp_path: Path, marker: Path) -> None:
    for bomb in BINARY:
        for name in ("x.safetensors", "x.pt", "x.bin", "x.pkl", "x"):
            (tmp_path / name).write_bytes(bomb(marker))
            refused(lambda name=name: load_weights(tmp_path / name))
            refused(lambda name=name: load_tensors(tmp_path / name))
            refused(lambda name=name: SparseAutoEncoder.from_pretrained(tmp_path / name))


def test_distributed_checkpoints_with_pickled_metadata(place: Place, marker: Path) -> None:
    (place.trained / "sae_weights.safetensors").unlink()
    place.forget_manifests()
    for name in ("sae_weights.dcp", "optimizer.dcp"):
        (place.trained / name).mkdir()
        for bomb in BINARY:
            (place.trained / name / ".metadata").write_bytes(bomb(marker))
            (place.trained / name / "__0_0.distcp").write_bytes(bomb(marker))
            refused(lambda: AbstractSparseAutoEncoder.from_pretrained(place.trained))


def test_old_weights_that_hold_tensors_only_still_load(place: Place) -> None:
    sae = SparseAutoEncoder.from_pretrained(place.trained, fold_activation_scale=False)
    torch.save({"sae": load_file(place.trained / "sae_weights.safetensors")}, place.trained / "sae_weights.pt")
    (place.trained / "sae_weights.safetensors").unlink()
    place.forget_manifests()
    old = SparseAutoEncoder.from_pretrained(place.trained, fold_activation_scale=False)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), old.parameters(), strict=True))


# --- checkpoints -----------------------------------------------------------------------------------------------------

CHECKPOINT = (
    "config.json", "sae_weights.safetensors", "optimizer.safetensors", "state.safetensors", "stream.safetensors",
    "trainer.json", "stream.json", "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("honest", [False, True])
@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints(place: Place, marker: Path, name: str, honest: bool) -> None:
    step = place.trained / "checkpoints" / "step_4"
    assert set(CHECKPOINT) <= {path.name for path in step.iterdir()}
    for bomb in BINARY:
        (step / name).write_bytes(bomb(marker))
        if honest and name != "manifest.json":
            (step / "manifest.json").unlink()
            write_manifest(step)
        refused(lambda: train(place, exp_result_path=str(place.trained), from_pretrained_path=str(step)))
        refused(lambda: train(place, exp_result_path=str(place.trained), from_pretrained_path=str(place.trained)))
        sae = SparseAutoEncoder.from_config(build(type(_config(place)), _config(place).to_json()))
        refused(lambda sae=sae: Trainer.from_checkpoint(sae, step).fit(sae, []))
        sae = SparseAutoEncoder.from_config(_config(place))
        refused(lambda sae=sae: Trainer(TrainerConfig(from_pretrained_path=str(step))).fit(sae, []))
        assert not marker.exists()


def _config(place: Place) -> Any:
    from lm_saes import SAEConfig

    return build(SAEConfig, place.config("train")["sae"])


def test_other_files_beside_a_checkpoint_are_not_looked_into(place: Place, marker: Path) -> None:
    for name in ("optimizer.pt", "trainer.pt", "stream.pt", "scheduler.pkl", "rng_state.pth", "training_args.bin"):
        (place.trained / name).write_bytes(in_torch(marker))
        (place.trained / "checkpoints" / name).write_bytes(in_torch(marker))
    report = train(place, exp_result_path=str(place.trained), from_pretrained_path=str(place.trained))
    assert report.exists()


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.json", "shard-00000.safetensors"])
def test_caches(place: Place, marker: Path, name: str) -> None:
    for bomb in BINARY:
        (place.cache / name).write_bytes(bomb(marker))
        if name != "index.json":
            _index(place.cache, name)
        refused(lambda: train(place, "cached"))


def _index(cache: Path, name: str) -> None:
    """Make the index of a cache know `name` as its only shard."""
    content = (cache / name).read_bytes()
    entry = {"file": name, "n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_json(cache / "index.json", lambda index: index["shards"][0].update(entry))


@pytest.mark.parametrize("ending", ["pt", "bin", "npy", "pkl", "npz"])
def test_shards_of_other_kinds(place: Place, marker: Path, ending: str) -> None:
    for bomb in BINARY:
        (place.cache / f"shard.{ending}").write_bytes(bomb(marker))
        _index(place.cache, f"shard.{ending}")
        refused(lambda: train(place, "cached"))


# --- text ------------------------------------------------------------------------------------------------------------


def read(path: Path | str, **settings: Any) -> list[str]:
    cfg = DatasetConfig(dataset_name_or_path=str(path), **settings)
    return list(load_dataset(cfg).documents())


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "pkl", "pickle", "pt", "npy", "bin", "arrow", "py"])
def test_text_files(tmp_path: Path, marker: Path, ending: str) -> None:
    for bomb in BINARY:
        (tmp_path / f"text.{ending}").write_bytes(bomb(marker))
        refused(lambda: read(tmp_path / f"text.{ending}"))


def test_text_files_are_only_text(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "text.txt").write_bytes(in_old_pickle(marker))  # is ASCII
    assert read(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_bytes(in_pickle(marker))
    refused(lambda: read(tmp_path / "text.txt"))


def test_columns_with_a_pickled_type(tmp_path: Path, marker: Path) -> None:
    in_parquet(tmp_path / "text.parquet", marker)
    assert read(tmp_path / "text.parquet") == ["word3 word4"] * 9
    in_arrow(_saved_dataset(tmp_path / "disk"), marker)
    assert read(tmp_path / "disk", is_dataset_on_disk=True) == ["word3 word4"] * 9


def _saved_dataset(path: Path) -> Path:
    """Save a dataset as `datasets` does, and return its file of rows."""
    import datasets

    datasets.Dataset.from_dict({"text": ["word3 word4"] * 9}).save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    return file


@pytest.mark.parametrize("name", ["*.arrow", "state.json", "dataset_info.json"])
def test_saved_datasets(tmp_path: Path, marker: Path, name: str) -> None:
    _saved_dataset(tmp_path / "disk")
    (file,) = (tmp_path / "disk").glob(name)
    for bomb in BINARY:
        file.write_bytes(bomb(marker))
        refused(lambda: read(tmp_path / "disk", is_dataset_on_disk=True))


@pytest.mark.parametrize("ending", ["pkl", "pt", "npy", "arrow", "parquet", "json"])
def test_directories_of_data_files(tmp_path: Path, marker: Path, ending: str) -> None:
    (tmp_path / "data").mkdir()
    for bomb in BINARY:
        (tmp_path / "data" / f"train.{ending}").write_bytes(bomb(marker))
        refused(lambda: read(tmp_path / "data", cache_dir=str(tmp_path / "cache")))


def test_archives_of_a_dataset(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "data").mkdir()
    in_tar(tmp_path / "data" / "train.tar", marker)
    refused(lambda: read(tmp_path / "data", cache_dir=str(tmp_path / "cache"), text_column="pth"))


def test_datasets_with_code_of_their_own(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(in_module(marker))
    refused(lambda: read(tmp_path / "data", cache_dir=str(tmp_path / "cache")))
    refused(lambda: read(tmp_path / "data" / "data.py", cache_dir=str(tmp_path / "cache")))
    (tmp_path / "data" / "train.pkl").write_bytes(in_pickle(marker))
    monkeypatch.chdir(tmp_path / "data")
    refused(lambda: read("pandas", cache_dir=str(tmp_path / "cache")))


# --- language models -------------------------------------------------------------------------------------------------

MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load(place: Place, **settings: Any) -> object:
    cfg = LanguageModelConfig(model_name=str(place.path / "model"), local_files_only=True, **settings)
    return load_language_model(cfg)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_models(place: Place, marker: Path, name: str) -> None:
    for bomb in BINARY:
        if name.startswith("pytorch"):
            (place.path / "model" / "model.safetensors").unlink(missing_ok=True)
        (place.path / "model" / name).write_bytes(bomb(marker))
        refused(lambda: load(place))
        assert not marker.exists()


def test_gguf_files(place: Place, marker: Path) -> None:
    for bomb in BINARY:
        (place.path / "model" / "x.gguf").write_bytes(bomb(marker))
        refused(lambda: load(place, gguf_file="x.gguf"))


def test_other_files_beside_a_model_are_not_looked_into(place: Place, marker: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "vocab.pkl", "vocab.bin", "adapter_model.bin", "modeling.py"):
        (place.path / "model" / name).write_bytes(in_torch(marker))
    (place.path / "model" / "model.py").write_text(in_module(marker))
    load(place)


@pytest.mark.parametrize("known", [False, True])
def test_models_with_code_of_their_own(place: Place, marker: Path, known: bool) -> None:
    """Such a model is refused, or, if transformers knows its architecture, run by the code of transformers."""
    code = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    (place.path / "model" / "code.py").write_text(in_module(marker))
    edit_json(place.path / "model" / "config.json", lambda config: config.update(auto_map=code))
    if known:
        load(place)
        return
    edit_json(place.path / "model" / "config.json", lambda config: config.update(model_type="strange"))
    with pytest.raises(LMSaesError, match=r"brings code of its own, which is never run; give a model of an arch"):
        load(place)


def test_tokenizers_with_code_of_their_own(place: Place, marker: Path) -> None:
    (place.path / "model" / "code.py").write_text(in_module(marker))
    edit_json(
        place.path / "model" / "tokenizer_config.json",
        lambda config: config.update(tokenizer_class="Strange", auto_map={"AutoTokenizer": ["code.Tokenizer", None]}),
    )
    try:
        load(place)
    except LMSaesError as error:
        assert "\n" not in str(error)


# --- configs, reports, commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["toml", "yaml", "yml", "json", "pkl", "pt", "py"])
def test_configs(tmp_path: Path, marker: Path, ending: str, lm_saes_command: Run) -> None:
    path = tmp_path / f"run.{ending}"
    for bomb in (*BINARY, in_yaml, lambda marker: in_module(marker).encode()):
        path.write_bytes(bomb(marker))
        refused(lambda: read_document(path))
        for name in ("train", "generate", "evaluate"):
            assert lm_saes_command(name, path)[0] == 2


def test_yaml_makes_no_objects(tmp_path: Path, marker: Path) -> None:
    for text in (
        f"sae: !!python/object/apply:builtins.open ['{marker}', 'w']",
        f"sae: !!python/object/new:pathlib.Path ['{marker}']",
        "sae: !!python/name:os.system",
        "sae: !!python/module:os",
    ):
        (tmp_path / "run.yaml").write_text(text)
        refused(lambda: read_document(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    "name", ["settings.json", "metrics.jsonl", "evaluation.json", "latents.json", "provenance.json", "config.json"]
)
def test_reports_and_evaluations(place: Place, marker: Path, name: str, lm_saes_command: Run) -> None:
    for bomb in BINARY:
        (place.trained / name).write_bytes(bomb(marker))
        refused(lambda: write_report(place.trained))
        refused(lambda: evaluate_from_config({"sae": str(place.trained)}))
        if name in ("config.json", "provenance.json"):
            assert lm_saes_command("verify", place.trained)[0] == 2


def test_a_report_shows_what_a_stranger_wrote_as_text(place: Place) -> None:
    script = "</script><script>alert(1)</script>"
    edit_json(place.trained / "settings.json", lambda settings: settings.update(sae_name=script))
    latents = place.trained / "latents.json"
    edit_json(latents, lambda data: data["latents"][0]["snippets"][0]["tokens"].__setitem__(0, script))
    edit_json(place.trained / "evaluation.json", lambda data: data.update({f"metrics/{script}": 1.0}))
    row = {"step": 5, script: 1.0, f"metrics/{script}": 1.0, "losses/mse_loss": 1.0}
    with (place.trained / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    write_report(place.trained)
    page = (place.trained / "report.html").read_text(encoding="utf-8")
    assert script not in page and "alert(1)" in page


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../cache2/shard-00000.safetensors", "/etc/passwd", "..", "a/../../x", "x\0y", "."])
def test_an_index_names_files_of_its_cache_only(place: Place, name: str) -> None:
    shutil.copytree(place.cache, place.path / "cache2")
    edit_json(place.cache / "index.json", lambda index: index["shards"][0].update(file=name))
    refused(lambda: ActivationCache(place.cache))


def test_a_shard_that_is_a_link_out_of_its_cache_is_refused(place: Place) -> None:
    shard = place.cache / "shard-00000.safetensors"
    shard.rename(place.path / "elsewhere")
    shard.symlink_to(place.path / "elsewhere")
    with pytest.raises(LMSaesError, match=r"'shard-00000\.safetensors' leads out of the directory"):
        ActivationCache(place.cache)
    shard.unlink()
    (place.path / "elsewhere").rename(place.cache / "inside")
    shard.symlink_to("inside")
    (place.path / "link").symlink_to(place.cache)
    cache = ActivationCache(place.path / "link")  # links to a cache, or within it, are nobody's business
    source = CachedSource(cache, [HOOK], contexts=False, piece=4, epochs=1, place=0, activity=Activity())
    assert source.draw(4) is not None


@pytest.mark.parametrize("name", ["../../config.json", "/etc/passwd", "a/../../x", "..", ""])
def test_a_manifest_names_files_of_its_directory_only(place: Place, name: str) -> None:
    entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    for directory in (place.trained, place.trained / "checkpoints" / "step_4"):
        edit_json(directory / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
        refused(lambda directory=directory: AbstractSparseAutoEncoder.from_pretrained(directory))
    refused(lambda: train(place, exp_result_path=str(place.trained), from_pretrained_path=str(place.trained)))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../x"])
def test_an_index_of_weights_names_files_of_its_model_only(place: Place, name: str) -> None:
    model = place.path / "model"
    (model / "model.safetensors").rename(place.path / "other.safetensors")
    names = list(load_file(place.path / "other.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LMSaesError, match=r"model.safetensors.index.json: .* leads out of the model's directory"):
        load(place)


@pytest.mark.parametrize("name", ["../x.gguf", "/etc/passwd"])
def test_a_gguf_file_is_one_of_its_model(place: Place, name: str) -> None:
    with pytest.raises(LMSaesError, match=r"gguf_file: .* leads out of the model's directory"):
        load(place, gguf_file=name)


def test_a_saved_dataset_names_files_of_its_directory_only(tmp_path: Path) -> None:
    secret = _saved_dataset(tmp_path / "secret")
    _saved_dataset(tmp_path / "disk")
    for name in (f"../secret/{secret.name}", str(secret)):
        edit_json(
            tmp_path / "disk" / "state.json", lambda state, name=name: state.update(_data_files=[{"filename": name}])
        )
        with pytest.raises(LMSaesError, match="leads out of the directory"):
            read(tmp_path / "disk", is_dataset_on_disk=True)


def test_a_directory_of_data_names_files_of_its_own_only(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "word3"}\n')
    assert read(tmp_path / "data", cache_dir=str(tmp_path / "cache")) == ["word3"]
    for name in ("../secret.jsonl", str(tmp_path / "secret.jsonl")):
        head = f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n"
        (tmp_path / "data" / "README.md").write_text(head)
        with pytest.raises(LMSaesError, match="leads out of the directory"):
            read(tmp_path / "data", cache_dir=str(tmp_path / "cache"))


def test_a_checkpoint_is_not_written_through_a_link(place: Place) -> None:
    """Names inside a run are made by the run; what lay there under such a name is replaced, not followed."""
    target = place.path / "target"
    target.write_text("mine")
    place.run.mkdir(parents=True)
    for name in ("settings.json", "report.html", "config.json", "metrics.jsonl"):
        (place.run / name).symlink_to(target)
    train(place)
    assert target.read_text() == "mine"
