"""Files that run code where they are unpickled: they make a marker file."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch


class Bomb:
    """Unpickling it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


def in_pickle(marker: Path) -> bytes:
    return pickle.dumps({"W_E": Bomb(marker)})


def in_old_pickle(marker: Path) -> bytes:
    return pickle.dumps([Bomb(marker)], protocol=0)


def in_torch(marker: Path) -> bytes:
    return _saved({"W_E": torch.zeros(2), "b_E": Bomb(marker)}, True)


def in_old_torch(marker: Path) -> bytes:
    return _saved({"W_E": torch.zeros(2), "b_E": Bomb(marker)}, False)


def in_numpy(marker: Path) -> bytes:
    file = io.BytesIO()
    numpy.save(file, numpy.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def in_yaml(marker: Path) -> bytes:
    return f"!!python/object/apply:builtins.open ['{marker}', 'w']\n".encode()


BINARY = (in_pickle, in_old_pickle, in_torch, in_old_torch, in_numpy)


def in_arrow(path: Path, marker: Path) -> None:
    """An Arrow file with a column of the extension type that old versions of pyarrow unpickled."""
    import pyarrow

    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": in_pickle(marker)}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=kind)])
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pyarrow.record_batch([pyarrow.array(["word3 word4"] * 9)], schema=schema))


def in_parquet(path: Path, marker: Path) -> None:
    """A Parquet file that says the same of its column."""
    import pyarrow
    import pyarrow.parquet

    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": in_pickle(marker)}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=kind)])
    table = pyarrow.Table.from_arrays([pyarrow.array(["word3 word4"] * 9)], schema=schema)
    pyarrow.parquet.write_table(table, path)


def in_tar(path: Path, marker: Path) -> None:
    """An archive as the webdataset format has it, whose members are pickled."""
    members = {"0.txt": b"word3", "0.pth": in_torch(marker), "0.pyd": in_pickle(marker), "0.npy": in_numpy(marker)}
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def in_module(marker: Path) -> str:
    """Source code for a stranger's model: importing it is enough."""
    return f"open({str(marker)!r}, 'w')\nConfig = Model = Tokenizer = object\n"


def _saved(value: Any, as_zip: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=as_zip)
    return file.getvalue()
