"""Steps whose numbers are not finite, and tokens that are still to be counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.data.batch import Batch
from lm_saes.errors import TrainingError

Check = tuple[str, Tensor]
"""What is looked at, and whether it is finite (0-d bool)."""
_REMEDY = "lower lr, set clip_grad_norm, or set on_non_finite='skip'"


@dataclass(frozen=True)
class _Entry:
    step: int
    names: tuple[str, ...]
    finite: Tensor
    """`[names]`."""


class Ledger:
    """What steps leave to be read: whether they were taken, and how many valid tokens they had.

    Args:
        stops: whether a step that is not finite ends the run.
        defers: whether nothing is read before `settle`: then the device itself has to leave such a step out.
    """

    def __init__(self, *, stops: bool, defers: bool) -> None:
        self.stops, self.defers = stops, defers
        self._entries: list[_Entry] = []
        self._tokens: int | Tensor = 0
        self._skipped = 0

    def judge(self, step: int, checks: Iterable[Check], hook_point: str, batches: list[Batch]) -> bool | Tensor:
        """Whether step number `step` is to be taken: known now, or on the device (0-d bool).

        Raises:
            TrainingError: it is not finite, which is known now, and such a step ends the run.
        """
        names, flags = zip(*checks, strict=True)
        finite = torch.stack(flags)
        if self.defers:
            self._entries.append(_Entry(step, names, finite))
            return finite.all()
        bad = _named(names, finite.tolist())
        if bad and self.stops:
            raise explain(step, bad, hook_point, batches)
        self._skipped += bool(bad)
        return not bad

    def count(self, tokens: int | Tensor) -> None:
        """Count the valid tokens of a step, whether or not it was taken."""
        self._tokens = self._tokens + tokens

    def settle(self) -> tuple[int, int]:
        """Valid tokens, and steps that were left out, since the last time; may wait for the device.

        Raises:
            TrainingError: there are such steps, and they end the run.
        """
        tokens, skipped, entries = int(self._tokens), self._skipped, self._entries
        self._tokens, self._skipped, self._entries = 0, 0, []
        flags = iter(torch.cat([entry.finite for entry in entries]).tolist() if entries else ())
        read = {entry.step: _named(entry.names, [next(flags) for _ in entry.names]) for entry in entries}
        bad = {step: names for step, names in read.items() if names}
        if bad and self.stops:
            steps = ", ".join(map(str, bad))
            names = ", ".join(dict.fromkeys(name for found in bad.values() for name in found))
            raise TrainingError(
                f"step{'s' if len(bad) > 1 else ''} {steps}: {names} not finite; left out, and read after step "
                f"{entries[-1].step}; {_REMEDY}"
            )
        return tokens, skipped + len(bad)


def _named(names: Iterable[str], finite: Iterable[bool]) -> list[str]:
    return list(dict.fromkeys(name for name, fine in zip(names, finite, strict=True) if not fine))


def explain(step: int, bad: list[str], hook_point: str, batches: list[Batch]) -> TrainingError:
    """What went wrong, what the batches of that step looked like, and what may help."""
    x = torch.cat([batch[hook_point].float().flatten() for batch in batches])
    return TrainingError(
        f"step {step}: {', '.join(bad)} not finite; {hook_point} has mean {x.mean():.4g}, std {x.std():.4g}, "
        f"largest {x.abs().max():.4g}; {_REMEDY}"
    )
