"""What `compute_loss` returns: the loss, its terms, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.losses.settings import LossSettings

if TYPE_CHECKING:
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder

_TERMS = ("loss", "l_rec", "l_s", "l_p", "l_aux")
_COEFFICIENTS = ("l1_coefficient", "lp_coefficient", "auxk_coefficient")


class LossResult(Mapping[str, Any]):
    """`loss`, `l_rec`, `l_s`, `l_p`, `l_aux` (None if switched off), `label`, `mask`, `n_tokens`, `feature_acts`,
    `reconstructed`, `hidden_pre` and the coefficients. The dense tensors are made when they are asked for."""

    def __init__(
        self, dictionary: AbstractSparseAutoEncoder, batch: Mapping[str, Any], record: Record, settings: LossSettings
    ) -> None:
        self.record, self.terms = record, dict[str, Tensor]()
        self._dictionary, self._batch, self._settings = dictionary, batch, settings

    @cached_property
    def _feature_acts(self) -> Tensor:
        dense, shape = self.record.code.dense(), self["label"].shape
        if self._dictionary.latent_dimensions == ("sae",):
            return dense.view(*shape[:-1], -1)
        return dense.view(*shape[1:-1], shape[0], -1)

    def __getitem__(self, name: str) -> Any:
        if name in _TERMS:
            return self.terms.get(name)
        if name in _COEFFICIENTS:
            return asdict(self._settings)[name]
        match name:
            case "label":
                return self._dictionary.prepare_label(self._batch)
            case "reconstructed":
                return self.record.reconstruction.view(self["label"].shape)
            case "mask":
                return self._batch.get("mask")
            case "n_tokens":
                return self.record.n_tokens
            case "feature_acts":
                return self._feature_acts
            case "hidden_pre":
                return self._dictionary.hidden_pre(self._dictionary.prepare_input(self._batch))
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from (*_TERMS, *_COEFFICIENTS, "label", "mask", "n_tokens", "feature_acts", "reconstructed", "hidden_pre")

    def __len__(self) -> int:
        return len(list(iter(self)))
