"""What processes do as one."""

from __future__ import annotations

from typing import Any

import pytest

from lm_saes.axes.axis import Axis
from lm_saes.axes.together import by_first, each, exchange, require_same
from lm_saes.errors import ConfigError, DataError, OtherProcessError

from .threads import together


def test_values_come_in_order_of_places() -> None:
    values: list[Any] = [{"a": [1, None, "é\n"]}, "", 2.5]
    assert together(3, lambda axis: exchange(axis, values[axis.place])) == [values] * 3
    assert exchange(Axis(), "alone") == ["alone"]


def test_a_failure_of_one_ends_all_with_its_reason() -> None:
    def act(axis: Axis) -> int:
        def read() -> int:
            if axis.place == 1:
                raise DataError("the third row is torn")
            return axis.place

        return each(axis, read)

    first, second, third = together(3, act)
    assert isinstance(second, DataError)
    assert all(isinstance(error, OtherProcessError) for error in (first, third))
    assert str(first) == str(third) == "process 1: the third row is torn"


def test_the_first_acts_for_all() -> None:
    acted: list[int] = []

    def act(axis: Axis) -> dict[str, int]:
        def find() -> dict[str, int]:
            acted.append(axis.place)
            return {"step": 7}

        return by_first(axis, find)

    assert together(3, act) == [{"step": 7}] * 3 and acted == [0]


def test_a_failure_of_the_first_ends_all() -> None:
    def refuse() -> None:
        raise ConfigError("holds a run already")

    first, second = together(2, lambda axis: by_first(axis, refuse))
    assert isinstance(first, ConfigError) and str(second) == "process 0: holds a run already"


def test_differences_are_told_with_the_processes_that_differ() -> None:
    def act(axis: Axis) -> None:
        require_same(axis, {"settings": {"lr": 0.5 if axis.place in (1, 3) else 0.1, "seed": axis.place == 2}})

    told = together(4, act)
    assert all(isinstance(error, ConfigError) for error in told) and len({str(error) for error in told}) == 1
    assert str(told[0]) == (
        "the processes do not run the same (process 1, 3 against process 0: settings.lr: 0.1 there, 0.5 here; "
        "process 2 against process 0: settings.seed: False there, True here); start all with one config and one version"
    )


@pytest.mark.parametrize("n", [1, 2])
def test_nothing_is_said_where_all_are_the_same(n: int) -> None:
    assert together(n, lambda axis: require_same(axis, {"lr": 0.1})) == [None] * n
