"""Checkpoints of a run: `checkpoints/step_N/`, whole or absent, tensors in safetensors and the rest in JSON.

Of a run over several processes each writes its own parts; the files' names are those of one process with `.dcp`, for a
folder, instead of `.safetensors`. Either kind is read by any number of processes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_saes.axes.axis import ALONE, Axis
from lm_saes.axes.together import by_first, exchange
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError
from lm_saes.storage.drafts import save_together
from lm_saes.storage.files import drafted, remove
from lm_saes.storage.manifest import problems, write_manifest
from lm_saes.storage.tensors import load_tensors, save_tensors
from lm_saes.training import checkpoint_parts
from lm_saes.training.board import Board
from lm_saes.training.checkpoint_parts import RNG

log = logging.getLogger(__name__)

PROGRESS = "trainer.json"
STREAM = "stream.json"
_TENSOR = "__tensor__"


def checkpoint_directory(run: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run) / "checkpoints" / f"step_{step}"


def all_steps(run: str | Path) -> dict[int, Path]:
    """The checkpoints of a run by step, ascending, whole or not."""
    found = {}
    for path in Path(run, "checkpoints").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def saved_steps(run: str | Path) -> dict[int, Path]:
    """The checkpoints of a run by step, ascending, whose files all have their sizes."""
    return {step: path for step, path in all_steps(run).items() if not problems(path, hashes=False)}


def find_checkpoint(path: str | Path, axis: Axis = ALONE) -> Path:
    """The checkpoint that `path` means: a step's directory itself, or the newest whole one of a run's directory.

    Every file is read and compared with the manifest. Of a run's directory, newer checkpoints that are torn or altered
    are named in a warning and passed over.

    Args:
        axis: the processes that look together: each file is read by one of them, and all come to the same answer.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    where = f"from_pretrained_path={str(path)!r}"
    if (path / PROGRESS).exists() or (path.parent.name == "checkpoints" and re.fullmatch(r"step_\d+", path.name)):
        if wrong := _problems(path, axis):
            raise CheckpointError(f"{where}: torn, {'; '.join(wrong)}; use an older checkpoint")
        return path
    by_first(axis, lambda: put_back(path))
    passed_over = {}
    for step in reversed(all_steps(path).values()):
        if not (wrong := _problems(step, axis)):
            for name, reason in passed_over.items():
                log.warning("%s: torn, %s; going on from %s instead", name, reason, step.name)
            return step
        passed_over[step] = "; ".join(wrong)
    torn = "".join(f" ({name.name}: {reason})" for name, reason in passed_over.items())
    raise CheckpointError(f"{where}: holds no whole checkpoint{torn}; give a run's or a step's directory")


def _problems(path: Path, axis: Axis) -> list[str]:
    found = exchange(axis, problems(path, whole=True, share=(axis.place, axis.size)))
    return list(dict.fromkeys(line for lines in found for line in lines))


def write(
    path: Path,
    sae: AbstractSparseAutoEncoder,
    board: Board,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    stream_state: dict[str, Any] | None,
    wandb_run_id: str | None,
) -> None:
    """Save everything that training goes on from as the step directory `path`.

    Processes that train together have to call it together; an `OSError` in one is raised in all.
    """
    axis = sae.axes.everywhere

    def write_rest(draft: Path) -> None:
        _write_json(draft / PROGRESS, progress)
        if stream_state is not None:
            values, tensors = split_tensors(stream_state)
            _write_json(draft / STREAM, values)
            if tensors:
                save_tensors(tensors, draft / "stream.safetensors")
        if wandb_run_id is not None:
            _write_json(draft / "wandb_run_id.json", {"wandb_run_id": wandb_run_id})

    def write_own(draft: Path) -> list[Path]:
        parts = checkpoint_parts.write_own(draft, sae, board, _state(board), _optimizer_tensors(optimizer))
        if axis.place > 0:
            return parts
        sae.cfg.save_hyperparameters(draft)
        sae.write_provenance(draft)
        write_rest(draft)
        return parts + [path for path in draft.iterdir() if path.is_file()]

    if axis.size > 1:
        save_together(path, axis, write_own, with_manifest=True)
        return
    with drafted(path) as draft:
        draft.mkdir()
        sae.save_pretrained(draft)
        save_tensors(_state(board), draft / "state.safetensors")
        save_tensors(_optimizer_tensors(optimizer), draft / "optimizer.safetensors")
        write_rest(draft)
        write_manifest(draft)


