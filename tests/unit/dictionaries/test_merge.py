"""One file from parts: its bytes, its memory, and what is refused. (tests/parallel exports what real runs saved.)"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_saes import SAEConfig, SparseAutoEncoder
from lm_saes.axes.axis import Axes, Axis
from lm_saes.axes.cuts import held
from lm_saes.dictionaries.merge import boxes, export
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.storage.manifest import problems
from lm_saes.storage.parts import write_parts

MIB = 2**20


class Place(Axis):
    def __init__(self, place: int, size: int) -> None:
        self.place, self.size = place, size


def save_in_parts(sae: SparseAutoEncoder, directory: Path, n: int = 4) -> None:
    """What n processes write, each with its part of the latents."""
    sae.save_pretrained(directory)
    whole = load_file(directory / "sae_weights.safetensors")
    (directory / "sae_weights.safetensors").unlink()
    (directory / "sae_weights.dcp").mkdir()
    maps = sae.file_dim_maps()
    dims = {name: dim["model"] for name, dim in maps.items() if "model" in dim}
    for place in range(n):
        axis = Place(place, n)
        sae.attach(Axes(latents=axis, batch=axis, everywhere=axis))
        own = {name: t.chunk(n, dims[name])[place] if name in dims else t for name, t in whole.items()}
        write_parts(directory / "sae_weights.dcp", held(sae, own, maps), sae.axes, sae.file_metadata)
    sae.attach(Axes())
    sae.save_provenance(directory)


def dictionary(d_model: int = 8, d_sae: int = 24, **settings: object) -> SparseAutoEncoder:
    torch.manual_seed(0)
    cfg = SAEConfig(hook_point_in="a", hook_point_out="a", d_model=d_model, expansion_factor=d_sae / d_model,
                    act_fn="topk", top_k=4, **{"norm_activation": "token-wise"} | settings)  # type: ignore[arg-type] # fmt: skip
    sae = SparseAutoEncoder(cfg)
    sae.init_parameters(encoder_uniform_bound=1.0, decoder_uniform_bound=1.0)
    return sae


def most_memory(act: Callable[[], object]) -> int:
    """By how many bytes this process's own memory (files that are mapped are not) grows while it acts, at most."""
    seen, ended = [], threading.Event()

    def own() -> int:
        return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024

    def watch() -> None:
        while not ended.wait(0.0005):
            seen.append(own())

    before, watcher = own(), threading.Thread(target=watch)
    watcher.start()
    try:
        result = act()
        seen.append(own())
        del result
    finally:
        ended.set()
        watcher.join()
    return max(seen) - before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_is_the_one_that_one_process_writes(dtype: str, tmp_path: Path) -> None:
    sae = dictionary(dtype=dtype, norm_activation="dataset-wise")
    sae.set_dataset_average_activation_norm({"a": 3.0})
    sae.set_current_k(9)
    sae.save_pretrained(tmp_path / "one")
    save_in_parts(sae, tmp_path / "parts")
    wanted = (tmp_path / "one" / "sae_weights.safetensors").read_bytes()
    for block in (1, 100, 16 * MIB):
        assert export(tmp_path / "parts", block=block).read_bytes() == wanted
        assert problems(tmp_path / "parts", whole=True) == []
    (tmp_path / "parts" / "sae_weights.safetensors").unlink()
    assert SparseAutoEncoder.from_pretrained(tmp_path / "parts").current_k == 9


def measure(directory: str) -> None:
    """Print what exporting takes, and loading; in a process of its own, which has no freed memory to use again."""
    save_in_parts(dictionary(), Path(directory, "small"))
    export(Path(directory, "small"))  # imports what it needs
    exporting = most_memory(lambda: export(directory, Path(directory, "out", "x.safetensors"), block=2 * MIB))
    print(exporting, most_memory(lambda: SparseAutoEncoder.from_pretrained(directory)))


def test_memory_for_a_block_is_enough(tmp_path: Path) -> None:
    save_in_parts(dictionary(512, 16384), tmp_path)  # two matrices of 32 MiB
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.unit.dictionaries.test_merge import measure; measure({str(tmp_path)!r})"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True,
    )  # fmt: skip
    exporting, loading = map(int, done.stdout.split())
    assert exporting < 34 * MIB and loading > 60 * MIB  # a matrix and a block; both matrices


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 6), (2, 3, 5), (1, 1, 7)])
@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_boxes_hold_every_entry_once_and_in_order(shape: tuple[int, ...], limit: int) -> None:
    entries = torch.arange(torch.Size(shape).numel()).view(shape)
    found = [
        entries[tuple(slice(a, a + n) for a, n in zip(begin, size, strict=True))] for begin, size in boxes(shape, limit)
    ]
    assert all(box.numel() <= limit for box in found)
    assert torch.equal(torch.cat([entries.new_empty(0), *(box.flatten() for box in found)]), entries.flatten())


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"holds no sae_weights\.dcp"):
        export(tmp_path / "one")
    save_in_parts(sae, tmp_path / "parts")
    dictionary(16).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"beside it lies another config\.json"):
        export(tmp_path / "parts", tmp_path / "other" / "sae_weights.safetensors")
    for name in ("shard-00004", "shard-00001"):
        (part,) = (tmp_path / "parts" / "sae_weights.dcp").glob(f"{name}-*")
        part.write_bytes(part.read_bytes()[:-1] + b"\1")
        with pytest.raises(CheckpointError, match=f"{part.name}: altered"):
            export(tmp_path / "parts")
        part.unlink()
        with pytest.raises(CheckpointError, match=f"{part.name}: is missing"):
            export(tmp_path / "parts")
    (tmp_path / "parts" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="do not make up one tensor"):
        export(tmp_path / "parts")
    assert not (tmp_path / "parts" / "sae_weights.safetensors").exists()


@pytest.mark.parametrize(
    "begin", ["[]", "[-4, 0]", "[0.5, 0]", "[true, 0]", '["0", 0]', "7", "[1, 0]", "[1e9, 0]", "[1000000000000, 0]"]
)
def test_headers_that_make_no_sense(begin: str, tmp_path: Path) -> None:
    save_in_parts(dictionary(), tmp_path)
    (tmp_path / "manifest.json").unlink()
    (part,) = (tmp_path / "sae_weights.dcp").glob("shard-00001-*")
    names = ", ".join(f'"{name}": {{"saved_offsets": {begin}}}' for name in load_file(part))
    save_file(load_file(part), part, {"DCP_SHARDING_INFO": f"{{{names}}}"})
    with pytest.raises(CheckpointError):
        SparseAutoEncoder.from_pretrained(tmp_path)
