"""Packing and padding, worked by hand. In the model of these tests BOS is 1, EOS 2, padding 0."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lm_saes.data.activity import Activity
from lm_saes.data.contexts import ContextSource, check_context_size
from lm_saes.data.text import TextDataset
from lm_saes.errors import ConfigError, DataError
from lm_saes.models.base import LanguageModel

MakeDataset = Callable[[Sequence[Any]], TextDataset]
DOCUMENTS = ["10 11 12", "", "20 21 22 23 24", "30", "40 41"]


def source(model: LanguageModel, dataset: TextDataset, **settings: Any) -> ContextSource:
    defaults: dict[str, Any] = {
        "name": "s",
        "size": 5,
        "pack": True,
        "prepend_bos": True,
        "is_tokenized": False,
        "epochs": 1,
        "ignore_token_ids": frozenset({0, 1, 2}),
        "activity": Activity(),
    }
    return ContextSource(dataset, model, **{**defaults, **settings})


def draw_all(source: ContextSource) -> list[tuple[list[int], list[int]]]:
    drawn = []
    while (context := source.draw(1)) is not None:
        drawn.append((context.tokens.tolist(), context.mask.int().tolist()))
    return drawn


def test_packed_contexts_start_with_bos(number_model: LanguageModel, make_dataset: MakeDataset) -> None:
    # The text is 10 11 12 | 20 .. 24 | 30 | 40 41, with a BOS before each document and at the start of each context.
    assert draw_all(source(number_model, make_dataset(DOCUMENTS))) == [
        ([1, 10, 11, 12, 1], [0, 1, 1, 1, 0]),
        ([1, 20, 21, 22, 23], [0, 1, 1, 1, 1]),
        ([1, 24, 1, 30, 1], [0, 1, 0, 1, 0]),
        ([1, 40, 41, 0, 0], [0, 1, 1, 0, 0]),
    ]


def test_packed_without_bos(number_model: LanguageModel, make_dataset: MakeDataset) -> None:
    assert draw_all(source(number_model, make_dataset(DOCUMENTS), prepend_bos=False)) == [
        ([10, 11, 12, 20, 21], [1] * 5),
        ([22, 23, 24, 30, 40], [1] * 5),
        ([41, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
    ]


def test_padded_contexts_hold_one_document_each(number_model: LanguageModel, make_dataset: MakeDataset) -> None:
    assert draw_all(source(number_model, make_dataset(DOCUMENTS), pack=False)) == [
        ([1, 10, 11, 12, 0], [0, 1, 1, 1, 0]),
        ([1, 20, 21, 22, 23], [0, 1, 1, 1, 1]),
        ([1, 30, 0, 0, 0], [0, 1, 0, 0, 0]),
        ([1, 40, 41, 0, 0], [0, 1, 1, 0, 0]),
    ]


def test_an_explicit_list_replaces_the_tokens_that_do_not_count(
    number_model: LanguageModel, make_dataset: MakeDataset
) -> None:
    contexts = draw_all(source(number_model, make_dataset(["10 11", "0 7"]), ignore_token_ids=frozenset({11}), size=7))
    # BOS counts now, and so does a 0 that is text; the 0 that fills up does not.
    assert contexts == [([1, 10, 11, 1, 0, 7, 0], [1, 1, 0, 1, 1, 1, 0])]


def test_token_lists_are_taken_as_they_are(number_model: LanguageModel, make_dataset: MakeDataset) -> None:
    tokenized = make_dataset([[1, 10, 11], [12]])  # the BOS that is there already is not doubled
    assert draw_all(source(number_model, tokenized, is_tokenized=True)) == [([1, 10, 11, 1, 12], [0, 1, 1, 0, 1])]
    with pytest.raises(DataError, match="document 1: token ids from 12 to 10000 are not all below the model's"):
        draw_all(source(number_model, make_dataset([[3], [12, 10_000]]), is_tokenized=True))
    with pytest.raises(DataError, match="'text' holds str, not a list of token ids"):
        draw_all(source(number_model, make_dataset(["3"]), is_tokenized=True))
    with pytest.raises(DataError, match="'text' holds list, not a text"):
        draw_all(source(number_model, make_dataset([[3]])))


def test_every_epoch_is_the_same(number_model: LanguageModel, make_dataset: MakeDataset) -> None:
    once = draw_all(source(number_model, make_dataset(DOCUMENTS)))
    assert draw_all(source(number_model, make_dataset(DOCUMENTS), epochs=3)) == once * 3
    endless = source(number_model, make_dataset(DOCUMENTS), epochs=None)
    contexts = [endless.draw(1) for _ in range(50)]
    assert all(context is not None for context in contexts)


def test_the_meta_data_say_where_a_context_comes_from(number_model: LanguageModel, make_dataset: MakeDataset) -> None:
    contexts = source(number_model, make_dataset(DOCUMENTS), epochs=2)
    drawn = [contexts.draw(1) for _ in range(5)]
    metas = [context.meta for context in drawn if context is not None]
    assert metas[0] == {"source": "s", "document": 0, "offset": 0, "epoch": 0}
    assert metas[2] == {"source": "s", "document": 2, "offset": 4, "epoch": 0}
    assert metas[4] == {"source": "s", "document": 0, "offset": 0, "epoch": 1}


@pytest.mark.parametrize("pack", [True, False])
def test_going_on_from_any_place_gives_the_rest(
    number_model: LanguageModel, make_dataset: MakeDataset, pack: bool
) -> None:
    whole = draw_all(source(number_model, make_dataset(DOCUMENTS), epochs=2, pack=pack))
    for n in range(len(whole) + 1):
        first = source(number_model, make_dataset(DOCUMENTS), epochs=2, pack=pack)
        for _ in range(n):
            first.draw(1)
        second = source(number_model, make_dataset(DOCUMENTS), epochs=2, pack=pack)
        second.load_state_dict(first.state_dict())
        assert draw_all(second) == whole[n:]


def test_text_without_tokens_is_an_error_even_without_end(
    number_model: LanguageModel, make_dataset: MakeDataset
) -> None:
    with pytest.raises(DataError, match="none of its 2 documents has a token"):
        source(number_model, make_dataset(["", " "]), epochs=None).draw(1)


def test_context_size_has_to_fit(number_model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="context_size=65 exceeds the model's max_length=64"):
        check_context_size(65, True, number_model)
    with pytest.raises(ConfigError, match="context_size=1 leaves no room beside BOS"):
        check_context_size(1, True, number_model)
    check_context_size(64, True, number_model)
    check_context_size(1, False, number_model)
