"""From documents to contexts: tokenise, pack or pad, and mark which tokens count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.data.activity import Activity
from lm_saes.data.text import TextDataset
from lm_saes.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lm_saes.models.base import LanguageModel


@dataclass(frozen=True)
class Context:
    """One context of `size` tokens, padded on the right."""

    tokens: Tensor
    """int64 `[size]`"""
    mask: Tensor
    """bool `[size]`: the tokens that count"""
    length: int
    """How many tokens there are before the padding."""
    meta: dict[str, Any]
    """Where its first token came from: `source`, `document`, `offset` (in tokens), `epoch`."""


class ContextSource:
    """The contexts of one dataset, in the order of its text; every epoch is the same.

    Packed: the documents' tokens, a BOS before each document, are cut into contexts of `size`, each of which starts
    with BOS (never two in a row). The last context of an epoch is padded. Not packed: one document a context,
    truncated. Documents without tokens are passed over.
    """

    def __init__(
        self,
        dataset: TextDataset,
        model: LanguageModel,
        *,
        name: str,
        size: int,
        pack: bool,
        prepend_bos: bool,
        is_tokenized: bool,
        epochs: int | None,
        ignore_token_ids: frozenset[int],
        activity: Activity,
    ):
        self._dataset = dataset
        self._model = model
        self._name = name
        self._size = size
        self._pack = pack
        self._bos = [model.bos_token_id] if prepend_bos else []
        self._is_tokenized = is_tokenized
        self._epochs = epochs
        self._ignore = ignore_token_ids
        self._activity = activity
        self._epoch = 0
        self._document = 0
        self._offset = 0
        self._reader: Iterator[list[int]] | None = None
        self._current: list[int] | None = None

    def draw(self, limit: int) -> Context | None:
        """The next context (one, whatever `limit`), or None after the last epoch."""
        while self._epochs is None or self._epoch < self._epochs:
            at_start = self._document == self._offset == 0
            with self._activity.doing("making contexts"):
                context = self._next_in_epoch()
            if context is not None:
                return context
            if at_start:
                raise DataError(f"dataset {self._name}: none of its {len(self._dataset)} documents has a token")
            self._epoch, self._document, self._offset = self._epoch + 1, 0, 0
            self._reader = self._current = None
        return None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "document": self._document, "offset": self._offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._document, self._offset = state["epoch"], state["document"], state["offset"]
        self._reader = self._current = None

    def _next_in_epoch(self) -> Context | None:
        tokens = list(self._bos)
        meta: dict[str, Any] | None = None
        while len(tokens) < self._size and (document := self._open_document()):
            if meta is None:
                place = {"document": self._document, "offset": self._offset, "epoch": self._epoch}
                meta = {"source": self._name, **place}
            elif self._offset == 0:
                tokens += self._bos
            taken = document[self._offset : self._offset + self._size - len(tokens)]
            tokens += taken
            self._offset += len(taken)
            if not self._pack or self._offset == len(document):
                self._document, self._offset, self._current = self._document + 1, 0, None
            if not self._pack:
                break
        return None if meta is None else self._context(tokens, meta)

    def _open_document(self) -> list[int] | None:
        """The tokens of the document to read on; None at the end of the epoch."""
        if self._reader is None:
            self._reader = self._token_lists(self._document)
        while self._current is None and (tokens := next(self._reader, None)) is not None:
            if tokens:
                self._current = tokens
            else:
                self._document += 1
        return self._current

    def _token_lists(self, start: int) -> Iterator[list[int]]:
        """The tokens of each document from `start` on, without a BOS in front."""
        position = start
        for tokens in self._read_tokens(start) if self._is_tokenized else self._tokenized(start):
            if self._is_tokenized and tokens and not 0 <= min(tokens) <= max(tokens) < self._model.vocab_size:
                raise DataError(
                    f"dataset {self._name}: document {position}: token ids from {min(tokens)} to {max(tokens)} are not "
                    f"all below the model's vocabulary of {self._model.vocab_size}; tokenise it for this model"
                )
            yield tokens[1:] if self._bos and tokens[:1] == self._bos else tokens
            position += 1

    def _read_tokens(self, start: int) -> Iterator[list[int]]:
        return self._activity.drawing("reading text", self._dataset.token_lists(start))

    def _tokenized(self, start: int) -> Iterator[list[int]]:
        texts = self._activity.drawing("reading text", self._dataset.documents(start))
        while some := list(islice(texts, machine.DOCUMENTS_TOKENIZED)):
            with self._activity.doing("tokenizing text"):
                tokenized = self._model.tokenize(some)
            yield from tokenized

    def _context(self, tokens: list[int], meta: dict[str, Any]) -> Context:
        length = len(tokens)
        padding = self._size - length
        mask = [token not in self._ignore for token in tokens] + [False] * padding
        padded = tokens + [self._model.pad_token_id] * padding
        return Context(torch.tensor(padded), torch.tensor(mask), length, meta)


def check_context_size(size: int, prepend_bos: bool, model: LanguageModel) -> None:
    """Raise if contexts of `size` tokens hold no text, or are longer than the model takes."""
    if size > model.max_length:
        raise ConfigError(f"context_size={size} exceeds the model's max_length={model.max_length}; use a smaller one")
    if prepend_bos and size < 2:
        raise ConfigError(f"context_size={size} leaves no room beside BOS; use at least 2, or prepend_bos=false")
