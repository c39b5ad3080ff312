"""What every activation function is: k or a threshold, and what it wants of a batch.

A code's rows are tokens, or (token, site) where a dictionary has several sites (layers, heads). Most activation
functions look at rows; those that let sites compete (`joins_sites`) see one row per token with all sites side by side.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lm_saes.latents.selection.wants import Want


@dataclass(frozen=True)
class SelectionSettings:
    """What activation functions read of a dictionary's config."""

    top_k: int
    jumprelu_threshold_window: float
    threshold_shape: tuple[int, ...]
    """Shape of learnt thresholds: one a latent, of each site that has its own."""
    n_pools: int
    """Pools of entries that batch-wide selection picks from, each for itself."""


class ActivationFunction(nn.Module, ABC):
    """Base of all activation functions. A subclass registers itself by its name."""

    name: ClassVar[str]
    registry: ClassVar[dict[str, type[ActivationFunction]]] = {}
    config_fields: ClassVar[frozenset[str]] = frozenset()
    """The dictionary-config fields that only this kind of activation function reads."""
    log_threshold: Tensor | None = None
    """Logarithm of a learnt threshold per latent, if there is one; its gradient is that of a window around it."""
    joins_sites: bool = False
    """Whether a row is a token with the latents of all its sites, rather than one (token, site)."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            ActivationFunction.registry[cls.name] = cls

    def __init__(self, settings: SelectionSettings) -> None:
        super().__init__()

    @abstractmethod
    def wants(self) -> Want:
        """Which entries of a batch it keeps: that is its definition, and decides which ways there are to find them."""

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Follow a rescaling of all `s` by `factor`, so that the same entries stay selected."""
        if self.log_threshold is not None:
            self.log_threshold.add_(factor.log())
