"""Where artefacts come from: versions, and what is passed on to what is made from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from lm_saes import ActivationWriter, ActivationWriterConfig, TrainerConfig
from lm_saes.data.cache import ActivationCache
from lm_saes.storage.provenance import PACKAGES, record, started_from, versions


def test_versions_name_every_package() -> None:
    found = versions()
    assert set(found) == {name.replace("-", "_") for name in PACKAGES} | {"python"}
    assert found["torch"] is not None and torch.__version__.startswith(found["torch"].split("+")[0])


def test_a_cache_says_what_it_was_made_with_and_may_be_asked_for_again(tmp_path: Path) -> None:
    stream = [{"a": torch.randn(4, 3), "tokens": torch.arange(4)}]
    cfg = ActivationWriterConfig(cache_dir=tmp_path / "cache", hook_points=["a"])
    path = ActivationWriter(cfg).process(stream)
    assert ActivationCache(path).index.versions == versions()
    index = json.loads((path / "index.json").read_text())
    index["versions"]["torch"] = "1.0"  # made by an older one: still the same cache
    (path / "index.json").write_text(json.dumps(index))
    assert ActivationWriter(cfg).process(stream) == path
    del index["versions"]  # older still
    (path / "index.json").write_text(json.dumps(index))
    assert ActivationCache(path).index.versions == {}


def test_what_is_noted_of_a_run_is_json() -> None:
    told = record({"name": "x", "steps": 1}, object(), TrainerConfig(), 3, 48, {"a": 1.5, "b": math.nan})
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["name"], told["steps"], told["tokens"], told["data"]) == ("x", 3, 48, {"stream": "object"})
    assert told["training_metrics"] == {"a": 1.5, "b": None}


def test_a_warm_start_keeps_what_it_came_from_apart() -> None:
    assert started_from(None) is None
    assert started_from({"name": "x"}) == {"name": "x"}
    assert started_from({"name": "x", "steps": 4}) == {"started_from": {"name": "x", "steps": 4}}
