"""Settings that choose a class (a loss, schedule, optimizer, logger) and take in the settings of what is chosen.

A *choice* is one of several classes that a setting names: a sparsity loss, a rate schedule, an optimizer. Its fields
are the settings that it reads, with type, default and help beside the code that uses them; defining the class registers
it. An *open* config offers choices and takes in their settings beside its own. What ships with the package is also a
mixin of the config, so that editors know it; what is registered later is taken in all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lm_saes.config import BaseConfig, build, describe
from lm_saes.errors import ConfigError


class Choice(BaseConfig):
    """One of a family of classes, found by name. A family is a subclass with a `registry` of its own."""

    name: ClassVar[str]
    registry: ClassVar[dict[str, Any]]
    noun: ClassVar[str]
    """What the family's members are, for messages."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "name" in vars(cls):
            cls.registry[cls.name] = cls

    @classmethod
    def find(cls, name: str) -> type[Self]:
        """The member of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in cls.registry:
            raise ConfigError(f"{name!r}: not a {cls.noun}; use one of {', '.join(cls.registry)}")
        return cls.registry[name]


def one_of(name: str, names: Iterable[str]) -> str:
    """A name, checked to be one of several, with the words that pydantic has for a wrong literal."""
    if name not in (names := list(names)):
        *others, last = map(repr, names)
        allowed = f"{', '.join(others)} or {last}"
        raise PydanticCustomError("literal_error", "Input should be {names}", {"names": allowed})
    return name


class OpenConfig(BaseConfig):
    """A config that offers choices: what the chosen class reads are settings of it too."""

    model_config = ConfigDict(extra="allow")
    choices: ClassVar[Mapping[str, type[Choice]]] = {}
    """Settings that name a member of a family."""
    parts: ClassVar[type[Choice] | None] = None
    """A family all of whose members read this config."""
    tables: ClassVar[type[Choice] | None] = None
    """A family of which each member's settings stand in a table of its name."""

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        tables = {} if cls.tables is None else {name: FieldInfo(default=None) for name in cls.tables.registry}
        return tables | {name: field for _, name, field in cls.read_by_choices()} | super().known_fields()

    @classmethod
    def read_by_choices(cls) -> Iterator[tuple[type[Choice], str, FieldInfo]]:
        """Every setting of every class that may be chosen."""
        for family in (*cls.choices.values(), *([] if cls.parts is None else [cls.parts])):
            for kind in family.registry.values():
                yield from ((kind, name, field) for name, field in kind.model_fields.items())

    def default_of(self, name: str) -> Any:
        return self.known_fields()[name].get_default(call_default_factory=True, validated_data={})

    def chosen(self, setting: str) -> Choice | None:
        """The member that a setting names, with the settings that it reads; None if it names none."""
        name = getattr(self, setting)
        if name is None:
            return None
        return self._as(self.choices[setting].find(name))

    def all_parts(self) -> list[Any]:
        """The members of `parts`, each with the settings that it reads."""
        return [] if self.parts is None else [self._as(kind) for kind in self.parts.registry.values()]

    def _as(self, kind: type[Choice]) -> Any:
        """A member with those of these settings that were given and that it reads."""
        return kind.model_validate({n: getattr(self, n) for n in kind.model_fields if n in self.model_fields_set})

    @model_validator(mode="after")
    def _take_in_choices(self, info: ValidationInfo) -> Self:
        extra = self.__pydantic_extra__ or {}
        try:
            choices = {setting: self.chosen(setting) for setting in self.choices}
            parts = self.all_parts()
        except ValidationError as error:
            raise ValueError(describe(error, extra)) from error
        for part in parts:
            extra |= {n: getattr(part, n) for n in type(part).model_fields if n not in type(self).model_fields}
        for setting, choice in choices.items():
            family = self.choices[setting]
            read = set() if choice is None else set(type(choice).model_fields)
            for name, readers in _readers(family).items():
                if name not in read:
                    reason = f"{setting} is not set" if choice is None else f"only {setting}={readers} reads it"
                    self.refuse_without_effect([name], reason, info)
            extra |= {name: getattr(choice, name) for name in read - set(type(self).model_fields)}
        for name, kind in self.tables.registry.items() if self.tables else ():
            if isinstance(extra.get(name), Mapping):
                extra[name] = build(kind, extra[name], where=f"{name}.")
        self.__pydantic_extra__ = extra
        return self


def _readers(family: type[Choice]) -> dict[str, str]:
    """Which members of a family read each of its settings."""
    readers: dict[str, list[str]] = {}
    for kind in family.registry.values():
        for name in kind.model_fields:
            readers.setdefault(name, []).append(repr(kind.name))
    return {name: " or ".join(names) for name, names in readers.items()}
