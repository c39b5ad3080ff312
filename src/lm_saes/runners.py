"""The commands as functions, under the name that scripts know them by; they live in `lm_saes.runs`."""

from lm_saes.runs.evaluate import evaluate_from_config, evaluate_held_out, evaluate_sae
from lm_saes.runs.generate import generate_activations, generate_from_config
from lm_saes.runs.settings import (
    EvaluateSAESettings,
    GenerateActivationsSettings,
    TrainCLTSettings,
    TrainCrossCoderSettings,
    TrainLorsaSettings,
    TrainMOLTSettings,
    TrainSAESettings,
    train_settings_class,
)
from lm_saes.runs.train import train_clt, train_crosscoder, train_from_config, train_lorsa, train_molt, train_sae

__all__ = [
    "EvaluateSAESettings",
    "GenerateActivationsSettings",
    "TrainCLTSettings",
    "TrainCrossCoderSettings",
    "TrainLorsaSettings",
    "TrainMOLTSettings",
    "TrainSAESettings",
    "evaluate_from_config",
    "evaluate_held_out",
    "evaluate_sae",
    "generate_activations",
    "generate_from_config",
    "train_clt",
    "train_crosscoder",
    "train_from_config",
    "train_lorsa",
    "train_molt",
    "train_sae",
    "train_settings_class",
]
