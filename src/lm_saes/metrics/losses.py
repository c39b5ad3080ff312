"""The loss terms, averaged over the valid tokens of the window."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.metrics.base import Metric

_NAMES = {"loss": "overall_loss", "l_rec": "mse_loss", "l_s": "sparsity_loss", "l_p": "lp_loss", "l_aux": "aux_loss"}


class Losses(Metric):
    """`losses/*`: each term already times its coefficient."""

    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:
        self.add("tokens", record.n_tokens_here)
        for name, value in terms.items():
            self.add(name, value.detach() * record.n_tokens_here)

    def report(self) -> dict[str, float]:
        totals = self.collected()
        tokens = float(totals["tokens"])
        return {f"losses/{_NAMES[name]}": float(total) / tokens for name, total in totals.items() if name in _NAMES}
