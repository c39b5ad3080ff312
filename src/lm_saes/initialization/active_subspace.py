"""Decoder directions within the directions in which labels vary most."""

from __future__ import annotations

from pydantic import Field

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.initialization.attention import attention_of
from lm_saes.initialization.mlp import MLPSettings
from lm_saes.initialization.step import InitializationStep, Kind, LayerSettings, Start, TieSettings, of_kind
from lm_saes.models.attention_weights import AttentionWeights
from lm_saes.models.base import LanguageModel


class SubspaceSettings(BaseConfig):
    """Settings of a start in the active subspace."""

    initialize_W_D_with_active_subspace: bool = False
    """Draw decoder directions within the directions of most variance of the labels."""
    d_active_subspace: int | None = Field(default=None, gt=0)
    """How many directions those are."""


class ActiveSubspace(SubspaceSettings, MLPSettings, LayerSettings, TieSettings, InitializationStep):
    """Decoders are moved into the labels' active subspace; a Lorsa's values into those of the model's heads."""

    name = "active-subspace"
    order = 5

    def is_on(self) -> bool:
        return self.initialize_W_D_with_active_subspace

    def check(self, cfg: BaseSAEConfig, kind: Kind) -> None:
        per_head, m = _per_head(kind), self.d_active_subspace
        if not (per_head or kind.offers("init_W_D_with_active_subspace")):
            lack = f"{of_kind(cfg)} has no one decoder matrix"
            self.refuse_without_effect(["initialize_W_D_with_active_subspace"], lack)
        if not self.is_on():
            return
        if per_head and m is not None:
            raise ConfigError(f"d_active_subspace={m} has no effect: a Lorsa takes d_qk_head of each head; remove it")
        if not per_head and m is None:
            raise ConfigError(
                "d_active_subspace=None: initialize_W_D_with_active_subspace needs a number of directions"
            )
        if not (per_head or self.initialize_tc_with_mlp) and self.model_layer is not None:
            raise ConfigError(
                f"model_layer={self.model_layer} has no effect: nothing is taken from the model; remove it"
            )

    def take(self, cfg: BaseSAEConfig, model: LanguageModel | None) -> AttentionWeights | None:
        if not _per_head(AbstractSparseAutoEncoder.kind_of(cfg)):
            return None
        return attention_of("initialize_W_D_with_active_subspace", self.model_layer, cfg, model)

    def apply(self, start: Start) -> None:
        attention, sae = start.taken.get(self.name), start.sae
        if attention is not None:
            sae.init_W_V_with_active_subspace_per_head(start.batch, attention)
        elif self.d_active_subspace is not None:
            sae.init_W_D_with_active_subspace(start.batch, self.d_active_subspace)
            self.tie(sae)


def _per_head(kind: Kind) -> bool:
    """Whether the active subspaces are those of the heads of the model's attention."""
    return kind.offers("init_W_V_with_active_subspace_per_head")
