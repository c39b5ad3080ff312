"""Sparse dictionaries of language models' activations. Names load on first use, so that `import lm_saes` is fast."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from lm_saes.data.factory import ActivationFactory as ActivationFactory
    from lm_saes.data.factory_config import ActivationFactoryActivationsSource as ActivationFactoryActivationsSource
    from lm_saes.data.factory_config import ActivationFactoryConfig as ActivationFactoryConfig
    from lm_saes.data.factory_config import ActivationFactoryDatasetSource as ActivationFactoryDatasetSource
    from lm_saes.data.factory_config import ActivationFactoryTarget as ActivationFactoryTarget
    from lm_saes.data.factory_config import BufferShuffleConfig as BufferShuffleConfig
    from lm_saes.data.text import DatasetConfig as DatasetConfig
    from lm_saes.data.text import load_dataset as load_dataset
    from lm_saes.data.writer import ActivationWriter as ActivationWriter
    from lm_saes.data.writer import ActivationWriterConfig as ActivationWriterConfig
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder as AbstractSparseAutoEncoder
    from lm_saes.dictionaries.clt import CLTConfig as CLTConfig
    from lm_saes.dictionaries.clt import CrossLayerTranscoder as CrossLayerTranscoder
    from lm_saes.dictionaries.config import BaseSAEConfig as BaseSAEConfig
    from lm_saes.dictionaries.crosscoder import CrossCoder as CrossCoder
    from lm_saes.dictionaries.crosscoder import CrossCoderConfig as CrossCoderConfig
    from lm_saes.dictionaries.lorsa import LowRankSparseAttention as LowRankSparseAttention
    from lm_saes.dictionaries.lorsa_config import LorsaConfig as LorsaConfig
    from lm_saes.dictionaries.molt import MixtureOfLinearTransform as MixtureOfLinearTransform
    from lm_saes.dictionaries.molt import MOLTConfig as MOLTConfig
    from lm_saes.dictionaries.sae import SAEConfig as SAEConfig
    from lm_saes.dictionaries.sae import SparseAutoEncoder as SparseAutoEncoder
    from lm_saes.evaluation.evaluator import EvalConfig as EvalConfig
    from lm_saes.evaluation.evaluator import Evaluator as Evaluator
    from lm_saes.initializer import Initializer as Initializer
    from lm_saes.initializer import InitializerConfig as InitializerConfig
    from lm_saes.models.base import LanguageModel as LanguageModel
    from lm_saes.models.base import LanguageModelConfig as LanguageModelConfig
    from lm_saes.models.huggingface import HuggingFaceLanguageModel as HuggingFaceLanguageModel
    from lm_saes.models.load import load_language_model as load_language_model
    from lm_saes.models.transformer_lens import TransformerLensLanguageModel as TransformerLensLanguageModel
    from lm_saes.runners import EvaluateSAESettings as EvaluateSAESettings
    from lm_saes.runners import GenerateActivationsSettings as GenerateActivationsSettings
    from lm_saes.runners import TrainCLTSettings as TrainCLTSettings
    from lm_saes.runners import TrainCrossCoderSettings as TrainCrossCoderSettings
    from lm_saes.runners import TrainLorsaSettings as TrainLorsaSettings
    from lm_saes.runners import TrainMOLTSettings as TrainMOLTSettings
    from lm_saes.runners import TrainSAESettings as TrainSAESettings
    from lm_saes.runners import evaluate_sae as evaluate_sae
    from lm_saes.runners import generate_activations as generate_activations
    from lm_saes.runners import train_clt as train_clt
    from lm_saes.runners import train_crosscoder as train_crosscoder
    from lm_saes.runners import train_lorsa as train_lorsa
    from lm_saes.runners import train_molt as train_molt
    from lm_saes.runners import train_sae as train_sae
    from lm_saes.trainer import Trainer as Trainer
    from lm_saes.training.config import TrainerConfig as TrainerConfig
    from lm_saes.training.loggers.wandb import WandbConfig as WandbConfig

_MODULE_OF = {
    "AbstractSparseAutoEncoder": "lm_saes.dictionaries.base",
    "ActivationFactory": "lm_saes.data.factory",
    "ActivationFactoryActivationsSource": "lm_saes.data.factory_config",
    "ActivationFactoryConfig": "lm_saes.data.factory_config",
    "ActivationFactoryDatasetSource": "lm_saes.data.factory_config",
    "ActivationFactoryTarget": "lm_saes.data.factory_config",
    "ActivationWriter": "lm_saes.data.writer",
    "ActivationWriterConfig": "lm_saes.data.writer",
    "BaseSAEConfig": "lm_saes.dictionaries.config",
    "BufferShuffleConfig": "lm_saes.data.factory_config",
    "CLTConfig": "lm_saes.dictionaries.clt",
    "CrossCoder": "lm_saes.dictionaries.crosscoder",
    "CrossCoderConfig": "lm_saes.dictionaries.crosscoder",
    "CrossLayerTranscoder": "lm_saes.dictionaries.clt",
    "DatasetConfig": "lm_saes.data.text",
    "EvalConfig": "lm_saes.evaluation.evaluator",
    "EvaluateSAESettings": "lm_saes.runners",
    "Evaluator": "lm_saes.evaluation.evaluator",
    "GenerateActivationsSettings": "lm_saes.runners",
    "HuggingFaceLanguageModel": "lm_saes.models.huggingface",
    "Initializer": "lm_saes.initializer",
    "InitializerConfig": "lm_saes.initializer",
    "LanguageModel": "lm_saes.models.base",
    "LanguageModelConfig": "lm_saes.models.base",
    "LorsaConfig": "lm_saes.dictionaries.lorsa_config",
    "LowRankSparseAttention": "lm_saes.dictionaries.lorsa",
    "MOLTConfig": "lm_saes.dictionaries.molt",
    "MixtureOfLinearTransform": "lm_saes.dictionaries.molt",
    "SAEConfig": "lm_saes.dictionaries.sae",
    "SparseAutoEncoder": "lm_saes.dictionaries.sae",
    "TrainCLTSettings": "lm_saes.runners",
    "TrainCrossCoderSettings": "lm_saes.runners",
    "TrainLorsaSettings": "lm_saes.runners",
    "TrainMOLTSettings": "lm_saes.runners",
    "TrainSAESettings": "lm_saes.runners",
    "Trainer": "lm_saes.trainer",
    "TrainerConfig": "lm_saes.training.config",
    "TransformerLensLanguageModel": "lm_saes.models.transformer_lens",
    "WandbConfig": "lm_saes.training.loggers.wandb",
    "evaluate_sae": "lm_saes.runners",
    "generate_activations": "lm_saes.runners",
    "load_dataset": "lm_saes.data.text",
    "load_language_model": "lm_saes.models.load",
    "train_clt": "lm_saes.runners",
    "train_crosscoder": "lm_saes.runners",
    "train_lorsa": "lm_saes.runners",
    "train_molt": "lm_saes.runners",
    "train_sae": "lm_saes.runners",
}

__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("lm-saes")
        except PackageNotFoundError:
            return "0+not-installed"
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF, "__version__"])
