"""Scales that bring activations to an average norm of sqrt(d_model)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError, DataError

NORM_BATCHES = 8
"""Batches over which the dataset-wise norm is measured."""


class Normalizing(nn.Module, ABC):
    """The part of a dictionary that brings raw activations to an average norm of sqrt(d_model)."""

    cfg: BaseSAEConfig
    dataset_average_activation_norm: dict[str, float] | None = None
    """Mean norm of each hook point's raw activations, for `norm_activation="dataset-wise"`; None: not known."""

    def compute_norm_factor(self, x: Tensor, hook_point: str, mask: Tensor | None = None) -> Tensor:
        """The factor that `norm_activation` scales `x` by (0-d, or `[..., 1]` if token-wise)."""
        match self.cfg.norm_activation:
            case "token-wise":
                return token_wise_factor(x)
            case "batch-wise":
                return batch_wise_factor(x, mask)
            case "inference":
                return x.new_ones(())
        norms = self.dataset_average_activation_norm
        if norms is None or hook_point not in norms:
            raise ConfigError(
                f"norm_activation='dataset-wise': no average norm is known for {hook_point!r}; "
                "call set_dataset_average_activation_norm, or let the Initializer measure it"
            )
        return x.new_full((), self.cfg.d_model**0.5 / norms[hook_point])

    @overload
    def normalize_activations(
        self, batch: Mapping[str, Any], return_scale_factor: Literal[False] = False
    ) -> dict[str, Any]: ...
    @overload
    def normalize_activations(
        self, batch: Mapping[str, Any], return_scale_factor: Literal[True]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]: ...
    def normalize_activations(
        self, batch: Mapping[str, Any], return_scale_factor: bool = False
    ) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Tensor]]:
        """The batch with every hook point of this dictionary that it holds scaled and in the parameters' type."""
        scaled, factors = dict(batch), dict[str, Tensor]()
        for hook in self.cfg.associated_hook_points:
            if hook in batch:
                x = batch[hook].to(self.cfg.dtype)
                factors[hook] = self.compute_norm_factor(x, hook, batch.get("mask"))
                scaled[hook] = x if self.cfg.norm_activation == "inference" else x * factors[hook]
        return (scaled, factors) if return_scale_factor else scaled

    def denormalize_sites(self, batch: Mapping[str, Any], reconstruction: Tensor, hook_points: Sequence[str]) -> Tensor:
        """Bring `[S, ..., d]` reconstructions of several hook points back to the raw scale of each.

        Raises:
            DataError: token-wise or batch-wise scales, and the batch lacks the activations that they come from.
        """
        mode, parts = self.cfg.norm_activation, []
        for hook, y in zip(hook_points, reconstruction, strict=True):
            if hook not in batch and mode in ("token-wise", "batch-wise"):
                raise DataError(
                    f"norm_activation={mode!r}: the scale of {hook!r} comes from its own activations; add them"
                )
            label = batch.get(hook, y).to(self.cfg.dtype)
            parts.append(y / self.compute_norm_factor(label, hook, batch.get("mask")))
        return torch.stack(parts)

    @torch.no_grad()
    def standardize_parameters_of_dataset_norm(self) -> None:
        """Fold the dataset-wise factors into the weights: raw activations in give raw reconstructions out.

        The same latents are selected. Where nothing is scaled, nothing happens.

        Raises:
            NotImplementedError: token-wise or batch-wise scales, which depend on the activations.
            ConfigError: no average norms are known.
        """
        mode = self.cfg.norm_activation
        if mode in ("token-wise", "batch-wise"):
            raise NotImplementedError(f"norm_activation={mode!r} depends on the activations: nothing to fold")
        if mode == "dataset-wise":
            self.fold_factors()
            self.cfg = self.cfg.model_copy(update={"norm_activation": "inference"})

    @abstractmethod
    def fold_factors(self) -> None:
        """Put the factors of inputs and labels into the weights, in place."""

    def set_dataset_average_activation_norm(self, norms: Mapping[str, float]) -> None:
        """Set the mean norm of each hook point's raw activations."""
        missing = [hook for hook in self.cfg.associated_hook_points if not float(norms.get(hook, 0)) > 0]
        if missing:
            raise DataError(f"activation norms {dict(norms)}: hook point {missing[0]!r} has no positive average norm")
        self.dataset_average_activation_norm = {hook: float(norms[hook]) for hook in self.cfg.associated_hook_points}


def token_wise_factor(x: Tensor) -> Tensor:
    """`sqrt(d) / ||x||` of each token: `[..., 1]`; a zero vector stays zero."""
    return x.shape[-1] ** 0.5 / _not_zero(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def batch_wise_factor(x: Tensor, mask: Tensor | None) -> Tensor:
    """`sqrt(d)` over the mean norm of the batch's valid tokens (0-d)."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    mean = norm.mean() if mask is None else (norm * mask).sum() / mask.sum()
    return x.shape[-1] ** 0.5 / _not_zero(mean)


def _not_zero(norm: Tensor) -> Tensor:
    """`norm`, raised to where its inverse is finite even times the largest plausible width."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.5)


def average_norms(batches: Iterable[Mapping[str, Any]], hook_points: Iterable[str]) -> dict[str, float]:
    """Mean norm of each hook point's activations over the valid tokens of all `batches` together."""
    totals = {hook: 0.0 for hook in hook_points}
    n_tokens = 0.0
    for batch in batches:
        mask = batch.get("mask")
        for hook in totals:
            norm = torch.linalg.vector_norm(batch[hook].float(), dim=-1).double()
            totals[hook] += float((norm if mask is None else norm * mask).sum())
        n_tokens += float(batch["tokens"].numel() if mask is None else mask.sum())
    return {hook: total / n_tokens for hook, total in totals.items()}


def geometric_median(x_ND: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration: `[D]`.

    Source: Weiszfeld 1937; rows closer than rounding to the current point are left out of a step.
    """
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(steps):
        distance_N = torch.linalg.vector_norm(x_ND - median_D, dim=1)
        weight_N = torch.where(distance_N > 1e-12, 1 / distance_N.clamp(min=1e-12), 0.0)
        moved_D = weight_N @ x_ND / weight_N.sum().clamp(min=1e-300)
        if weight_N.sum() == 0 or torch.linalg.vector_norm(moved_D - median_D) <= tolerance * distance_N.mean():
            break
        median_D = moved_D
    return median_D
