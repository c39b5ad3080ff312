"""What commands read: texts, a language model, and the stream of activations that come of them."""

from __future__ import annotations

from collections.abc import Mapping

from lm_saes.data.factory import ActivationFactory
from lm_saes.data.factory_config import ActivationFactoryConfig
from lm_saes.data.seeding import generator
from lm_saes.data.stream import ActivationStream
from lm_saes.data.text import DatasetConfig, TextDataset, load_dataset
from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.load import load_language_model


def open_model(cfg: LanguageModelConfig | None, device: str) -> LanguageModel | None:
    """The language model, if there is one, on a device other than the CPU if a run is on one."""
    if cfg is None:
        return None
    return load_language_model(cfg.model_copy(update={"device": device}) if device != "cpu" else cfg)


def open_texts(datasets: Mapping[str, DatasetConfig]) -> dict[str, TextDataset]:
    """The texts, by name."""
    return {name: load_dataset(cfg) for name, cfg in datasets.items()}


def open_stream(
    cfg: ActivationFactoryConfig, seed: int, model: LanguageModel | None, datasets: Mapping[str, TextDataset]
) -> ActivationStream:
    """The stream of activations that a seed gives."""
    data_seed = generator(seed, "data").initial_seed() >> 1
    return ActivationFactory(cfg, seed=data_seed).process(model=model, datasets=datasets)
