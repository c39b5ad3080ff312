"""Files of a dictionary whose parts many processes hold: each writes, and reads, its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lm_saes.axes.together import by_first, exchange
from lm_saes.dictionaries.files import OLD_WEIGHTS, SHARDS, WEIGHTS, files_to_check, load_weights
from lm_saes.errors import CheckpointError
from lm_saes.parallel.sharding import cuts_of, held, own_part
from lm_saes.storage.drafts import save_together
from lm_saes.storage.files import remove
from lm_saes.storage.manifest import MANIFEST, check_file
from lm_saes.storage.parts import Parts, write_parts

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder


def save_parts(dictionary: AbstractSparseAutoEncoder, directory: Path) -> None:
    """What `save_pretrained` does where there are several processes."""
    axis = dictionary.axes.everywhere

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)  # else it would contradict the new files if one fails

    def finish() -> None:
        for other in (WEIGHTS, OLD_WEIGHTS):  # which would be read instead
            remove(directory / other)
        dictionary.cfg.save_hyperparameters(directory)
        dictionary.save_provenance(directory, {f"{SHARDS}/{name}": entry for name, entry in entries.items()})

    by_first(axis, begin)
    entries = save_together(directory / SHARDS, axis, lambda draft: write_weights(dictionary, draft))
    by_first(axis, finish)


def write_weights(dictionary: AbstractSparseAutoEncoder, folder: Path) -> list[Path]:
    """Write this process's share of the weights; the files."""
    own = held(dictionary, dictionary.full_state_dict(), dictionary.file_dim_maps())
    return write_parts(folder, own, dictionary.axes, dictionary.file_metadata)


def read_parts(dictionary: AbstractSparseAutoEncoder, path: Path) -> dict[str, Tensor]:
    """This process's parts of the weights in a directory (or in one file).

    Where there is a manifest, each file is hashed by one of the processes.

    Raises:
        CheckpointError: in all processes, if files are not as they were saved; if there are none, or they do not fit.
    """
    if path.is_dir():
        _check(path, dictionary)
    where = next((path / name for name in (WEIGHTS, OLD_WEIGHTS, SHARDS) if (path / name).exists()), path)
    if where.name == OLD_WEIGHTS or (where == path and path.is_dir()):
        return own_part(dictionary, load_weights(path))
    maps = dictionary.file_dim_maps()
    with Parts(where) as parts:
        return {n: parts.read(n, cuts_of(dictionary, maps.get(n, {}), shape)) for n, shape in parts.shapes.items()}


def _check(directory: Path, dictionary: AbstractSparseAutoEncoder) -> None:
    axis, wrong = dictionary.axes.everywhere, None
    try:
        for name in files_to_check(directory)[axis.place :: axis.size]:
            check_file(directory, name)
    except CheckpointError as error:
        wrong = str(error)
    for told in exchange(axis, wrong):
        if told is not None:
            raise CheckpointError(told)
