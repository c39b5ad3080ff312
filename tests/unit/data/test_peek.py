"""Peeking at streams: what was looked at is still there for whoever takes batches afterwards."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lm_saes.data.peek import peekable

BATCHES: list[dict[str, Any]] = [{"number": i} for i in range(5)]
SOURCES: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "list": lambda: BATCHES,
    "generator": lambda: (batch for batch in BATCHES),
    "iterator of a list": lambda: iter(BATCHES),
    "map": lambda: map(dict, BATCHES),
}


@pytest.mark.parametrize("name", SOURCES)
def test_two_wrappers_of_one_stream_lose_nothing(name: str) -> None:
    stream = SOURCES[name]()
    assert peekable(stream).peek(2) == BATCHES[:2]
    again = peekable(stream)
    assert again.peek(3) == BATCHES[:3]
    assert list(again) == BATCHES


def test_peeking_past_the_end_gives_what_there_is() -> None:
    stream = peekable(iter(BATCHES))
    assert stream.peek(9) == BATCHES and list(stream) == BATCHES and stream.peek(1) == []
