"""Checkpoints and dictionaries of a mesh: what one process and another mesh read, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from lm_saes.cli import app
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError
from lm_saes.training.checkpoint import find_checkpoint
from lm_saes.training.verify import verify

from .conftest import Pools
from .test_same_numbers import assert_same, losses_of
from .work import Case, train

Mesh = tuple[int, ...] | None
"""`data x model`, or `data x model x head`; None: one process."""
STEPS, SAVED = 12, 7
"""A checkpoint is made in the middle of a window of metrics, and of one of firing counts."""
CASES = {
    f"{kind}-{act_fn}": Case(kind, act_fn, steps=STEPS, uneven=True, trainer=losses_of(act_fn))
    for kind, act_fn in (("sae", "batchtopk"), ("molt", "topk"), ("clt", "layertopk"), ("crosscoder", "jumprelu"))
}
Runs = Callable[[str, Mesh], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def runs(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Gives the checkpoint that a case's run on a mesh has made on its way, and what came of the run."""
    made: dict[tuple[str, Mesh], tuple[Path, dict[str, Tensor]]] = {}

    def run(case: str, mesh: Mesh) -> tuple[Path, dict[str, Tensor]]:
        if (case, mesh) not in made:
            place = tmp_path_factory.mktemp("run")
            options = {"save_to": str(place), "save_after": SAVED}
            if mesh is None:
                results = train(CASES[case], None, str(place), **options)
            else:
                results = pools(math.prod(mesh)).train(CASES[case], mesh, **options)
            made[case, mesh] = place / "checkpoints" / f"step_{SAVED}", results
        return made[case, mesh]

    return run


def go_on(case: str, step: Path, mesh: Mesh, pools: Pools, place: Path) -> dict[str, Tensor]:
    if mesh is None:
        return train(CASES[case], None, str(place), resume=str(step))
    return pools(math.prod(mesh)).train(CASES[case], mesh, resume=str(step))


