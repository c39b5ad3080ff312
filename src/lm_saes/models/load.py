"""The language model that a config names, with the backend that runs it."""

from __future__ import annotations

from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.huggingface import HuggingFaceLanguageModel
from lm_saes.models.transformer_lens import TransformerLensLanguageModel


def load_language_model(cfg: LanguageModelConfig) -> LanguageModel:
    """Load the model that `cfg` names, with the backend that it names.

    Raises:
        ConfigError: the model, its tokenizer, the device or the backend cannot be had.
    """
    return TransformerLensLanguageModel(cfg) if cfg.backend == "transformer_lens" else HuggingFaceLanguageModel(cfg)
