"""Configs: strict, readable mistakes, and the same values from Python, TOML, YAML and JSON."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from lm_saes.config import (
    LENIENT,
    BaseConfig,
    DType,
    apply_overrides,
    build,
    describe,
    load_config,
    read_document,
)
from lm_saes.errors import ConfigError
from lm_saes.runs.listing import known_settings


class Text(BaseConfig):
    type: Literal["text"] = "text"
    name: str
    weight: float = 1.0
    """How often it is drawn."""


class Cached(BaseConfig):
    type: Literal["cached"] = "cached"
    path: str


class Training(BaseConfig):
    learning_rate: float | dict[str, float] = 4e-4
    steps: int | None = None
    dtype: DType = torch.float32
    """Type of the
    numbers."""
    other_dtype: DType | None = None
    use_k: bool = False
    k: int = 50
    names: list[str] = Field(default_factory=lambda: ["a"])

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "Training":
        if not self.use_k:
            self.refuse_without_effect(["k", "names"], "use_k is off", info)
        return self


class Settings(BaseConfig):
    training: Training = Field(default_factory=Training)
    """How to train."""
    sources: list[Annotated[Text | Cached, Field(discriminator="type")]] = Field(default_factory=list)
    loose: list[Text | Cached] = Field(default_factory=list)
    texts: dict[str, Text] = Field(default_factory=dict)
    total: float = 3e8


DOCUMENT: dict[str, Any] = {
    "training": {"learning_rate": {"default": 1e-3}, "dtype": "bf16"},
    "sources": [{"type": "text", "name": "wiki"}, {"type": "cached", "path": "x"}],
}
TOML = """
sources = [{type = "text", name = "wiki"}, {type = "cached", path = "x"}]
[training]
learning_rate = {default = 1e-3}
dtype = "bf16"
"""
YAML = """
training: {learning_rate: {default: 0.001}, dtype: bf16}
sources:
  - {type: text, name: wiki}
  - {type: cached, path: x}
