"""Encoder biases at minus the mean pre-activation."""

from __future__ import annotations

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.initialization.step import InitializationStep, Kind, Start, of_kind


class EncoderBiasSettings(BaseConfig):
    """Settings of encoder biases."""

    init_encoder_bias_with_mean_hidden_pre: bool = False
    """Set the encoder bias to minus the mean pre-activation of one batch."""


class EncoderBias(EncoderBiasSettings, InitializationStep):
    """`b_E = -` the mean pre-activation of one batch."""

    name = "encoder-bias"
    order = 8

    def is_on(self) -> bool:
        return self.init_encoder_bias_with_mean_hidden_pre

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        if not kind.offers("init_encoder_bias_with_mean_hidden_pre"):
            lack = f"{of_kind(cfg)} has no encoder bias"
            self.refuse_without_effect(["init_encoder_bias_with_mean_hidden_pre"], lack)

    def apply(self, start: Start) -> None:
        start.sae.init_encoder_bias_with_mean_hidden_pre(start.batch)
