"""TopK and LayerTopK: the rule that so many latents of each token are active; `selection/` finds them."""

from __future__ import annotations

from lm_saes.latents.activations.base import ActivationFunction, SelectionSettings
from lm_saes.latents.selection.wants import BestPerToken


class TopK(ActivationFunction):
    """Keeps the k largest `s` of each token, of those the positive ones (Gao et al. 2024, section 2.3)."""

    name = "topk"
    config_fields = frozenset({"top_k"})

    def __init__(self, settings: SelectionSettings) -> None:
        super().__init__(settings)
        self.k = settings.top_k

    def wants(self) -> BestPerToken:
        return BestPerToken(self.k)


class LayerTopK(TopK):
    """Keeps the k largest `s` of each token over all its layers (heads) together, of those the positive ones."""

    name = "layertopk"
    joins_sites = True
