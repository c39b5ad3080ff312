"""Activations written to disk and read back: whole or absent, checked, in order or shuffled."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm_saes.data.activity import Activity
from lm_saes.data.batch import Batch
from lm_saes.data.cache import ActivationCache, CachedSource
from lm_saes.data.factory import ActivationFactory
from lm_saes.data.factory_config import ActivationFactoryConfig
from lm_saes.data.text import TextDataset
from lm_saes.data.writer import ActivationWriter, ActivationWriterConfig
from lm_saes.errors import ConfigError, DataError
from lm_saes.models.base import LanguageModel


def rows(start: int, n: int) -> Batch:
    tokens = torch.arange(start, start + n)
    return {"tokens": tokens, "a": tokens[:, None] + torch.arange(4) / 8, "b": -tokens[:, None] * torch.ones(2)}


def contexts(start: int, n: int, size: int = 4) -> Batch:
    flat = rows(start, n * size)
    batch: Batch = {name: x.reshape(n, size, *x.shape[1:]) for name, x in flat.items()}
    return batch | {"mask": batch["tokens"] % 3 > 0, "meta": [{}] * n}


def write(path: Path, stream: list[Batch], **settings: Any) -> Path:
    cfg = ActivationWriterConfig(**{"cache_dir": path, "hook_points": ["a", "b"], **settings})
    return ActivationWriter(cfg).process(stream)


def source(path: Path, **settings: Any) -> CachedSource:
    defaults: dict[str, Any] = {"contexts": False, "piece": 4, "epochs": 1, "place": 0, "activity": Activity()}
    return CachedSource(ActivationCache(path), ["a"], **{**defaults, **settings})


def drawn(source: CachedSource, limit: int = 100) -> list[dict[str, Tensor]]:
    pieces = []
    while (piece := source.draw(limit)) is not None:
        pieces.append(piece)
    return pieces


def tokens_of(pieces: list[dict[str, Tensor]]) -> list[int]:
    return [token for piece in pieces for token in piece["tokens"].flatten().tolist()]


def test_single_tokens_are_written_in_shards(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c", [rows(0, 6), rows(6, 6), rows(12, 6)], n_samples_per_chunk=5, total_generating_tokens=13
    )
    index = json.loads((path / "index.json").read_text())
    assert [(shard["file"], shard["n_rows"]) for shard in index["shards"]] == [
        ("shard-00000.safetensors", 5),
        ("shard-00001.safetensors", 5),
        ("shard-00002.safetensors", 3),
    ]
    assert (index["n_rows"], index["n_tokens"], index["dtype"], index["context_size"]) == (13, 13, "float32", None)
    assert index["widths"] == {"a": 4, "b": 2}
    second = load_file(path / "shard-00001.safetensors")
    assert set(second) == {"a", "b", "tokens"}
    assert all(torch.equal(second[name], x) for name, x in rows(5, 5).items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c"]  # no draft is left


def test_masked_tokens_are_left_out_of_single_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "c", [rows(0, 6) | {"mask": torch.tensor([0, 1, 1, 0, 1, 1])}])
    assert tokens_of(drawn(source(path))) == [1, 2, 4, 5]


def test_contexts_keep_their_masks_and_tokens_that_count_are_counted(tmp_path: Path) -> None:
    # Of 0 .. 15 in contexts of 4, tokens 0 3 6 9 12 15 do not count: 2, 3, 3, 2 of each context do.
    path = write(tmp_path / "c", [contexts(0, 2), contexts(8, 2)], total_generating_tokens=6, dtype="bf16")
    cache = ActivationCache(path)
    assert (cache.index.n_rows, cache.index.n_tokens, cache.index.context_size) == (3, 8, 4)
    pieces = drawn(source(path, contexts=True, piece=2))
    assert [piece["tokens"].shape for piece in pieces] == [(2, 4), (1, 4)]
    assert pieces[0]["a"].dtype == torch.bfloat16
    assert torch.equal(pieces[0]["mask"], contexts(0, 2)["mask"])
    flat = drawn(source(path))
    assert tokens_of(flat) == [1, 2, 4, 5, 7, 8, 10, 11]
    assert torch.equal(flat[1]["a"], rows(7, 1)["a"].repeat(4, 1).bfloat16() + torch.tensor([[0], [1], [3], [4]]))


def test_an_existing_cache_with_the_same_settings_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "c", [rows(0, 6)], n_samples_per_chunk=3)
    before = (path / "index.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        write(tmp_path / "c", [rows(100, 6)], n_samples_per_chunk=3)
    assert "kept as it is" in caplog.text
    assert (path / "index.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"other settings \(writer.n_samples_per_chunk: 3 there, 4 here\); delete it"):
        write(tmp_path / "c", [rows(0, 6)], n_samples_per_chunk=4)


def test_another_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write(tmp_path / "c", [rows(0, 6)])  # empty: taken
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not a cache; choose another directory"):
        write(tmp_path / "mine", [rows(0, 6)])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not a cache"):
        write(tmp_path / "file", [rows(0, 6)])
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "below", [rows(0, 6)])


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' has shape"):
        write(tmp_path / "c", [rows(0, 6), rows(6, 6) | {"a": torch.ones(6, 3)}], n_samples_per_chunk=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="gave no tokens"):
        write(tmp_path / "c", [])
    with pytest.raises(DataError, match="hook point 'b' is missing"):
        write(tmp_path / "c", [{"tokens": torch.arange(2), "a": torch.ones(2, 4)}])
    with pytest.raises(DataError, match="the first had contexts of None"):
        write(tmp_path / "c", [rows(0, 6), contexts(0, 2)])


def test_a_draft_left_by_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".c.draft").mkdir()
    (tmp_path / ".c.draft" / "shard-00007.safetensors").write_bytes(b"half")
    path = write(tmp_path / "c", [rows(0, 6)])
    assert sorted(file.name for file in path.iterdir()) == ["index.json", "shard-00000.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_too_small_a_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    # 1000 tokens of (4 + 2) float32 and an int64 are 32,000 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=31_999))
    with pytest.raises(DataError, match=r"needs 2.98e-05 GiB, but the disk has 2.98e-05 GiB free; lower total"):
        write(tmp_path / "c", [rows(0, 6)], total_generating_tokens=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=32_000))
    with pytest.warns(UserWarning, match="ended after 6 of 1000 tokens"):
        write(tmp_path / "c", [rows(0, 6)], total_generating_tokens=1000)


def test_torn_caches_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c", [rows(0, 9)], n_samples_per_chunk=3)
    second = path / "shard-00001.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"shard-00001.safetensors has {len(content) - 1} bytes, not {len(content)}"):
        ActivationCache(path)
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"shard-00001.safetensors was altered \(its hash differs\); delete"):
        drawn(source(path))
    second.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is missing"):
        ActivationCache(path)
    index = json.loads((path / "index.json").read_text())
    for broken, message in [
        (json.dumps(index | {"format_version": 9}), "format_version=9, not 1"),
        (json.dumps({**index, "n_rows": "many"}), "n_rows: "),
        (json.dumps({**index, "shards": [{**index["shards"][0], "file": "../x"}]}), "leads out of the directory"),
        ("{", "is not valid JSON"),
    ]:
        (path / "index.json").write_text(broken)
        with pytest.raises(DataError, match=message):
            ActivationCache(path)
    with pytest.raises(DataError, match=r"no index\.json there"):
        ActivationCache(tmp_path / "nowhere")


def test_what_a_cache_cannot_give_is_said(tmp_path: Path) -> None:
    single = ActivationCache(write(tmp_path / "c", [rows(0, 9)]))
    with pytest.raises(ConfigError, match="hook point 'z' is not in it; it has 'a', 'b'"):
        single.check(["z"], None, contexts=False)
    with pytest.raises(ConfigError, match="holds single tokens, so target='activations-2d' cannot read it"):
        single.check(["a"], None, contexts=True)
    whole = ActivationCache(write(tmp_path / "d", [contexts(0, 2)]))
    with pytest.raises(ConfigError, match="holds contexts of 4 tokens, but context_size=8"):
        whole.check(["a"], 8, contexts=True)
    whole.check(["a"], 8, contexts=False)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["rows", "contexts"])
def test_shuffled_epochs_hold_every_row_once_in_their_own_order(tmp_path: Path, whole: bool, kind: str) -> None:
    make = rows if kind == "rows" else contexts
    path = write(tmp_path / "c", [make(0, 24)], n_samples_per_chunk=7)
    in_order = tokens_of(drawn(source(path)))
    n = len(in_order)
    shuffled = source(path, epochs=3, shuffle=(5, None), whole=whole)
    pieces = drawn(shuffled)
    assert all(torch.equal(piece["a"][:, 0].to(torch.int64), piece["tokens"]) for piece in pieces)
    tokens = tokens_of(pieces)
    epochs = [tokens[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert len({tuple(epoch) for epoch in [in_order, *epochs]}) == 4
    assert tokens_of(drawn(source(path, epochs=3, shuffle=(5, None), whole=whole))) == tokens
    assert tokens_of(drawn(source(path, epochs=3, shuffle=(6, None), whole=whole))) != tokens


def test_every_epoch_has_its_own_order_of_shards(tmp_path: Path) -> None:
    path = write(tmp_path / "c", [rows(0, 36)], n_samples_per_chunk=4)

    def shards(seed: int) -> list[int]:
        return [int(piece["tokens"][0]) // 4 for piece in drawn(source(path, epochs=3, shuffle=(seed, None)))]

    orders = [shards(seed)[i : i + 9] for seed in (5, 6) for i in (0, 9, 18)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


@pytest.mark.parametrize("whole", [True, False])
def test_a_cached_source_goes_on_from_any_place(tmp_path: Path, whole: bool) -> None:
    path = write(tmp_path / "c", [rows(0, 10)], n_samples_per_chunk=4)

    def make() -> CachedSource:
        return source(path, epochs=2, shuffle=(5, None), whole=whole, piece=3)

    pieces = tokens_of(drawn(make()))
    first = make()
    position = 0
    while (piece := first.draw(3)) is not None:
        position += len(piece["tokens"])
        second = make()
        second.load_state_dict(first.state_dict())
        assert tokens_of(drawn(second)) == pieces[position:]


def test_a_cache_made_by_a_model_names_its_origin_and_is_reused(
    tmp_path: Path, number_model: LanguageModel, counting: Callable[..., TextDataset]
) -> None:
    def generate(seed: int = 0, workers: int = 2) -> Path:
        cfg = ActivationFactoryConfig.model_validate(
            {
                "sources": [{"type": "dataset", "name": "n"}],
                "target": "activations-1d",
                "hook_points": ["a", "b"],
                "batch_size": 8,
                "context_size": 8,
                "num_workers": workers,
            }
        )
        seen: list[tuple[int, int | None]] = []
        with ActivationFactory(cfg, seed).process(number_model, {"n": counting(20, 10)}) as stream:
            writer = ActivationWriterConfig(cache_dir=tmp_path / "c", hook_points=["a"], total_generating_tokens=20)
            path = ActivationWriter(writer).process(stream, lambda done, total: seen.append((done, total)))
        assert seen in ([(8, 20), (16, 20), (20, 20)], [])
        return path

    path = generate()
    assert tokens_of(drawn(source(path))) == list(range(10, 30))
    settings = ActivationCache(path).index.settings
    assert settings["stream"]["model"] == {"model": "numbers"}
    assert generate() == path
    assert generate(workers=0) == path
    with pytest.raises(ConfigError, match=r"stream\.factory\.seed: 0 there, 1 here"):
        generate(seed=1)
