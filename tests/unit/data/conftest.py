"""A language model small enough to work by hand: words are numbers, and the number is the token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.data.text import DatasetConfig, TextDataset
from lm_saes.errors import ConfigError
from lm_saes.models.base import LanguageModel, LanguageModelConfig

WIDTHS = {"a": 4, "b": 2}


class NumberModel(LanguageModel):
    """Token t at position p gives t + p/100 in every dimension, plus `company` times the contexts in its batch."""

    def __init__(self, prepend_bos: bool = True, company: float = 0.0, dtype: torch.dtype = torch.float32):
        self.cfg = LanguageModelConfig(model_name="numbers", prepend_bos=prepend_bos)
        self.device, self.dtype = torch.device("cpu"), dtype
        self.d_model, self.n_layers, self.vocab_size, self.max_length = 4, 1, 10_000, 64
        self.bos_token_id, self.eos_token_id, self.pad_token_id = 1, 2, 0
        self.company = company
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode_tokens(self, tokens: list[int]) -> list[str]:
        return [f"{token} " for token in tokens]

    def check_hook_points(self, hook_points: Iterable[str]) -> None:
        for name in hook_points:
            if name not in WIDTHS:
                raise ConfigError(f"hook point {name!r} does not exist")

    def width(self, hook_point: str) -> int:
        return WIDTHS[hook_point]

    def activations(
        self, tokens: Tensor, hook_points: Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        self.calls.append((tokens, attention_mask))
        x = tokens + torch.arange(tokens.shape[1]) / 100 + self.company * tokens.shape[0]
        return {name: x[:, :, None].repeat(1, 1, WIDTHS[name]).to(self.dtype) for name in hook_points}

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def provenance(self) -> dict[str, str]:
        return {"model": "numbers"}


@pytest.fixture
def number_model() -> NumberModel:
    return NumberModel()


@pytest.fixture
def make_model() -> Callable[..., NumberModel]:
    return NumberModel


@pytest.fixture
def make_dataset() -> Callable[[Sequence[Any]], TextDataset]:
    """A dataset of the given documents, without a file."""

    def make(documents: Sequence[Any]) -> TextDataset:
        cfg = DatasetConfig(dataset_name_or_path="made.txt")
        fetch = lambda rows: [documents[i] for i in rows]  # noqa: E731
        return TextDataset("made", len(documents), fetch, cfg, fingerprint=str(hash(tuple(map(str, documents)))))

    return make


@pytest.fixture
def counting(make_dataset: Callable[[Sequence[Any]], TextDataset]) -> Callable[..., TextDataset]:
    """Documents of `length` tokens each, all different: 10, 11, 12 ..."""

    def make(n_documents: int, length: int, first: int = 10) -> TextDataset:
        starts = range(first, first + n_documents * length, length)
        return make_dataset([" ".join(str(token) for token in range(start, start + length)) for start in starts])

    return make
