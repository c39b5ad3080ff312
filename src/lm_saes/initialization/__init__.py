"""What a dictionary starts with: one step a file, each with the settings that it reads.

A new step is a subclass of `InitializationStep` in a module of this package; naming it registers it.
"""

import importlib
import pkgutil

from lm_saes.initialization.step import InitializationStep, Start

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["InitializationStep", "Start"]