def _state(board: Board) -> dict[str, Tensor]:
    return {RNG: torch.get_rng_state(), **dict(board.tensors())}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, *needed: str) -> Any:
    """Read a JSON file of a checkpoint, which must be an object that has the `needed` fields, if any are.

    Raises:
        CheckpointError: it is missing or torn, or lacks one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    for name in needed:
        if not isinstance(data, dict) or name not in data:
            raise CheckpointError(f"{path}: has no {name!r}; go on from another checkpoint")
    return data


def read_tensors(path: Path, sae: AbstractSparseAutoEncoder, board: Board, optimizer: torch.optim.Optimizer) -> None:
    """Put dictionary, statistics, random generator and optimizer back to where the checkpoint was made.

    Raises:
        CheckpointError: the checkpoint cannot be read or is another dictionary's.
    """
    weights, state, moments = checkpoint_parts.read_own(path, sae, board)
    sae.load_full_state_dict(weights)
    try:
        torch.set_rng_state(state.pop(RNG))
        board.restore(state)
    except KeyError as error:
        where = next(path.glob("state.*"))
        raise CheckpointError(f"{where}: has no {error}; go on from another checkpoint") from error
    _load_optimizer(optimizer, moments, path)


def read_stream(path: Path) -> dict[str, Any] | None:
    """The saved position of the data stream, if it had one."""
    if not (path / STREAM).exists():
        return None
    tensors = load_tensors(path / "stream.safetensors") if (path / "stream.safetensors").exists() else {}
    return join_tensors(read_json(path / STREAM), tensors)


def read_run_id(path: Path) -> str | None:
    """The W&B run that the checkpoint belongs to, if there was one."""
    file = path / "wandb_run_id.json"
    return read_json(file)["wandb_run_id"] if file.exists() else None


def put_back(run: str | Path) -> None:
    """Give a checkpoint its name back that was being replaced when the run was killed."""
    for old in Path(run, "checkpoints").glob(".step_*.old"):
        place = old.with_name(old.name[1 : -len(".old")])
        if not place.exists():
            old.rename(place)


def sweep(run: str | Path, axis: Axis = ALONE) -> None:
    """Remove what a kill in the middle of a save has left; of several processes, the first does."""

    def remove_drafts() -> None:
        put_back(run)
        for left in [*Path(run, "checkpoints").glob(".step_*.old"), *Path(run, "checkpoints").glob(".step_*.draft")]:
            remove(left)

    by_first(axis, remove_drafts)


def prune(run: str | Path, scheduled: Set[int], keep_last: int, axis: Axis = ALONE) -> None:
    """Remove all but the newest `keep_last` of the checkpoints that are not scheduled; the first process does."""

    def remove_extra() -> None:
        extra = [path for step, path in saved_steps(run).items() if step not in scheduled]
        for path in extra[:-keep_last]:
            doomed = path.with_name(f".{path.name}.draft")  # a kill in the middle leaves no torn checkpoint
            remove(doomed)
            remove(path.rename(doomed))

    by_first(axis, remove_extra)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{group['name']}.{key}": value
        for group in optimizer.param_groups
        for key, value in optimizer.state[group["params"][0]].items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor], path: Path) -> None:
    for group in optimizer.param_groups:
        (parameter,) = group["params"]
        for name in [name for name in stored if name.rpartition(".")[0] == group["name"]]:
            key, value = name.rpartition(".")[2], stored[name]
            if key == "step":
                optimizer.state[parameter][key] = value.to(parameter.device) if group.get("fused") else value
            elif value.shape == parameter.shape:  # with the parameter's strides, as the optimizer makes it
                optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)
            else:
                raise CheckpointError(f"{path}: optimizer state {name} has shape {tuple(value.shape)}")


def split_tensors(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Separate a nested state into JSON values, with the place of each tensor marked, and the tensors by place."""
    if isinstance(value, Tensor):
        return {_TENSOR: path}, {path: value}
    if isinstance(value, Mapping):
        parts = {key: split_tensors(item, f"{path}/{_escaped(key)}") for key, item in value.items()}
        return {k: v for k, (v, _) in parts.items()}, {n: t for _, ts in parts.values() for n, t in ts.items()}
    if isinstance(value, list | tuple):
        items = [split_tensors(item, f"{path}/{i}") for i, item in enumerate(value)]
        return [v for v, _ in items], {n: t for _, ts in items for n, t in ts.items()}
    return value, {}


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")  # as in JSON pointers: two places never have one name


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a state that `split_tensors` took apart together again."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: join_tensors(item, tensors) for key, item in value.items()}
    return [join_tensors(item, tensors) for item in value] if isinstance(value, list) else value
