"""What `compute_loss` returns: the loss, its terms, and what they were made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.losses.settings import LossSettings

_TERMS = ("loss", "l_rec", "l_s", "l_p", "l_aux")
_COEFFICIENTS = ("l1_coefficient", "lp_coefficient", "auxk_coefficient")


class LossResult(Mapping[str, Any]):
    """`loss`, `l_rec`, `l_s`, `l_p`, `l_aux` (None if switched off), `label`, `mask`, `n_tokens`, `feature_acts`,
    `reconstructed`, `hidden_pre` and the coefficients.

    Args:
        make: what makes the dense tensors, by name, each when it is first asked for.
    """

    def __init__(
        self, record: Record, settings: LossSettings, mask: Tensor | None, make: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.record, self.terms = record, dict[str, Tensor]()
        self._settings, self._mask, self._make, self._made = settings, mask, make, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Any:
        if name in _TERMS:
            return self.terms.get(name)
        if name in _COEFFICIENTS:
            return getattr(self._settings, name)
        if name in self._make:
            if name not in self._made:
                self._made[name] = self._make[name]()
            return self._made[name]
        return {"mask": self._mask, "n_tokens": self.record.n_tokens}[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*_TERMS, *_COEFFICIENTS, "mask", "n_tokens", *self._make)

    def __len__(self) -> int:
        return len(list(iter(self)))
