"""A batch that is not what it should be is refused with one line; streams can be peeked at."""

from typing import Any

import pytest
import torch

from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.peek import PeekableStream, peekable
from lm_saes.errors import DataError

WIDTHS = {"a": 4, "b": 2}


def good(*shape: int) -> Batch:
    return {
        "a": torch.ones(*shape, 4),
        "b": torch.ones(*shape, 2, dtype=torch.bfloat16),
        "tokens": torch.zeros(shape, dtype=torch.int64),
        "mask": torch.ones(shape, dtype=torch.bool),
    }


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_good_batches_pass(shape: tuple[int, ...]) -> None:
    batch = good(*shape)
    check_batch(batch, WIDTHS)
    check_batch({key: batch[key] for key in ("a", "tokens")}, {"a": 4})
    check_batch(batch | {"mask": torch.ones(shape, dtype=torch.int64)}, WIDTHS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": None}, "hook point 'a' is missing; wanted [2, 3, 4]"),
        ({"a": torch.ones(2, 3, 5)}, "hook point 'a' has shape [2, 3, 5]; wanted [2, 3, 4]"),
        ({"b": torch.ones(6, 2)}, "hook point 'b' has shape [6, 2]; wanted [2, 3, 2]"),
        ({"b": torch.ones(2, 3, 2, dtype=torch.int64)}, "hook point 'b' holds torch.int64"),
        ({"tokens": None}, "'tokens' is missing"),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64), "mask": None}, "'a' has shape [2, 3, 4]; wanted [2, 4, 4]"),
        ({"tokens": torch.zeros(2, 3)}, "'tokens' is torch.float32 [2, 3]; give int64"),
        ({"tokens": torch.zeros(2, 3, 1, dtype=torch.int64)}, "'tokens' is torch.int64 [2, 3, 1]"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.int64)}, "'tokens' of shape [0, 3] is empty"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "'mask' is shape [2]; give it the shape of 'tokens', [2, 3]"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "'mask' of shape [2, 3] masks every token"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_batch({**good(2, 3), **changes}, WIDTHS)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_counted(value: float) -> None:
    batch = good(2, 3)
    batch["b"][1, 2, 0] = value
    batch["b"][0, 0, 0] = -value
    with pytest.raises(DataError, match=r"hook point 'b' of shape \[2, 3, 2\] holds 2 non-finite"):
        check_batch(batch, WIDTHS)


def test_a_sum_that_overflows_is_not_a_non_finite_activation() -> None:
    batch = good(2, 3)
    batch["a"].fill_(3e38)
    check_batch(batch, WIDTHS)


def test_peeking_does_not_consume() -> None:
    batches = [{"tokens": torch.tensor([i])} for i in range(4)]
    stream = peekable(batch for batch in batches)
    assert isinstance(stream, PeekableStream)
    assert [int(batch["tokens"]) for batch in stream.peek(2)] == [0, 1]
    assert int(next(stream)["tokens"]) == 0
    assert [int(batch["tokens"]) for batch in stream.peek(9)] == [1, 2, 3]
    assert [int(batch["tokens"]) for batch in stream] == [1, 2, 3]
    assert stream.peek(1) == []
    assert peekable(stream) is stream
