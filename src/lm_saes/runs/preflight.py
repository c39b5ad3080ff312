"""What can be known to be wrong with a run before a model is loaded or anything is written."""

from __future__ import annotations

import torch

from lm_saes import machine
from lm_saes.axes.axis import Axes
from lm_saes.axes.together import by_first, each
from lm_saes.data.batch import check_batch
from lm_saes.data.peek import Peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError, DataError
from lm_saes.parallel.launch import n_on_this_node
from lm_saes.parallel.mesh import DeviceMesh
from lm_saes.runs.settings import TrainSettings
from lm_saes.storage.files import check_writable
from lm_saes.training.optim import build_optimizer
from lm_saes.training.plan import check_settings

_COPIES = 4
"""Weights, their gradients, and Adam's two moments."""


def check_run(settings: TrainSettings, mesh: DeviceMesh | None, axes: Axes) -> None:
    """Raise `ConfigError` for a directory, a device, a size or a combination of settings that cannot work."""
    directory = settings.trainer.exp_result_path
    by_first(axes.everywhere, lambda: check_writable(directory, "trainer.exp_result_path"))
    machine.check_device(settings.device_type, "device_type")
    with torch.device("meta"):  # shapes without memory
        shape = AbstractSparseAutoEncoder.from_config(settings.sae.model_copy(update={"device": "meta"}), mesh)
    _check_size(shape, settings.device_type)
    check_settings(settings.trainer, shape)
    build_optimizer(settings.trainer, shape)


def check_first_batch(stream: Peekable, cfg: BaseSAEConfig, axes: Axes) -> None:
    """Raise `DataError` if the stream of a new run has no batch, or one that the dictionary cannot read."""
    each(axes.everywhere, lambda: _check_first_batch(stream, cfg, axes))


def _check_first_batch(stream: Peekable, cfg: BaseSAEConfig, axes: Axes) -> None:
    first = stream.peek(1)
    if not first:
        raise DataError(
            "activation_factory.sources: give not one batch, as no token counts; give text, and see to "
            "ignore_token_ids and max_norm_ratio"
        )
    check_batch(first[0], cfg.widths, is_share=axes.tokens.size > 1)


def _check_size(dictionary: AbstractSparseAutoEncoder, device: str) -> None:
    needed = _COPIES * sum(p.numel() * p.element_size() for p in dictionary.parameters())
    if device == "cpu":
        needed *= n_on_this_node()
    there = machine.memory_bytes(device)
    if needed > there:
        raise ConfigError(
            f"sae: {dictionary.cfg.d_sae} latents of d_model={dictionary.cfg.d_model} need {needed / 2**30:.3g} GiB "
            f"here for weights, gradients and moments, but {device} has {there / 2**30:.3g} GiB; lower expansion_factor"
        )
