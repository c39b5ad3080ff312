"""How dictionaries are compared with their unoptimised twins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.loss_result import LossResult

from .molt_twin import MoltTwin
from .twin import Twin, assert_same, assert_same_gradients, distances, gradients, least_distance

# float64 shows what is wrong; float32 is what people use (the rounding of sums over some hundred terms).
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}
SPARSITY = (("power", 1), ("power", 2), ("power", 0.5), ("tanh", 1), ("tanh-quad", 1))


def losses(dictionary: AbstractSparseAutoEncoder, batch: Mapping[str, Any], **settings: Any) -> LossResult:
    result = dictionary.compute_loss(batch, **settings)
    assert isinstance(result, LossResult)
    return result


def every_term(act_fn: str) -> dict[str, Any]:
    """Settings of `compute_loss` in which each term that there is has the coefficient 1."""
    lp_coefficient = 1.0 if act_fn == "jumprelu" else 0.0
    return {"sparsity_loss_type": "power", "lp_coefficient": lp_coefficient, "auxk_coefficient": 1.0, "k_aux": 3}


def dead_mask(dictionary: AbstractSparseAutoEncoder, dead: list[int]) -> Tensor:
    """Which latents are dead, as `compute_loss` takes it."""
    return torch.zeros(dictionary.cfg.d_sae, dtype=torch.bool).index_fill_(0, torch.tensor(dead), True)


def same_losses(result: LossResult, want: Mapping[str, Tensor], tolerance: float) -> Tensor:
    """Assert that every term is the twin's, and the loss their sum, which is returned."""
    for name, term in want.items():
        assert_same(result[name], term, tolerance, name)
    total = torch.stack(list(want.values())).sum()
    assert_same(result["loss"], total, tolerance, "loss")
    return total


def same_term(
    dictionary: AbstractSparseAutoEncoder, twin: Twin | MoltTwin, got: Tensor, want: Tensor, tolerance: float
) -> dict[str, Tensor]:
    """Assert that a term is the twin's, and so are its gradients, which are returned."""
    assert_same(got, want, tolerance)
    found = gradients(dictionary, got)
    assert_same_gradients(found, twin.gradients(want), 1e-9)
    return found


def garbled(batch: Mapping[str, Any], hooks: Iterable[str]) -> dict[str, Any]:
    """The batch with other activations where it is masked."""
    keep = batch["mask"][..., None]
    return {**batch, **{hook: torch.where(keep, batch[hook], 50 * batch[hook] + 7) for hook in hooks}}


def check_geometric_median(point_D: Tensor, rows_ND: Tensor) -> None:
    rows_ND = rows_ND.double()
    least = float(distances(least_distance(rows_ND), rows_ND))
    assert float(distances(point_D.double(), rows_ND)) <= least * (1 + 1e-6)
    assert float((point_D - rows_ND.mean(0)).norm()) > 0.05  # which the mean is not
