"""Configs are values: strict pydantic models that touch no disk, read from TOML, YAML or JSON, saved as JSON."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo

from lm_saes.errors import ConfigError

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
_FEW_KEYS = 20
LENIENT = {"lenient": True}
"""Validation context for files written earlier, perhaps by other versions: what has no effect only warns."""


def parse_dtype(value: Any) -> Any:
    """Turn `"float32"`, `"torch.bfloat16"` or `"bf16"` into the `torch.dtype`; anything else passes through."""
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return _check_dtype(getattr(torch, _SHORT_DTYPES.get(name, name), None), value)


def _check_dtype(dtype: Any, value: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{value!r} is not a floating-point dtype; use one of float32, bfloat16, float16, float64")
    return dtype


DType = Annotated[
    torch.dtype,
    BeforeValidator(lambda value: _check_dtype(parse_dtype(value), value)),
    PlainSerializer(lambda dtype: str(dtype).removeprefix("torch."), return_type=str),
    WithJsonSchema({"type": "string"}),
]
"""A `torch.dtype` that may be written as a string and is saved as one."""


class BaseConfig(BaseModel):
    """Strict config: an unknown key is an error that names the nearest known one; no field has two spellings."""

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        validate_assignment=True,
        validate_default=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = cls.known_fields()
            for key in data:
                if key not in known:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    keys = ", ".join(known) if len(known) <= _FEW_KEYS else "`lm-saes settings` prints them"
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {keys}"
                    raise ValueError(f"unknown key {key!r} in {cls.__name__}; {hint}")
                if isinstance(data[key], bool) and _is_number(known[key].annotation):
                    raise ValueError(f"{key}={data[key]}: must be a number, not a switch; write it in digits")
        return data

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """Every setting that may be given, by name."""
        return dict(cls.model_fields)

    def default_of(self, name: str) -> Any:
        """What a setting is unless it is given."""
        return type(self).model_fields[name].get_default(call_default_factory=True, validated_data={})

    def refuse_without_effect(self, fields: Iterable[str], reason: str, info: ValidationInfo | None = None) -> None:
        """Raise if one of `fields` was set to something other than its default although it cannot have an effect.

        Under the `LENIENT` context (configs read back from files) it warns instead.
        """
        for message in self._set_in_vain(fields, reason):
            if info is not None and info.context and info.context.get("lenient"):
                warnings.warn(f"{message}; remove it", stacklevel=2)
            else:
                raise ConfigError(f"{message}; remove it")

    def warn_without_effect(self, fields: Iterable[str], reason: str) -> None:
        """Warn about fields that are kept only so that old configs still load."""
        for message in self._set_in_vain(fields, reason):
            warnings.warn(message, stacklevel=2)

    def _set_in_vain(self, fields: Iterable[str], reason: str) -> Iterator[str]:
        for name in fields:
            if name in self.model_fields_set and getattr(self, name) != self.default_of(name):
                yield f"{name}={getattr(self, name)!r} has no effect: {reason}"

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=BaseModel)


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a TOML, YAML or JSON file into a dictionary.

    Raises:
        ConfigError: the file is missing, unreadable, of another kind, or not a table at the top.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config {path}: cannot be read ({reason}); give a TOML, YAML or JSON file") from error
    try:
        match path.suffix.lower():
            case ".toml":
                data: Any = tomllib.loads(text)
            case ".json":
                data = json.loads(text)
            case ".yaml" | ".yml":
                import yaml

                data = yaml.safe_load(text)
            case other:
                raise ConfigError(f"config {path}: ending {other!r} is not known; use .toml, .yaml or .json")
    except ConfigError:
        raise
    except Exception as error:
        reason = _shortened(" ".join(str(error).split()), 200)
        raise ConfigError(f"config {path}: not valid {path.suffix[1:].upper()}: {reason}; correct the file") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config {path}: the top level must be a table of settings, not {type(data).__name__}")
    return cast(dict[str, Any], data)


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` settings to nested tables in place; values are read as JSON, else as strings.

    A number in the path is a list position (`activation_factory.sources.0.path=...`).
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override!r}: write it as a.b=value")
        path, text = path.strip(), text.strip()
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = {"None": None, "True": True, "False": False}.get(text, text)
        *parents, last = path.split(".")
        node: Any = data
        try:
            for key in parents:
                node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
            if isinstance(node, list):
                node[int(last)] = value
            else:
                node[last] = value
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"--set {override!r}: there is no setting {path!r} to put it into") from error
    return data


def build(cls: type[C], data: Any, where: str = "") -> C:
    """Validate `data` as a `cls`; a mistake becomes one `ConfigError` line with the field's path."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError(where + describe(error, data)) from error


