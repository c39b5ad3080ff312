"""How many latents are active, how often, how strongly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_saes.dictionaries.record import Record
from lm_saes.metrics.base import Metric, StepFacts

_ABOVE = (1e-1, 1e-2)
_BELOW = (1e-5, 1e-6, 1e-7)


class ActiveLatents(Metric):
    """`l0`: active latents per valid token; `mean_feature_act`: mean value of an active latent."""

    @torch.no_grad()
    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:
        values = record.code.values.detach()
        if record.row_mask is not None:
            values = values * record.code.of_row(record.row_mask.to(values.dtype))
        self.add("tokens", record.n_tokens)
        self.add("active", record.counts.sum(dtype=torch.float64))
        self.add("value", values.sum(dtype=torch.float64))

    def report(self) -> dict[str, float]:
        t = self.totals
        return {
            "metrics/l0": float(t["active"] / t["tokens"]),
            "metrics/mean_feature_act": float(t["value"] / t["active"].clamp(min=1)),
        }


class FiringFrequency(Metric):
    """How many latents are active on more, or less, than a share of the valid tokens.

    Counted over `feature_sampling_window` steps. A full window is reported once, at the first report after it ends.
    """

    def step(self, facts: StepFacts) -> None:
        self.add("steps", torch.ones(()))
        self.add("tokens", facts.n_tokens)
        self.add("counts", facts.fired_counts)
        if int(self.totals["steps"]) >= self.window:  # a CPU counter: no wait for the device
            latest = {name: self.totals[name] for name in ("tokens", "counts")}
            self.totals = {f"full_{name}": total for name, total in latest.items()}

    def report(self) -> dict[str, float]:
        if "full_counts" not in self.totals:
            return {}
        frequency_F = self.totals["full_counts"] / self.totals["full_tokens"]
        above = {f"sparsity/above_{_power(limit)}": float((frequency_F > limit).sum()) for limit in _ABOVE}
        return above | {f"sparsity/below_{_power(limit)}": float((frequency_F < limit).sum()) for limit in _BELOW}

    def end_window(self) -> None:
        self.totals = {name: total for name, total in self.totals.items() if not name.startswith("full_")}


def _power(limit: float) -> str:
    return f"{limit:.0e}".replace("e-0", "e-")


class Dead(Metric):
    """`sparsity/dead`: latents that count as dead now; `sparsity/k`: the k in use."""

    def step(self, facts: StepFacts) -> None:
        self.totals = {"dead": facts.n_dead.detach()}

    def report(self) -> dict[str, float]:
        k = self.dictionary.current_k
        return {"sparsity/dead": float(self.totals["dead"])} | ({} if k is None else {"sparsity/k": float(k)})
