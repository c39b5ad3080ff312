"""A process's part of a dictionary, made without the rest ever having been there."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lm_saes.axes.axis import Axes
from lm_saes.axes.cuts import HEAD, axis_along, runs_along
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.files import Stored
from lm_saes.errors import ConfigError
from lm_saes.latents.gradients.rows import storage_order

Kind = TypeVar("Kind", bound=Stored)


def build_part(kind: type[Kind], cfg: BaseSAEConfig, axes: Axes) -> Kind:
    """This process's part of a dictionary, all zeros, without the rest ever having been there.

    Raises:
        ConfigError: the latents, or the heads, cannot be cut evenly, or there are no heads to cut.
    """
    with torch.device("meta"):
        part = kind(cfg)
    if axes.sites.size > 1 and not any(HEAD in dims for dims in part.dim_maps().values()):
        raise ConfigError(f"device_mesh: sae_type={cfg.sae_type!r} has no heads to cut; only a crosscoder has")
    part.attach(axes)
    maps = part.dim_maps()
    for name, whole in [*part.named_parameters(), *part.named_buffers()]:
        owner, _, own_name = name.rpartition(".")
        shape = list(whole.shape)
        for along, dim in maps.get(name, {}).items():
            n = axis_along(part, along).size
            for run in runs_along(part, along, shape[dim]):
                _check_even(cfg, along, run, n)
            shape[dim] //= n
        order = storage_order(whole)
        stored = torch.zeros([shape[i] for i in order], dtype=whole.dtype, device=cfg.device)
        tensor = stored.permute([order.index(i) for i in range(whole.ndim)])
        setattr(
            part.get_submodule(owner), own_name, nn.Parameter(tensor) if isinstance(whole, nn.Parameter) else tensor
        )
    return part


def _check_even(cfg: BaseSAEConfig, along: str, size: int, n: int) -> None:
    if size % n:
        what = "heads" if along == HEAD else "latents (or heads, or transforms of one rank)"
        raise ConfigError(
            f"{along}_parallel_size={n}: does not divide the {size} {what} of sae_type={cfg.sae_type!r} evenly; use a "
            "divisor"
        )
