"""The tensors of a checkpoint where processes each hold parts: weights, moments, statistics.

Statistics of latents are cut as the latents are. What adds up over processes has one row for each; so has the state of
the random generators. On as many processes each takes its own row again; on another number the first takes the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lm_saes.axes.axis import Axis
from lm_saes.axes.cuts import OF_LATENTS, Cut, Held, cuts_of, held
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.weight_files import SHARDS, WEIGHTS
from lm_saes.storage.parts import Parts, write_parts
from lm_saes.training.board import Board

RNG = "rng.cpu"
Tensors = dict[str, Tensor]


def write_own(
    draft: Path,
    sae: AbstractSparseAutoEncoder,
    board: Board,
    state: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> list[Path]:
    """Write this process's parts of a checkpoint; the files."""
    rows: dict[str, Held] = {}
    by_latent: Tensors = {}
    for name, tensor in state.items():
        axis = _rows_over(name, sae, board)
        if axis is None:
            by_latent[name] = tensor
        else:
            rows[name] = tensor[None], (Cut(0, (axis.size,), axis),)
    return [
        *sae.write_parts(draft / SHARDS),
        *write_parts(draft / "optimizer.dcp", held(sae, moments, _maps_of(moments, sae)), sae.axes),
        *write_parts(draft / "state.dcp", rows | held(sae, by_latent, dict.fromkeys(by_latent, OF_LATENTS)), sae.axes),
    ]


def read_own(path: Path, sae: AbstractSparseAutoEncoder, board: Board) -> tuple[Tensors, Tensors, Tensors]:
    """This process's part of the weights, statistics and moments of a checkpoint of any number of processes."""
    state: Tensors = {}
    with _open(path, "state") as parts:
        for name, shape in parts.shapes.items():
            axis = _rows_over(name, sae, board)
            if axis is None:
                state[name] = parts.read(name, cuts_of(sae, OF_LATENTS, shape))
            else:
                rows = parts.read(name)
                state[name] = _own_row(rows if parts.path.is_dir() else rows[None], axis, alike=name == RNG)
    weights = _read(path, Path(WEIGHTS).stem, sae, sae.file_dim_maps())
    with _open(path, "optimizer") as parts:
        maps = _maps_of(parts.shapes, sae)
    return weights, state, _read(path, "optimizer", sae, maps)


def _rows_over(name: str, sae: AbstractSparseAutoEncoder, board: Board) -> Axis | None:
    return sae.axes.everywhere if name == RNG else board.adds_over(name)


def _own_row(rows: Tensor, axis: Axis, alike: bool) -> Tensor:
    if len(rows) == axis.size:
        return rows[axis.place].clone()  # torch.set_rng_state crashes on a view that begins within its storage
    if alike:
        return rows[0].clone()
    total = rows.sum(0, dtype=rows.dtype)
    return total if axis.place == 0 else total.zero_()


def _open(path: Path, name: str) -> Parts:
    one = path / f"{name}.safetensors"
    return Parts(one if one.exists() else path / f"{name}.dcp")


def _read(path: Path, name: str, sae: AbstractSparseAutoEncoder, maps: Mapping[str, Mapping[str, int]]) -> Tensors:
    with _open(path, name) as parts:
        return {key: parts.read(key, cuts_of(sae, maps.get(key, {}), shape)) for key, shape in parts.shapes.items()}


def _maps_of(moments: Mapping[str, object], sae: AbstractSparseAutoEncoder) -> dict[str, dict[str, int]]:
    """How the optimizer's tensors, named `<parameter>.<key>`, are cut: as the parameter is."""
    maps = sae.dim_maps()
    return {name: maps[of] for name in moments if (of := name.rpartition(".")[0]) in maps}