def load_config(cls: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read `path`, apply `overrides` (`a.b=value`) and validate it as a `cls`."""
    return build(cls, apply_overrides(read_document(path), overrides), where=f"{path}: ")


def describe(error: ValidationError, data: Any = None) -> str:
    """One line for the first mistake that pydantic found: path, rule, value (and how many more there are).

    `data` is what was validated. With it the path holds the user's own keys only, without pydantic's names of the
    members of a union, and of a union the member is described that fits furthest.
    """
    errors = error.errors(include_url=False)
    paths = [item["loc"] if data is None else _path_in(data, item["loc"], item["type"]) for item in errors]
    members = _members_of_first(errors, paths[0])
    deepest = max((paths[i] for i in members), key=len)
    told = [errors[i] for i in members if paths[i] == deepest]
    where = ".".join(map(str, deepest)) + ": " if deepest else ""
    others = len({path for i, path in enumerate(paths) if i not in members})
    more = f"; and {others} more mistake{'s' if others > 1 else ''}" if others else ""
    return where + "; or ".join(dict.fromkeys(map(_sentence, told))) + _value_of(told[0]) + more


def _members_of_first(errors: Sequence[Any], path: tuple[int | str, ...]) -> list[int]:
    """Which errors say, each for a member of a union, what the first does; alone where that is of no union.

    `path` is the first error's location without pydantic's names of members.
    """
    first = errors[0]["loc"]
    union = next((at for at, part in enumerate(first) if path[at : at + 1] != (part,)), None)
    return [0] if union is None else [i for i, item in enumerate(errors) if item["loc"][:union] == first[:union]]


def _value_of(item: Any) -> str:
    """The value that was refused, where the sentence about it does not show it."""
    value = item.get("input")
    quiet = item["type"] in _KINDS_THAT_SHOW_THE_VALUE or (isinstance(value, dict) and value)
    return "" if quiet else f" (got {_shortened(repr(value))})"


_KINDS_THAT_SHOW_THE_VALUE = {"value_error", "missing", "union_tag_invalid", "union_tag_not_found"}


def _path_in(data: Any, loc: tuple[int | str, ...], kind: str) -> tuple[int | str, ...]:
    """The parts of pydantic's `loc` that are keys or positions in `data`."""
    path: list[int | str] = []
    for at, part in enumerate(loc):
        if (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and part in range(len(data))):
            data = cast(Any, data)[part]
            path.append(part)
        elif kind == "missing" and at == len(loc) - 1:
            path.append(part)
    return tuple(path)


def _sentence(item: Any) -> str:
    context = item.get("ctx", {})
    match item["type"]:
        case "missing":
            return "required, but not set; add it"
        case "union_tag_not_found":
            return f"{context['discriminator']} is not set; it says of which kind this is"
        case "union_tag_invalid":
            key = context["discriminator"].strip("'")
            return f"{key}={context['tag']!r} is not known; use one of {context['expected_tags']}"
        case "model_type":
            return "must be a table of settings"
        case "too_short":
            return f"must have at least {context['min_length']} item{'s' if context['min_length'] > 1 else ''}"
        case "too_long":
            return f"must have at most {context['max_length']} items"
        case _:
            message = " ".join(item["msg"].removeprefix("Value error, ").split())
            return message.replace("Input should be", "must be", 1)


def _shortened(text: str, n: int = 80) -> str:
    return text if len(text) <= n else text[: n - 3] + "..."


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers but no switch (`True` would count as 1)."""
    parts = _parts(annotation)
    return bool({int, float} & parts) and bool not in parts


def _parts(annotation: Any) -> set[Any]:
    """The types that may stand in a field's place, those of unions and annotations included."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, Annotated):
        return set().union(*map(_parts, typing.get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()
