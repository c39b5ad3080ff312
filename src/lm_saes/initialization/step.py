"""What every step of an initialisation is, and what steps share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field

from lm_saes.choices import Choice
from lm_saes.config import BaseConfig
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.models.base import LanguageModel

Kind = type[AbstractSparseAutoEncoder]


@dataclass
class Start:
    """What steps work on, and with."""

    sae: AbstractSparseAutoEncoder
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The first batch of activations; empty if no step looks at one."""
    taken: Mapping[str, Any] = field(default_factory=dict)
    """What steps have taken from the language model, by their names."""
    wandb_logger: Any = None

    @property
    def batch(self) -> dict[str, Any]:
        """The first batch, normalised."""
        return self.sae.normalize_activations(self.raw)


class InitializationStep(Choice):
    """One thing that is done to a fresh dictionary. Its fields are the settings that it reads."""

    registry: ClassVar[dict[str, type[InitializationStep]]] = {}
    noun = "step of the initialisation"
    order: ClassVar[float]
    """Steps are taken in ascending order: 1 draws weights, 3 to 5 start from a model or a subspace, 6 to 8 search."""
    looks_at_a_batch: ClassVar[bool] = True

    @abstractmethod
    def is_on(self) -> bool:
        """Whether the settings ask for it."""

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        """Refuse settings that a dictionary has no use for; asked whether or not the step is on.

        Raises:
            ConfigError: with the setting and the reason.
        """

    def take(self, cfg: BaseSAEConfig, model: LanguageModel | None) -> Any:
        """What the step needs of the language model, taken before anything is built."""
        return None

    @abstractmethod
    def apply(self, start: Start) -> None:
        """Do it. Gradients are off."""


class LayerSettings(BaseConfig):
    """Where steps that start from the model find it."""

    model_layer: int | None = Field(default=None, ge=0)
    """Layer of the model that those weights come from."""


class TieSettings(BaseConfig):
    """How fresh encoders follow decoders."""

    init_encoder_with_decoder_transpose: bool = True
    """Tie the fresh encoder to the decoder: `W_E = factor x W_D^T`. Kinds whose encoder has another shape never do, and
    refuse this if it is set."""
    init_encoder_with_decoder_transpose_factor: float = 1.0
    """That factor."""

    def tie(self, sae: AbstractSparseAutoEncoder) -> None:
        """`W_E = factor x W_D^T`, where that is asked for and has a meaning."""
        if self.init_encoder_with_decoder_transpose and sae.offers("init_encoder_with_decoder_transpose"):
            sae.init_encoder_with_decoder_transpose(self.init_encoder_with_decoder_transpose_factor)


def of_kind(cfg: BaseSAEConfig) -> str:
    """What messages call a dictionary."""
    return f"a dictionary of sae_type={cfg.sae_type!r}"
