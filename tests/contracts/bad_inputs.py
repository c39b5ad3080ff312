"""Where bad configs and inputs are tried: base configs that work, and ways to spoil the files that they name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_saes.config import build
from lm_saes.runners import GenerateActivationsSettings, generate_activations, train_from_config

from ..tiny_run import HOOK, KINDS, make_place, reading, training, training_of

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A model, a text, two caches and a finished run, all tiny; a test gets a copy of its own to spoil."""

    path: Path

    @property
    def run(self) -> Path:
        """Where a run would write to; it does not exist."""
        return self.path / "out" / "run"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def contexts(self) -> Path:
        return self.path / "contexts"

    @property
    def trained(self) -> Path:
        return self.path / "trained"

    def config(self, name: str) -> dict[str, Any]:
        """The settings of a command that works here, by name."""
        match name:
            case "train":
                return training(self.path, self.run)
            case "cached":
                return self._cached(training_of("sae", self.path, self.run), self.cache, "activations-1d")
            case "contexts":
                return self._cached(training_of("lorsa", self.path, self.run), self.contexts, "activations-2d")
            case "generate":
                return _generating(self.path, self.path / "out" / "cache")
            case "evaluate":
                return {"sae": str(self.trained)}
            case kind:
                return training_of(kind, self.path, self.run)

    def _cached(self, data: dict[str, Any], cache: Path, target: str) -> dict[str, Any]:
        data["activation_factory"] = {
            "sources": [{"type": "activations", "path": str(cache)}], "target": target,
            "hook_points": data["activation_factory"]["hook_points"],
            "batch_size": data["activation_factory"]["batch_size"], "num_workers": 0,
        }  # fmt: skip
        return {key: value for key, value in data.items() if key not in ("model", "datasets", "eval")}

    def forget_manifests(self) -> None:
        """As directories were before there were manifests."""
        for manifest in self.trained.rglob("manifest.json"):
            manifest.unlink()

    def text(self, content: str | bytes, name: str = "text.txt") -> Path:
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def _generating(place: Path, cache: Path, hooks: tuple[str, ...] = (HOOK,), contexts: bool = False) -> dict[str, Any]:
    data = reading(place, list(hooks)) | {
        "writer": {"cache_dir": str(cache), "hook_points": list(hooks), "total_generating_tokens": 400}
    }
    del data["activation_factory"]["buffer_size"]
    if contexts:
        data["activation_factory"] |= {"target": "activations-2d", "batch_size": 4}
    return data


def make_whole_place(path: Path) -> Place:
    """Fill `path` with all that a `Place` has."""
    make_place(path)
    generate_activations(build(GenerateActivationsSettings, _generating(path, path / "cache")))
    lorsa = (KINDS["lorsa"]["hook_point_in"], KINDS["lorsa"]["hook_point_out"])
    generate_activations(build(GenerateActivationsSettings, _generating(path, path / "contexts", lorsa, True)))
    train_from_config(training(path, path / "trained", steps=4))
    return Place(path)


def spoil_shard(cache: Path, change: Callable[[Tensors], Tensors | None], honest: bool = True) -> None:
    """Change the tensors of a cache's first shard; with `honest`, its index knows the new file."""
    file = cache / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors = {name: x.clone() for name, x in tensors.items()}
    changed = change(tensors) or tensors
    save_file(changed, file)
    if honest:
        entry = {"n_bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        edit_json(cache / "index.json", lambda index: index["shards"][0].update(entry))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def fill(name: str, value: float) -> Callable[[Tensors], None]:
    """Put `value` into one entry of a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    return change


def mask_nothing_but(kept: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["mask"][:] = False
        tensors["mask"].view(-1)[:kept] = True

    return change


def change_weights(place: Place, change: Callable[[Tensors], Tensors]) -> None:
    """Change the weights of the finished run, and leave no manifest that would tell."""
    file = place.trained / "sae_weights.safetensors"
    save_file(change({name: x.clone() for name, x in load_file(file).items()}), file)
    place.forget_manifests()


def truncate(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def copy_place(original: Place, path: Path) -> Place:
    shutil.copytree(original.path, path, dirs_exist_ok=True)
    for config in (path / "trained").glob("settings.json"):
        config.write_text(config.read_text().replace(str(original.path), str(path)))
    return Place(path)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file and folder under `path`, with contents."""
    return {str(item.relative_to(path)): item.read_bytes() if item.is_file() else b"" for item in path.rglob("*")}
