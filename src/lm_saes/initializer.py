"""Initialisation: fresh weights, dataset norms, and what one batch of activations can tell before training.

The steps, each with its settings, are in `lm_saes.initialization`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import SerializerFunctionWrapHandler, ValidationInfo, model_serializer, model_validator
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.choices import Choice, OpenConfig
from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.peek import peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.normalization import NORM_BATCHES, average_norms
from lm_saes.errors import ConfigError, DataError
from lm_saes.initialization import InitializationStep, Start
from lm_saes.initialization.active_subspace import SubspaceSettings
from lm_saes.initialization.attention import AttentionSettings
from lm_saes.initialization.decoder_bias import DecoderBiasSettings
from lm_saes.initialization.decoder_norm import DecoderNormSettings
from lm_saes.initialization.encoder_bias import EncoderBiasSettings
from lm_saes.initialization.fresh_weights import FreshSettings
from lm_saes.initialization.mlp import MLPSettings
from lm_saes.initialization.step import LayerSettings, TieSettings
from lm_saes.models.base import LanguageModel

_SEARCH = 6
"""Steps from here on look for what fits one batch."""


class InitializerConfig(
    EncoderBiasSettings, LayerSettings, MLPSettings, AttentionSettings, SubspaceSettings, DecoderNormSettings,
    TieSettings, FreshSettings, DecoderBiasSettings, OpenConfig,
):  # fmt: skip
    """How to initialise a dictionary."""

    parts: ClassVar[type[Choice] | None] = InitializationStep

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> InitializerConfig:
        if not self.initialize_W_D_with_active_subspace:
            self.refuse_without_effect(["d_active_subspace"], "initialize_W_D_with_active_subspace is off", info)
        if not self.init_encoder_with_decoder_transpose:
            factor = ["init_encoder_with_decoder_transpose_factor"]
            self.refuse_without_effect(factor, "init_encoder_with_decoder_transpose is off", info)
        if not (
            self.initialize_lorsa_with_mhsa or self.initialize_tc_with_mlp or self.initialize_W_D_with_active_subspace
        ):
            self.refuse_without_effect(["model_layer"], "nothing is initialised from the model", info)
        if self.initialize_tc_with_mlp:
            if self.model_layer is None:
                raise ValueError("model_layer=None: initialize_tc_with_mlp needs the layer of the MLP to start from")
            if self.initialize_W_D_with_active_subspace:
                raise ValueError(
                    "initialize_W_D_with_active_subspace=True: would overwrite the decoder that initialize_tc_with_mlp "
                    "sets; remove one of them"
                )
            factor = ["init_encoder_with_decoder_transpose_factor"]
            self.refuse_without_effect(factor, "initialize_tc_with_mlp brings encoder norms to 1", info)
        return self

    @model_serializer(mode="wrap")
    def _without_an_unset_tie(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A tie that nobody set is not saved, so that a kind which refuses one can be trained again as it was."""
        name = "init_encoder_with_decoder_transpose"
        return {key: value for key, value in handler(self).items() if key != name or name in self.model_fields_set}


class Initializer:
    """Makes dictionaries ready for training."""

    def __init__(self, cfg: InitializerConfig) -> None:
        self.cfg = cfg

    @property
    def steps(self) -> list[InitializationStep]:
        """All steps in order, each with its settings."""
        return sorted(self.cfg.all_parts(), key=lambda step: step.order)

    @torch.no_grad()
    def initialize_parameters(self, sae: AbstractSparseAutoEncoder) -> AbstractSparseAutoEncoder:
        """Draw fresh weights from torch's global generator, and tie the encoder if configured."""
        self._apply(Start(sae), lambda step: step.order < 2)
        return sae

    @torch.no_grad()
    def initialize_sae_from_config(
        self,
        cfg: BaseSAEConfig,
        activation_stream: Iterable[Batch] | None = None,
        activation_norm: Mapping[str, float] | None = None,
        device_mesh: Any = None,
        wandb_logger: Any = None,
        model: LanguageModel | None = None,
    ) -> AbstractSparseAutoEncoder:
        """Build and initialise a dictionary, in the order of section 9 of the specification.

        Batches are only looked at: a stream, or a generator, still gives them to the trainer afterwards.

        Args:
            activation_stream: batches of activations; needed for dataset-wise norms that are not given and for
                everything that looks at a batch.
            activation_norm: mean norm of each hook point's activations.
            model: the language model that gives its MLP (`initialize_tc_with_mlp`) or attention (Lorsa).

        Raises:
            ConfigError: a setting that does not fit this dictionary, or needs something that was not given.
        """
        self.check(cfg)
        taken = {step.name: step.take(cfg, model) for step in self.steps if step.is_on()}
        sae = AbstractSparseAutoEncoder.from_config(cfg, device_mesh=device_mesh)
        axes = sae.axes
        sae.attach(axes.of_whole_batches())
        self.initialize_parameters(sae)
        measures = cfg.norm_activation == "dataset-wise" and activation_norm is None
        batches = _whole_batches(activation_stream, NORM_BATCHES if measures else 1, sae, axes)
        if cfg.norm_activation == "dataset-wise":
            if measures and not batches:
                raise ConfigError(
                    "norm_activation='dataset-wise': give activation_norm, or an activation_stream to measure it"
                )
            measured = (
                average_norms(batches, cfg.associated_hook_points) if activation_norm is None else activation_norm
            )
            sae.set_dataset_average_activation_norm(measured)
        if not batches and any(step.is_on() and step.looks_at_a_batch for step in self.steps):
            raise DataError("activation_stream: initialisation looks at a batch, and there is none; give a stream")
        first = {
            k: v.to(cfg.device) if isinstance(v, Tensor) else v for k, v in (batches[0] if batches else {}).items()
        }
        self._apply(Start(sae, first, taken, wandb_logger), lambda step: step.order >= 2)
        sae.attach(axes)
        return sae

    @torch.no_grad()
    def initialization_search(
        self, sae: AbstractSparseAutoEncoder, activation_batch: Mapping[str, Any], wandb_logger: Any = None
    ) -> AbstractSparseAutoEncoder:
        """Set decoder bias, decoder norm and encoder bias by what fits one (raw) batch, as configured."""
        self._apply(Start(sae, activation_batch, {}, wandb_logger), lambda step: step.order >= _SEARCH)
        return sae

    def check(self, cfg: BaseSAEConfig) -> None:
        """Refuse settings that this dictionary has no use for; no activations and no model are looked at.

        Raises:
            ConfigError: with the setting and the reason.
        """
        kind = AbstractSparseAutoEncoder.kind_of(cfg)
        for step in self.steps:
            step.check(cfg, kind)

    def _apply(self, start: Start, wanted: Callable[[InitializationStep], bool]) -> None:
        for step in self.steps:
            if wanted(step) and step.is_on():
                step.apply(start)


def _whole_batches(
    stream: Iterable[Batch] | None, n: int, sae: AbstractSparseAutoEncoder, axes: Axes
) -> list[Batch]:  # fmt: skip
    """The first batches of a stream, of all processes together, checked to fit the dictionary."""
    batches = [] if stream is None else peekable(stream).peek(n)
    batches = [{k: axes.tokens.join(v) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    for batch in batches:
        check_batch(batch, sae.cfg.widths)
    return batches
