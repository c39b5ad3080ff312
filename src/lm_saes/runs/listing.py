"""Every setting of a command, with its type, default and meaning."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lm_saes.choices import OpenConfig


def known_settings(cls: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every setting of a config as (path, type, default, description), nested configs included.

    A position in a list is written 0, a key of a table of configs `<name>`; where several kinds of config may stand
    in one place, the description says which kind the setting belongs to.
    """
    rows: list[tuple[str, str, str, str]] = []
    families = cls.choices if issubclass(cls, OpenConfig) else {}
    for name, field in cls.model_fields.items():
        kind, default, text = _told(field)
        if name in families:
            kind = " | ".join([*map(repr, families[name].registry), *(["None"] if "None" in kind else [])])
        rows.append((prefix + name, kind, default, text))
        nested = _configs_in(field.annotation)
        for place, config in nested:
            for path, kind, value, text in known_settings(config, f"{prefix}{name}{place}."):
                rows.append((path, kind, value, f"[{_kind(config)}] {text}".rstrip() if len(nested) > 1 else text))
    if issubclass(cls, OpenConfig):
        for name, kind in cls.tables.registry.items() if cls.tables else ():
            if name not in cls.model_fields:
                rows += known_settings(kind, f"{prefix}{name}.")
        for choice, name, field in cls.read_by_choices():
            if name not in cls.model_fields:
                kind, default, text = _told(field)
                rows.append((prefix + name, kind, default, f"[{choice.name}] {text}".rstrip()))
    return rows


def _told(field: FieldInfo) -> tuple[str, str, str]:
    """Type, default and meaning of a setting."""
    default = "required"
    if not field.is_required():
        default = _default_text(field.get_default(call_default_factory=True, validated_data={}))
    return _type_name(field.annotation), default, " ".join((field.description or "").split())


def _configs_in(annotation: Any, place: str = "") -> list[tuple[str, type[BaseModel]]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [(place, annotation)] if issubclass(annotation, BaseModel) else []
    match typing.get_origin(annotation):
        case origin if origin in (list, tuple, Sequence):
            place += ".0"
        case origin if origin in (dict, Mapping):
            place += ".<name>"
    return [found for part in typing.get_args(annotation) for found in _configs_in(part, place)]


def _kind(config: type[BaseModel]) -> str:
    """`type='dataset'`, where a field that allows a single value tells the kinds apart; else the class's name."""
    for name, field in config.model_fields.items():
        if typing.get_origin(field.annotation) is Literal and len(typing.get_args(field.annotation)) == 1:
            return f"{name}={typing.get_args(field.annotation)[0]!r}"
    return config.__name__


def _type_name(annotation: Any) -> str:
    """`float | dict[str, float]`, `'adam' | 'sparseadam'`, `dtype | None`: as one would say it, without modules."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (None, types.NoneType):
        return "None"
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(_type_name, parts))
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if part is ... else _type_name(part) for part in parts)}]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(repr(member.value) for member in annotation)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


def _default_text(value: Any) -> str:
    match value:
        case BaseModel():
            return "its defaults"
        case Enum():
            return repr(value.value)
        case float():
            return short if "e" in (short := f"{value:g}") and float(short) == value else repr(value)
        case torch.dtype() | Path():
            return repr(str(value).removeprefix("torch."))
        case _:
            return repr(value)