"""


def complaint(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Settings, data)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    assert complaint({"training": {"learning_rat": 1}}) == (
        "training: unknown key 'learning_rat' in Training; did you mean 'learning_rate'?"
    )


def test_an_unknown_key_that_is_near_to_none_lists_what_is_known() -> None:
    assert complaint({"zzz": 1}) == (
        "unknown key 'zzz' in Settings; known keys: training, sources, loose, texts, total"
    )


def test_assignment_is_checked_too() -> None:
    training = Training()
    with pytest.raises(ValidationError):
        training.steps = "many"  # type: ignore[assignment]
    training.steps = 3
    assert training.steps == 3


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("float32", torch.float32),
        ("torch.bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("fp64", torch.float64),
        (torch.float16, torch.float16),
    ],
)
def test_every_spelling_of_a_dtype_comes_back_from_json(spelling: Any, dtype: torch.dtype) -> None:
    training = Training(dtype=spelling, other_dtype=spelling)
    assert training.dtype == training.other_dtype == dtype
    saved = json.loads(json.dumps(training.to_json()))
    assert saved["dtype"] == str(dtype).removeprefix("torch.")
    assert Training.model_validate(saved).dtype == dtype


@pytest.mark.parametrize("wrong", ["bf17", "int8", "nn", 32, torch.int64])
def test_what_is_no_floating_point_dtype_is_refused(wrong: Any) -> None:
    assert complaint({"training": {"dtype": wrong}}) == (
        f"training.dtype: {wrong!r} is not a floating-point dtype; use one of float32, bfloat16, float16, float64"
    )


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"sources": [{"type": "text"}]}, "sources.0.name: required, but not set; add it"),
        (
            {"sources": [{"type": "text", "name": "a", "weight": "b"}]},
            "sources.0.weight: must be a valid number, unable to parse string as a number (got 'b')",
        ),
        (
            {"sources": [{"type": "txt"}]},
            "sources.0: type='txt' is not known; use one of 'text', 'cached'",
        ),
        ({"sources": [{"name": "a"}]}, "sources.0: 'type' is not set; it says of which kind this is"),
        ({"sources": [{"type": "cached", "pth": 1}]}, "sources.0: unknown key 'pth' in Cached; did you mean 'path'?"),
        ({"loose": [{"type": "cached", "path": 3}]}, "loose.0.path: must be a valid string (got 3)"),
        (
            {"training": {"learning_rate": {"W_E": "x"}}},
            "training.learning_rate.W_E: must be a valid number, unable to parse string as a number (got 'x')",
        ),
        (
            {"training": {"learning_rate": "x"}},
            "training.learning_rate: must be a valid number, unable to parse string as a number; "
            "or must be a valid dictionary (got 'x')",
        ),
        (
            {"training": {"learning_rate": None}},
            "training.learning_rate: must be a valid number; or must be a valid dictionary (got None)",
        ),
        ({"training": 3}, "training: must be a table of settings (got 3)"),
        (
            {"total": "a" * 200},
            f"total: must be a valid number, unable to parse string as a number (got '{'a' * 76}...)",
        ),
        (
            {"training": {"steps": 1.5}, "texts": {"x": {"name": 1}, "y": {}}},
            "training.steps: must be a valid integer, got a number with a fractional part (got 1.5); "
            "and 2 more mistakes",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_users_own_path(data: Any, line: str) -> None:
    assert complaint(data) == line


def test_describe_without_the_data_keeps_pydantics_path() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"total": "x"})
    assert describe(caught.value).startswith("total: must be a valid number")


def test_a_setting_without_effect_is_an_error() -> None:
    assert complaint({"training": {"k": 7}}) == "training: k=7 has no effect: use_k is off; remove it"
    Training(k=7, use_k=True)
    Training(k=50, names=["a"])  # at their defaults, as to_json writes them


def test_a_setting_without_effect_only_warns_in_files_written_earlier() -> None:
    with pytest.warns(UserWarning, match="k=7 has no effect: use_k is off"):
        assert Training.model_validate({"k": 7}, context=LENIENT).k == 7


def test_a_setting_kept_for_old_configs_only_warns() -> None:
    training = Training(k=7, use_k=True, names=["a"])
    with pytest.warns(UserWarning, match=r"^k=7 has no effect: it is chosen automatically$") as warned:
        training.warn_without_effect(["k", "names", "steps"], "it is chosen automatically")
    assert len(warned) == 1


def test_toml_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    texts = {"a.toml": TOML, "a.yaml": YAML, "a.yml": YAML, "a.json": json.dumps(DOCUMENT)}
    loaded = []
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_document(tmp_path / name) == DOCUMENT
        loaded.append(load_config(Settings, tmp_path / name))
    assert all(settings == loaded[0] for settings in loaded)
    assert loaded[0].training.dtype == torch.bfloat16
    assert Settings.model_validate(loaded[0].to_json()) == loaded[0]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.toml", "x = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [\nb", "not valid YAML"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a.ini", "", "ending '.ini' is not known; use .toml, .yaml or .json"),
        ("a.json", "[1]", "the top level must be a table of settings, not list"),
        ("missing.toml", None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, name: str, text: str | None, line: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / name)
    assert line in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_into_tables_and_lists() -> None:
    data: dict[str, Any] = {"training": {"steps": 1}, "sources": [{"type": "text", "name": "a"}]}
    apply_overrides(
        data,
        [
            "training.steps=5",
            "training.learning_rate=1e-3",
            "training.dtype = bf16",
            "training.use_k=True",
            "training.k=null",
            "sources.0.name=b=c",
            'new.table={"x": [1, 2]}',
        ],
    )
    assert data == {
        "training": {"steps": 5, "learning_rate": 1e-3, "dtype": "bf16", "use_k": True, "k": None},
        "sources": [{"type": "text", "name": "b=c"}],
        "new": {"table": {"x": [1, 2]}},
    }


@pytest.mark.parametrize("override", ["steps", "=3", "sources.3.name=x", "sources.first=x", "training.steps.deep=1"])
def test_an_override_that_fits_nowhere_is_an_error_that_quotes_it(override: str) -> None:
    data = {"training": {"steps": 1}, "sources": [{"type": "text"}]}
    with pytest.raises(ConfigError) as caught:
        apply_overrides(data, [override])
    assert repr(override) in str(caught.value)


def test_load_config_names_the_file_and_the_overridden_setting(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    assert load_config(Settings, tmp_path / "run.toml", ["training.steps=7"]).training.steps == 7
    with pytest.raises(ConfigError, match=r"run\.toml: training\.steps: must be a valid integer"):
        load_config(Settings, tmp_path / "run.toml", ["training.steps=x"])


def test_known_settings_lists_every_nested_setting_as_one_would_say_it() -> None:
    rows = {(path, kind): (default, text) for path, kind, default, text in known_settings(Settings)}
    assert rows[("training", "Training")] == ("its defaults", "How to train.")
    assert rows[("training.learning_rate", "float | dict[str, float]")] == ("0.0004", "")
    assert rows[("training.dtype", "dtype")] == ("'float32'", "Type of the numbers.")
    assert rows[("training.other_dtype", "dtype | None")] == ("None", "")
    assert rows[("sources", "list[Text | Cached]")] == ("[]", "")
    assert rows[("sources.0.weight", "float")] == ("1.0", "[type='text'] How often it is drawn.")
    assert rows[("sources.0.type", "'cached'")] == ("'cached'", "[type='cached']")
    assert rows[("texts.<name>.name", "str")] == ("required", "")
    assert rows[("total", "float")] == ("3e+08", "")
