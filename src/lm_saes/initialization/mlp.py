"""Transcoders that start from what the model's own MLP makes of their encoder's directions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.initialization.step import InitializationStep, Kind, LayerSettings, Start
from lm_saes.models.base import LanguageModel


class MLPSettings(BaseConfig):
    """Settings of a start from the MLP."""

    initialize_tc_with_mlp: bool | None = None
    """Transcoder only: start decoder directions from what the model's own MLP makes of the encoder's."""


class FromMLP(MLPSettings, LayerSettings, InitializationStep):
    """Decoder directions are what the model's MLP makes of the encoder's."""

    name = "from-mlp"
    order = 4

    def is_on(self) -> bool:
        return bool(self.initialize_tc_with_mlp)

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        transcoder = kind.offers("init_tc_with_mlp") and cfg.hook_points_read != cfg.hook_points_written
        if self.is_on() and not transcoder:
            raise ConfigError(
                "initialize_tc_with_mlp=True: needs a transcoder (sae_type='sae', hook_point_out behind the MLP that "
                "hook_point_in stands in front of); remove it"
            )

    def take(self, cfg: BaseSAEConfig, model: LanguageModel | None) -> Callable[[Tensor], Tensor]:
        if model is None:
            raise ConfigError("initialize_tc_with_mlp=True: needs the language model; give model")
        if self.model_layer is None:
            raise ConfigError("model_layer=None: initialize_tc_with_mlp needs the layer of the MLP to start from")
        return model.mlp(self.model_layer, cfg.hook_points_read[0], cfg.hook_points_written[0])

    def apply(self, start: Start) -> None:
        start.sae.init_tc_with_mlp(start.raw, start.taken[self.name])
