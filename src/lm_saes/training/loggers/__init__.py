"""Where a run's numbers go: the terminal, `metrics.jsonl`, Weights & Biases, TensorBoard."""

from lm_saes.training.loggers.base import Logger, Loggers
from lm_saes.training.loggers.console import ConsoleLogger
from lm_saes.training.loggers.jsonl import JsonlLogger
from lm_saes.training.loggers.tensorboard import TensorBoardLogger
from lm_saes.training.loggers.wandb import WandbConfig, WandbLogger

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "Logger",
    "Loggers",
    "TensorBoardLogger",
    "WandbConfig",
    "WandbLogger",
]
