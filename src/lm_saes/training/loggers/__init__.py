"""Where a run's numbers go: the terminal, `metrics.jsonl`, Weights & Biases, TensorBoard.

A new logger is a module of this package with a `LoggerConfig`: its name, its settings, and what it makes.
"""

import importlib
import pkgutil

from lm_saes.training.loggers.base import LoggedRun, Logger, LoggerConfig, Loggers
from lm_saes.training.loggers.console import ConsoleLogger
from lm_saes.training.loggers.jsonl import JsonlLogger
from lm_saes.training.loggers.tensorboard import TensorBoardLogger
from lm_saes.training.loggers.wandb import WandbConfig, WandbLogger

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "LoggedRun",
    "Logger",
    "LoggerConfig",
    "Loggers",
    "TensorBoardLogger",
    "WandbConfig",
    "WandbLogger",
]
