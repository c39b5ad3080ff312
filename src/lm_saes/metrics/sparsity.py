"""How many latents are active, how often, how strongly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_saes.latents.record import Record
from lm_saes.metrics.base import Metric, StepFacts

_ABOVE = (1e-1, 1e-2)
_BELOW = (1e-5, 1e-6, 1e-7)


class ActiveLatents(Metric):
    """`l0`: active latents per valid token (summed over layers, averaged over heads), and their mean value."""

    of_latents = frozenset({"active", "per_token", "value"})

    @torch.no_grad()
    def observe(self, record: Record, terms: Mapping[str, Tensor]) -> None:
        self.add("tokens", record.n_tokens_here)
        active = record.counts.sum(dtype=torch.float64)
        self.add("active", active)
        self.add("per_token", active / record.code_sites if self.dictionary.averages_sites else active)
        self.add("value", record.totals.sum(dtype=torch.float64))

    def report(self) -> dict[str, float]:
        t = self.collected()
        return {
            "metrics/l0": float(t["per_token"] / t["tokens"]),
            "metrics/mean_feature_act": float(t["value"] / t["active"].clamp(min=1)),
        }


class FiringFrequency(Metric):
    """How many latents (of a cross-layer transcoder also by layer) are active on more, or less, than a share of tokens.

    Counted over `feature_sampling_window` steps. A full window is reported once, at the first report after it ends.
    """

    of_tokens = False
    by_latent = frozenset({"counts", "full_counts"})

    def step(self, facts: StepFacts) -> None:
        for name, value in (("steps", facts.one), ("tokens", facts.n_tokens), ("counts", facts.fired_counts)):
            self.add(name, value)
        full = self.totals["steps"] >= self.window
        for name in ("tokens", "counts"):
            total, before = self.totals[name], self.totals.get(f"full_{name}")
            self.totals[f"full_{name}"] = torch.where(full, total, 0.0 if before is None else before.to(total.device))
        for name in ("steps", "tokens", "counts"):
            self.totals[name] = torch.where(full, 0.0, self.totals[name])

    def report(self) -> dict[str, float]:
        if not float(self.totals.get("full_tokens", 0.0)):
            return {}
        frequency = self.totals["full_counts"] / self.totals["full_tokens"]
        values = self._shares(frequency, "")
        for layer, frequency_F in enumerate(frequency if frequency.ndim > 1 else ()):
            values |= self._shares(frequency_F, f"_layer{layer}")
        return values

    def end_window(self) -> None:
        self.totals = {name: total for name, total in self.totals.items() if not name.startswith("full_")}

    def _shares(self, frequency: Tensor, suffix: str) -> dict[str, float]:
        names = [f"above_{_power(limit)}" for limit in _ABOVE] + [f"below_{_power(limit)}" for limit in _BELOW]
        beyond = [frequency > limit for limit in _ABOVE] + [frequency < limit for limit in _BELOW]
        counts = self.dictionary.axes.latents.total(torch.stack([latents.sum() for latents in beyond]))
        return {f"sparsity/{name}{suffix}": float(n) for name, n in zip(names, counts.tolist(), strict=True)}


def _power(limit: float) -> str:
    return f"{limit:.0e}".replace("e-0", "e-")


class Dead(Metric):
    """`sparsity/dead`: latents that count as dead now; `sparsity/k`: the k in use."""

    of_tokens = False
    of_latents = frozenset({"dead"})

    def step(self, facts: StepFacts) -> None:
        self.totals = {"dead": facts.n_dead.detach()}

    def report(self) -> dict[str, float]:
        k, dead = self.dictionary.current_k, self.collected()["dead"]
        layers = {f"sparsity/dead_layer{i}": float(n) for i, n in enumerate(dead if dead.ndim else ())}
        return {"sparsity/dead": float(dead.sum()), **layers} | ({} if k is None else {"sparsity/k": float(k)})
