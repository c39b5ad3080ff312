"""Fresh weights, and the encoder's tie to the decoder."""

from __future__ import annotations

from pydantic import Field

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.initialization.step import InitializationStep, Kind, Start, TieSettings, of_kind


class FreshSettings(BaseConfig):
    """Settings of fresh weights."""

    decoder_uniform_bound: float = Field(default=1.0, gt=0)
    """Decoder weights are drawn uniformly within plus and minus this."""
    encoder_uniform_bound: float = Field(default=1.0, gt=0)
    """Encoder weights are drawn uniformly within plus and minus this."""
    init_log_jumprelu_threshold_value: float | None = None
    """Logarithm of the JumpReLU thresholds at the start (needed for `act_fn="jumprelu"`)."""


class FreshWeights(FreshSettings, TieSettings, InitializationStep):
    """Weights from torch's global generator, thresholds as set, biases 0; then the tie."""

    name = "fresh-weights"
    order = 1
    looks_at_a_batch = False

    def is_on(self) -> bool:
        return True

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        tied, value = "init_encoder_with_decoder_transpose", self.init_log_jumprelu_threshold_value
        if not kind.offers(tied):
            lack = f"{of_kind(cfg)} has no encoder of its decoder's shape"
            if tied in self.model_fields_set and self.init_encoder_with_decoder_transpose:
                raise ConfigError(f"{tied}=True: {lack}; remove it")
            self.refuse_without_effect([f"{tied}_factor"], lack)
        if not kind.reads_uniform_bounds:
            reason = f"{of_kind(cfg)} draws its fresh weights by a rule of its own"
            self.refuse_without_effect(["encoder_uniform_bound", "decoder_uniform_bound"], reason)
        if value is not None and cfg.act_fn != "jumprelu":
            raise ConfigError(
                f"init_log_jumprelu_threshold_value={value}: act_fn={cfg.act_fn!r} has no thresholds; remove it"
            )

    def apply(self, start: Start) -> None:
        start.sae.init_parameters(
            encoder_uniform_bound=self.encoder_uniform_bound,
            decoder_uniform_bound=self.decoder_uniform_bound,
            init_log_jumprelu_threshold_value=self.init_log_jumprelu_threshold_value,
        )
        self.tie(start.sae)
