"""Text sources: a `datasets` name, a saved dataset, or a text, JSON, JSON-lines or Parquet file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from lm_saes import machine
from lm_saes.config import BaseConfig
from lm_saes.errors import DataError
from lm_saes.storage.files import inside

_FILE_KINDS = (".txt", ".json", ".jsonl", ".parquet")


class DatasetConfig(BaseConfig):
    """Where text comes from, and which part of it to use."""

    dataset_name_or_path: str = Field(min_length=1)
    """A name that `datasets` knows, a dataset directory (with `is_dataset_on_disk`), or a file: `.txt` (one document
    per line), `.json` (a list of strings or objects), `.jsonl`, `.parquet`. Files are read into memory whole."""
    cache_dir: str | None = None
    """Where `datasets` keeps what it downloads; None is its own default."""
    is_dataset_on_disk: bool = False
    """True for a directory that `Dataset.save_to_disk` wrote."""
    subset: str | None = None
    """Which configuration of a `datasets` name to load, where it has several."""
    split: str = "train"
    """Which split of a `datasets` name, or of a saved dataset with several, to read."""
    text_column: str = "text"
    """The column or key that holds the text (or the token ids, for a source with `is_dataset_tokenized`)."""
    held_out_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction f of the documents kept for evaluation: document i is held out iff floor((i+1)f) > floor(if)."""
    part: Literal["train", "held_out", "all"] = "all"
    """Which documents to read: those not held out, those held out, or all."""

    @property
    def kind(self) -> str:
        """`"disk"`, `"hub"` or a file ending, from the name alone."""
        if self.is_dataset_on_disk:
            return "disk"
        suffix = Path(self.dataset_name_or_path).suffix.lower()
        return suffix if suffix in _FILE_KINDS else "hub"

    @model_validator(mode="after")
    def _check_combination(self, info: ValidationInfo) -> DatasetConfig:
        if self.kind in _FILE_KINDS:
            self.refuse_without_effect(["cache_dir", "subset", "split"], "dataset_name_or_path is a single file", info)
        if self.kind == "disk":
            self.refuse_without_effect(["cache_dir", "subset"], "the dataset is on disk already", info)
        if self.kind == ".txt":
            self.refuse_without_effect(["text_column"], "a text file has no columns", info)
        if self.part == "all":
            self.refuse_without_effect(["held_out_fraction"], "part='all' reads every document", info)
        if self.part == "held_out" and self.held_out_fraction == 0:
            raise ValueError("part='held_out' needs held_out_fraction > 0; nothing is held out at 0")
        return self


class TextDataset:
    """Documents by position: strings, or lists of token ids. Reading may start anywhere and always gives the same."""

    def __init__(
        self, name: str, n_rows: int, fetch: Callable[[list[int]], Sequence[Any]], cfg: DatasetConfig, fingerprint: str
    ):
        self.name = name
        self._fetch = fetch
        self._cfg = cfg
        self._fingerprint = fingerprint
        self._rows: Sequence[int] = _part(n_rows, cfg.held_out_fraction, cfg.part)
        if not self._rows:
            raise DataError(f"dataset {name}: part={cfg.part!r} of {n_rows} documents is empty; give more text")

    def __len__(self) -> int:
        return len(self._rows)

    def documents(self, start: int = 0) -> Iterator[str]:
        """The texts from document `start` on."""
        for position, value in self._values(start):
            if not isinstance(value, str):
                raise DataError(self._wrong(position, value, "a text") + "; set is_dataset_tokenized to read token ids")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"dataset {self.name}: document {position}: holds half of a character ({error.reason}), which no "
                    "tokenizer reads; correct or remove it"
                ) from error
            yield value

    def token_lists(self, start: int = 0) -> Iterator[list[int]]:
        """The documents from `start` on, where the column holds token ids instead of text."""
        for position, value in self._values(start):
            if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
                raise DataError(self._wrong(position, value, "a list of token ids") + "; unset is_dataset_tokenized")
            yield value

    def provenance(self) -> dict[str, Any]:
        """What was read: the settings, the number of documents, and a hash of the data."""
        return self._cfg.to_json() | {"documents": len(self), "fingerprint": self._fingerprint}

    def _values(self, start: int) -> Iterator[tuple[int, Any]]:
        for first in range(start, len(self._rows), machine.DOCUMENTS_READ):
            rows = list(self._rows[first : first + machine.DOCUMENTS_READ])
            try:
                values = self._fetch(rows)
            except Exception as error:  # whatever `datasets` raises about a file that is not what it should be
                raise DataError(
                    f"dataset {self.name}: documents {rows[0]} to {rows[-1]} cannot be read ({type(error).__name__}: "
                    f"{' '.join(str(error).split())}); restore the dataset"
                ) from error
            yield from zip(rows, values, strict=True)

    def _wrong(self, position: int, value: Any, wanted: str) -> str:
        column = self._cfg.text_column
        return f"dataset {self.name}: document {position}: {column!r} holds {type(value).__name__}, not {wanted}"


