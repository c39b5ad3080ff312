"""What the processes of a run do as one: each its part or none, one for all, all the same."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from lm_saes.axes.axis import Axis
from lm_saes.axes.differences import differences
from lm_saes.errors import ConfigError, OtherProcessError

T = TypeVar("T")


def exchange(axis: Axis, value: Any) -> list[Any]:
    """The JSON values that the processes give, in order of their places."""
    if axis.size == 1:
        return [value]
    line = torch.frombuffer(bytearray(json.dumps(value).encode() + b"\n"), dtype=torch.uint8)
    return [json.loads(text) for text in axis.join(line).numpy().tobytes().split(b"\n")[:-1]]


def each(axis: Axis, act: Callable[[], T]) -> T:
    """What `act` gives here, once it has gone well on every process.

    Raises:
        OtherProcessError: it has failed on another (`OSError`, if it was one there: a full disk is everybody's).
    """
    failure, result = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    told = exchange(axis, None if failure is None else _told(failure))
    if failure is not None:
        raise failure
    for place, reason in enumerate(told):
        if isinstance(reason, list):
            raise OSError(*reason)
        if reason is not None:
            raise OtherProcessError(f"process {place}: {reason}")
    return result  # type: ignore[return-value]


def _told(failure: Exception) -> str | list[Any]:
    if not isinstance(failure, OSError):
        return str(failure) or type(failure).__name__
    where = None if failure.filename is None else str(failure.filename)
    return [failure.errno or errno.EIO, failure.strerror or str(failure), where]


def by_first(axis: Axis, act: Callable[[], T]) -> T:
    """What `act`, done by the first process alone, gives: a JSON value. If it fails there, it fails everywhere."""
    result = each(axis, lambda: act() if axis.place == 0 else None)
    return exchange(axis, result)[0]


def require_same(axis: Axis, what: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, on all processes, unless all bring the same JSON values."""
    first, *others = exchange(axis, what)
    unlike: dict[str, list[str]] = {}
    for place, other in enumerate(others, start=1):
        if found := list(differences(first, other)):
            unlike.setdefault("; ".join(found), []).append(str(place))
    if unlike:
        told = "; ".join(f"process {', '.join(places)} against process 0: {found}" for found, places in unlike.items())
        raise ConfigError(f"the processes do not run the same ({told}); start all with one config and one version")
