"""Language models run by the `transformers` library."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor

from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.hook_points import Edit, HookLocation, HookPoints, MLPParts
from lm_saes.models.pretrained import PretrainedLanguageModel


class HuggingFaceLanguageModel(PretrainedLanguageModel):
    """A causal language model loaded and run by `transformers`; any module's path is a hook point too."""

    def __init__(self, cfg: LanguageModelConfig) -> None:
        super().__init__(cfg)
        self._hook_points = HookPoints(self._model, self._model.config.get_text_config())

    def _find(self, hook_point: str) -> HookLocation:
        return self._hook_points.find(hook_point)

    def _hooked(self, edits: Mapping[str, Edit]) -> ExitStack:
        with ExitStack() as hooks:
            for name, edit in edits.items():
                hooks.enter_context(self._find(name).attach(edit))
            return hooks.pop_all()

    def _forward(self, tokens: Tensor) -> Tensor:
        return self._model(input_ids=tokens, use_cache=False).logits

    def _mlp_parts(self, layer: int) -> MLPParts:
        return self._hook_points.mlp(layer)

    @property
    def _backend_identity(self) -> dict[str, str]:
        return {"backend": "huggingface"}
