"""Low-rank sparse attention that starts from a layer of the model's own."""

from __future__ import annotations

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.initialization.step import InitializationStep, Kind, LayerSettings, Start
from lm_saes.models.attention_weights import AttentionWeights, attention_weights
from lm_saes.models.base import LanguageModel


class AttentionSettings(BaseConfig):
    """Settings of a start from attention."""

    initialize_lorsa_with_mhsa: bool | None = None
    """Lorsa only: start from the model's own attention weights."""


class FromAttention(AttentionSettings, LayerSettings, InitializationStep):
    """Queries and keys, with their biases and norms, are the model's."""

    name = "from-attention"
    order = 3
    looks_at_a_batch = False

    def is_on(self) -> bool:
        return bool(self.initialize_lorsa_with_mhsa)

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        if self.is_on() and not kind.offers("init_lorsa_with_mhsa"):
            raise ConfigError(
                f"initialize_lorsa_with_mhsa=True: needs sae_type='lorsa', not {cfg.sae_type!r}; remove it"
            )

    def take(self, cfg: BaseSAEConfig, model: LanguageModel | None) -> AttentionWeights:
        return attention_of("initialize_lorsa_with_mhsa", self.model_layer, cfg, model)

    def apply(self, start: Start) -> None:
        start.sae.init_lorsa_with_mhsa(start.taken[self.name])


def attention_of(
    setting: str, layer: int | None, cfg: BaseSAEConfig, model: LanguageModel | None
) -> AttentionWeights:  # fmt: skip
    """The attention that a dictionary starts from.

    Raises:
        ConfigError: there is no layer, no model, or it cannot be read.
    """
    if layer is None:
        raise ConfigError(f"model_layer=None: {setting} needs the layer of the attention to start from")
    if model is None:
        raise ConfigError(f"{setting}=True: needs the language model's attention; give model")
    try:
        return attention_weights(model, layer).to(cfg.device)
    except NotImplementedError as error:
        raise ConfigError(f"{setting}=True: {error}; remove it") from error
