"""Decoder biases at the labels' geometric median."""

from __future__ import annotations

from typing import Literal

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.initialization.step import InitializationStep, Kind, Start, of_kind


class DecoderBiasSettings(BaseConfig):
    """Settings of decoder biases."""

    bias_init_method: Literal["all_zero", "geometric_median"] = "all_zero"
    """Decoder bias: zero, or the geometric median of the labels of one batch."""


class DecoderBias(DecoderBiasSettings, InitializationStep):
    """`b_D =` the geometric median of the labels of one batch."""

    name = "decoder-bias"
    order = 6

    def is_on(self) -> bool:
        return self.bias_init_method == "geometric_median"

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        if not kind.offers("init_decoder_bias_with_geometric_median"):
            self.refuse_without_effect(["bias_init_method"], f"{of_kind(cfg)} has no one decoder bias")
        if self.is_on() and not cfg.use_decoder_bias:
            raise ConfigError(
                f"bias_init_method={self.bias_init_method!r}: use_decoder_bias is off; there is no bias to set"
            )

    def apply(self, start: Start) -> None:
        start.sae.init_decoder_bias_with_geometric_median(start.batch)