def load_dataset(cfg: DatasetConfig) -> TextDataset:
    """Open the documents that `cfg` names. Code that comes with a dataset is never run.

    Raises:
        DataError: missing file, corrupt line, missing column or no documents; the message names file and position.
    """
    name = cfg.dataset_name_or_path
    if cfg.kind in ("hub", "disk"):
        return _from_datasets(cfg)
    path = Path(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"dataset_name_or_path={name!r}: cannot be read ({reason}); give a text file that can be"
        ) from error
    match cfg.kind:
        case ".parquet":
            values = _read_parquet(path, cfg.text_column)
        case ".json":
            values = _read_json(name, _decode(name, content), cfg.text_column)
        case ".jsonl":
            values = _read_json_lines(name, _decode(name, content), cfg.text_column)
        case _:
            values = [line.strip() for line in _lines(_decode(name, content)) if line.strip()]
    if not values:
        raise DataError(f"dataset {name}: has no documents; give a file with text in it")
    return TextDataset(
        name, len(values), lambda rows: [values[i] for i in rows], cfg, hashlib.sha256(content).hexdigest()
    )


def _part(n_rows: int, fraction: float, part: str) -> Sequence[int]:
    if part == "all" or fraction == 0:
        return range(n_rows)
    share = Fraction(repr(fraction))
    numerator, denominator = share.numerator, share.denominator
    wanted = part == "held_out"
    return [i for i in range(n_rows) if ((i + 1) * numerator // denominator > i * numerator // denominator) is wanted]


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"dataset {name}: line {line}: not UTF-8 text ({error.reason}); convert the file") from error


def _lines(text: str) -> list[str]:
    """Lines as files have them: unlike `splitlines`, not split at form feeds or Unicode separators inside."""
    return text.replace("\r\n", "\n").split("\n")


def _read_json(name: str, text: str, column: str) -> list[Any]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"dataset {name}: {line}not valid JSON ({_reason(error)}); correct the file") from error
    if not isinstance(items, list):
        raise DataError(f"dataset {name}: holds one {type(items).__name__}; give a list of strings or of objects")
    return [_pick(item, column, f"dataset {name}: item {i}") for i, item in enumerate(items)]


def _read_json_lines(name: str, text: str, column: str) -> list[Any]:
    values = []
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"dataset {name}: line {number}: not valid JSON ({_reason(error)}); correct or remove the line"
                ) from error
            values.append(_pick(item, column, f"dataset {name}: line {number}"))
    return values


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _pick(item: Any, column: str, where: str) -> str | list[int]:
    if isinstance(item, dict):
        if column not in item:
            raise DataError(f"{where}: {_no_column(column, item)}")
        item = item[column]
    if isinstance(item, str) or (isinstance(item, list) and all(type(token) is int for token in item)):
        return item
    raise DataError(f"{where}: {column!r} holds {type(item).__name__}; give a text or a list of token ids")


def _no_column(column: str, known: Iterable[str]) -> str:
    return f"text_column={column!r} is not there; set it to one of {', '.join(map(repr, known)) or 'no columns'}"


def _read_parquet(path: Path, column: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"dataset {path}: {_no_column(column, names)}")
            return file.read(columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"dataset {path}: not a readable Parquet file ({' '.join(str(error).split())}); restore it"
        ) from error


def _from_datasets(cfg: DatasetConfig) -> TextDataset:
    import datasets

    name = cfg.dataset_name_or_path
    try:
        if cfg.is_dataset_on_disk:
            _check_saved_dataset(Path(name))
            loaded = datasets.load_from_disk(name)
        else:
            if Path(name).is_dir():
                _check_data_files(Path(name), cfg)
            loaded = datasets.load_dataset(name, cfg.subset, split=cfg.split, cache_dir=cfg.cache_dir)
    except Exception as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"dataset_name_or_path={name!r}: cannot be loaded ({type(error).__name__}: {reason}); give a name that "
            f"`datasets` knows, its directory, or a file ending in {', '.join(_FILE_KINDS)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if cfg.split not in loaded:
            known = ", ".join(map(repr, loaded))
            raise DataError(f"dataset {name}: split={cfg.split!r} is not there; set it to one of {known}")
        loaded = loaded[cfg.split]
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(
            f"dataset {name}: gave a {type(loaded).__name__}, which is not read by position; give a Dataset"
        )
    if cfg.text_column not in loaded.column_names:
        raise DataError(f"dataset {name}: {_no_column(cfg.text_column, loaded.column_names)}")
    if not len(loaded):
        raise DataError(f"dataset {name}: split={cfg.split!r} has no documents; name another")
    rows = loaded.select_columns([cfg.text_column])
    return TextDataset(name, len(rows), lambda picked: rows[picked][cfg.text_column], cfg, rows._fingerprint)


def _check_saved_dataset(directory: Path) -> None:
    """Raise `DataError` if a directory that `save_to_disk` wrote names files elsewhere."""
    for state in directory.rglob("state.json"):
        for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
            _check_inside(directory, state.parent, entry["filename"], state.name)
    splits = directory / "dataset_dict.json"
    for split in json.loads(splits.read_text(encoding="utf-8"))["splits"] if splits.exists() else ():
        _check_inside(directory, directory, split, splits.name)


def _check_data_files(directory: Path, cfg: DatasetConfig) -> None:
    """Raise `DataError` if the description of a directory of data files names files elsewhere."""
    import datasets

    builder = datasets.load_dataset_builder(str(directory), cfg.subset, cache_dir=cfg.cache_dir)
    for files in (builder.config.data_files or {}).values():
        for file in files:
            _check_inside(directory, directory, str(file), "its description")


def _check_inside(directory: Path, folder: Path, name: str, where: str) -> None:
    try:
        inside(folder, name)
    except ValueError as error:
        raise DataError(f"dataset_name_or_path={str(directory)!r}: {where}: {error}; name files in it") from error
