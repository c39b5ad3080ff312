"""Text from every kind of file, the held-out split, and what is said when a file is wrong."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from lm_saes.data.text import DatasetConfig, load_dataset
from lm_saes.errors import DataError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(name: str, **settings: object) -> list[str]:
    return list(load_dataset(DatasetConfig.model_validate({"dataset_name_or_path": name, **settings})).documents(0))


def test_text_file_has_a_document_per_line(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "one\n\n  \ntwo\x0cstill two\r\nthree")
    assert read(name) == ["one", "two\x0cstill two", "three"]


def test_json_holds_strings_or_objects(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", '["x", "y"]')) == ["x", "y"]
    objects = json.dumps([{"extract": "x", "title": "t"}, {"extract": "y"}])
    assert read(write(tmp_path / "b.json", objects), text_column="extract") == ["x", "y"]


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", '{"text": "x"}\n\n{"text": "y"}\n')) == ["x", "y"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == ["x", "y"]


def test_saved_dataset_with_and_without_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(600)]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([5])}).save_to_disk(str(tmp_path / "two"))
    cfg = DatasetConfig(dataset_name_or_path=str(tmp_path / "one"), is_dataset_on_disk=True)
    assert list(load_dataset(cfg).documents(300)) == [str(i) for i in range(300, 600)]
    assert read(str(tmp_path / "two"), is_dataset_on_disk=True, split="test") == ["5"]
    with pytest.raises(DataError, match=r"split='dev' is not there; set it to one of 'train', 'test'"):
        read(str(tmp_path / "two"), is_dataset_on_disk=True, split="dev")
    with pytest.raises(DataError, match=r"text_column='body' is not there; set it to one of 'text'"):
        read(str(tmp_path / "one"), is_dataset_on_disk=True, text_column="body")


def test_a_directory_of_files_goes_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", '{"text": "x"}\n{"text": "y"}\n')
    assert read(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")) == ["x", "y"]


def test_held_out_documents_are_exactly_the_fraction(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "\n".join(str(i) for i in range(100)))
    # floor((i+1)/4) > floor(i/4) for i = 3, 7, 11 ...
    assert read(name, held_out_fraction=0.25, part="held_out") == [str(i) for i in range(3, 100, 4)]
    for fraction in (0.05, 0.29, 0.7):  # in floating point 100 * 0.29 is below 29
        held = read(name, held_out_fraction=fraction, part="held_out")
        kept = read(name, held_out_fraction=fraction, part="train")
        assert len(held) == round(100 * fraction)
        assert sorted(held + kept, key=int) == read(name)


def test_reading_starts_anywhere_and_the_provenance_names_the_data(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "one\ntwo\nthree")
    dataset = load_dataset(DatasetConfig(dataset_name_or_path=name))
    assert len(dataset) == 3
    assert list(dataset.documents(2)) == ["three"]
    before = dataset.provenance()
    assert before["documents"] == 3
    write(tmp_path / "a.txt", "one\ntwo\nTHREE")
    after = load_dataset(DatasetConfig(dataset_name_or_path=name)).provenance()
    assert before["fingerprint"] != after["fingerprint"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y"}',
            "line 3: text_column='text' is not there; set it to one of 'body'",
        ),
        ("a.jsonl", b'{"text": 3}', "line 1: 'text' holds int; give a text"),
        ("a.json", b'[\n"x",\n', "line 3: not valid JSON"),
        ("a.json", b'{"text": "x"}', "holds one dict; give a list"),
        ("a.json", b'["x", null]', "item 1: 'text' holds NoneType"),
        ("a.txt", b"fine\nbr\xffken", "line 2: not UTF-8"),
        ("a.txt", b" \n\n", "has no documents"),
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(str(tmp_path / file))
    assert message in str(caught.value)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt': cannot be read \(No such file"):
        read(str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="gone': cannot be loaded"):
        read(str(tmp_path / "gone"), is_dataset_on_disk=True)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"text_column='text' is not there; set it to one of 'body', 'n'"):
        read(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="document 0: 'n' holds int, not a text"):
        read(str(tmp_path / "a.parquet"), text_column="n")


def test_a_part_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="part='held_out' of 1 documents is empty"):
        read(write(tmp_path / "a.txt", "one"), held_out_fraction=0.1, part="held_out")


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset_name_or_path": "a.txt", "text_column": "body"},
        {"dataset_name_or_path": "a.jsonl", "split": "test"},
        {"dataset_name_or_path": "a", "is_dataset_on_disk": True, "cache_dir": "c"},
        {"dataset_name_or_path": "a", "held_out_fraction": 0.1},
        {"dataset_name_or_path": "a", "part": "held_out"},
    ],
)
def test_settings_without_effect_are_errors(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"has no effect|needs held_out_fraction"):
        DatasetConfig.model_validate(settings)
