"""Shares of batches and of streams."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from lm_saes.axes.axis import Axis
from lm_saes.data.batch import Batch
from lm_saes.data.share import SharedStream, share
from lm_saes.data.stream import ActivationStream


def batch(n: int, mask: bool = False) -> Batch:
    made: Batch = {
        "a": torch.arange(2.0 * n).view(n, 2),
        "tokens": torch.arange(n),
        "meta": [{"i": i} for i in range(n)],
    }
    return made | ({"mask": torch.arange(n) % 2 == 0} if mask else {})


@pytest.mark.parametrize(("size", "n"), [(8, 2), (7, 3), (3, 3)])
def test_no_row_is_lost_and_none_comes_twice(size: int, n: int) -> None:
    shares = [share(batch(size, mask=True), place, n) for place in range(n)]
    for name in ("a", "tokens", "mask"):
        assert torch.equal(torch.cat([part[name] for part in shares]), batch(size, mask=True)[name])
    assert [meta for part in shares for meta in part["meta"]] == batch(size)["meta"]
    assert max(len(part["tokens"]) for part in shares) - min(len(part["tokens"]) for part in shares) <= 1


@pytest.mark.parametrize("mask", [False, True])
def test_where_rows_are_too_few_a_process_gets_one_that_does_not_count(mask: bool) -> None:
    shares = [share(batch(2, mask), place, 4) for place in range(4)]
    assert all(len(part["tokens"]) == len(part["mask"]) == 1 for part in shares)
    counted = [token for part in shares for token in part["tokens"][part["mask"]].tolist()]
    assert counted == ([0] if mask else [0, 1])


class Whole:
    """A stream of three batches, with a position."""

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> Batch:
        if self.at == 3:
            raise StopIteration
        self.at += 1
        return batch(3 + self.at)

    def peek(self, n: int) -> list[Batch]:
        return [batch(4 + self.at + i) for i in range(min(n, 3 - self.at))]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def shared(place: int, size: int) -> SharedStream:
    tokens = Axis()
    tokens.place, tokens.size = place, size
    return SharedStream(cast(ActivationStream, Whole()), tokens)


def test_one_position_serves_any_number_of_processes() -> None:
    two = [shared(place, 2) for place in range(2)]
    peeked = [stream.peek(5) for stream in two]
    assert [len(batches) for batches in peeked] == [3, 3]
    for i in range(2):
        parts = [next(stream) for stream in two]
        assert torch.equal(torch.cat([part["a"] for part in parts]), batch(4 + i)["a"])
        assert all(torch.equal(part["a"], seen[i]["a"]) for part, seen in zip(parts, peeked, strict=True))
    assert two[0].state_dict() == two[1].state_dict()
    three = [shared(place, 3) for place in range(3)]
    for stream in three:
        stream.load_state_dict(two[1].state_dict())
    assert torch.equal(torch.cat([batch["a"] for stream in three for batch in stream]), batch(6)["a"])