def after_the_save(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results without the first report, which was before the checkpoint."""
    return {name: value[1:] if name.startswith("report.") else value for name, value in results.items()}


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("sae-batchtopk", (2, 2)),
        ("molt-topk", (2, 2)),
        ("clt-layertopk", (1, 2)),
        ("crosscoder-jumprelu", (2, 1)),
        ("crosscoder-jumprelu", (1, 2, 2)),
    ],
)
def test_resuming_on_the_same_mesh_changes_no_bit(
    case: str, mesh: Mesh, runs: Runs, pools: Pools, tmp_path: Path
) -> None:
    step, whole = runs(case, mesh)
    whole, resumed = after_the_save(whole), go_on(case, step, mesh, pools, tmp_path)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


MESHES: list[tuple[Mesh, Mesh]] = [
    (None, (1, 4)), (None, (2, 1)), ((1, 4), (1, 2)), ((2, 2), (1, 4)), ((2, 2), None)
]  # fmt: skip
HEADS: list[tuple[Mesh, Mesh]] = [(None, (2, 1, 2)), ((1, 2, 2), (1, 4)), ((1, 2, 2), (1, 1, 2)), ((1, 2, 2), None)]


@pytest.mark.parametrize(
    ("case", "before", "now"),
    [(case, *meshes) for case in ("sae-batchtopk", "molt-topk", "clt-layertopk") for meshes in MESHES]
    + [("crosscoder-jumprelu", *meshes) for meshes in HEADS],
    ids=lambda given: given if isinstance(given, str) else "x".join(map(str, given or ["one"])),
)
def test_resuming_on_another_mesh(case: str, before: Mesh, now: Mesh, runs: Runs, pools: Pools, tmp_path: Path) -> None:
    step, whole = runs(case, before)
    assert_same(after_the_save(whole), go_on(case, step, now, pools, tmp_path), 1e-9)


def test_what_lies_in_the_directory(runs: Runs) -> None:
    (one, _), (four, _) = runs("molt-topk", None), runs("molt-topk", (2, 2))
    assert verify(four) == ([], len([path for path in four.rglob("*") if path.is_file()]) - 1, 1)
    for path in four.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json")
            assert path.suffix == ".safetensors" or json.loads(path.read_text())
    for name in ("sae_weights", "optimizer"):
        parts = [load_file(path) for path in (four / f"{name}.dcp").iterdir()]
        whole = load_file(one / f"{name}.safetensors")
        assert len(parts) == 4 * 3  # every process writes; of W_E it has a part in each of the three groups of ranks
        for key, tensor in whole.items():
            assert sum(part[key].numel() for part in parts if key in part) == tensor.numel()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_distributed_checkpoint_reads_the_parts(runs: Runs) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    step, _ = runs("molt-topk", (2, 2))
    whole = AbstractSparseAutoEncoder.from_pretrained(step, fold_activation_scale=False).full_state_dict()
    into = {name: torch.zeros_like(tensor).contiguous() for name, tensor in whole.items()}
    load(into, storage_reader=HuggingFaceStorageReader(str(step / "sae_weights.dcp")), no_dist=True)
    assert all(torch.equal(into[name], whole[name]) for name in whole)


@pytest.mark.parametrize("case", CASES)
def test_exporting_to_one_file(case: str, runs: Runs, pools: Pools, tmp_path: Path) -> None:
    step, _ = runs(case, (1, 2, 2) if case.startswith("crosscoder") else (2, 2))
    sae = AbstractSparseAutoEncoder.from_pretrained(step, fold_activation_scale=False)
    sae.save_pretrained(tmp_path / "one")
    done = CliRunner().invoke(app, ["export", str(step), "--out", str(tmp_path / "out" / "sae_weights.safetensors")])
    assert done.exit_code == 0, done.output
    assert verify(tmp_path / "out")[:2] == ([], 3)
    for name in ("sae_weights.safetensors", "config.json", "provenance.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    there = pools(4).run("loaded", CASES[case], (1, 4), directory=str(tmp_path / "out"))
    assert all(torch.equal(there[f"weights.{name}"], tensor) for name, tensor in sae.full_state_dict().items())


def test_saving_a_dictionary_from_a_mesh(runs: Runs, pools: Pools, tmp_path: Path) -> None:
    case, (step, _) = CASES["molt-topk"], runs("molt-topk", (2, 2))
    sae = AbstractSparseAutoEncoder.from_pretrained(step, fold_activation_scale=False)
    sae.set_current_k(2)
    sae.save_pretrained(tmp_path)
    pools(4).run("loaded", case, (2, 2), directory=str(tmp_path), save_to=str(tmp_path))
    assert verify(tmp_path)[0] == [] and not (tmp_path / "sae_weights.safetensors").exists()
    again = AbstractSparseAutoEncoder.from_pretrained(tmp_path, fold_activation_scale=False)
    assert again.current_k == 2 and again.provenance == sae.provenance
    assert all(map(torch.equal, again.full_state_dict().values(), sae.full_state_dict().values()))
    again.save_pretrained(tmp_path)
    assert verify(tmp_path)[0] == [] and not (tmp_path / "sae_weights.dcp").exists()


@pytest.mark.parametrize("place", ["sae_weights.dcp", "optimizer.dcp", "state.dcp"])
def test_a_torn_part_is_told(place: str, runs: Runs, pools: Pools) -> None:
    step, _ = runs("sae-batchtopk", (2, 2))
    file = sorted((step / place).iterdir())[-1]
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{place}/{file.name}: altered"):
            find_checkpoint(step)
        if place == "sae_weights.dcp":
            why = f"{place}/{file.name}: altered"
            pools(4).run("refused", CASES["sae-batchtopk"], (2, 2), directory=str(step), why=why)
            pools(2).run("refused", CASES["sae-batchtopk"], (1, 2), directory=str(step), why=why)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_lost_part_is_told(manifest: bool, runs: Runs) -> None:
    step, _ = runs("sae-batchtopk", (2, 2))
    lost = [*sorted((step / "sae_weights.dcp").iterdir())[::3], *([] if manifest else [step / "manifest.json"])]
    kept = {path: path.read_bytes() for path in lost}
    try:
        for path in lost:
            path.unlink()
        with pytest.raises(CheckpointError, match="is missing" if manifest else "do not make up one|missing|has shape"):
            AbstractSparseAutoEncoder.from_pretrained(step)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.parametrize("full", [0, 3])
def test_a_disk_that_is_full_for_one_process_loses_nothing(full: int, pools: Pools, tmp_path: Path) -> None:
    case = Case("sae", "topk", steps=3, sae={"expansion_factor": 256.0})
    saved = pools(4).run("full_disk", case, (2, 2), run=str(tmp_path), full=full)["saved"]
    assert saved.tolist() == [True, False, True]
    assert verify(tmp_path)[0] == [] and find_checkpoint(tmp_path).name == "step_3"


def test_headers_say_where_parts_begin(runs: Runs) -> None:
    step, _ = runs("clt-layertopk", (1, 2))
    with safe_open(step / "sae_weights.dcp" / "shard-00002-model-00001-of-00001.safetensors", "pt") as file:
        begins = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert begins["W_E"] == {"saved_offsets": [0, 0, 12]} and begins["W_D.1"] == {"saved_offsets": [0, 12, 0]}
