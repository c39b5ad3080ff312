"""Training metrics: each keeps totals that add up over batches, and divides once, at the report.

A new metric is a subclass of `Metric` in a module of this package.
"""

import importlib
import pkgutil

from lm_saes.metrics.base import Metric, StepFacts

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Metric", "StepFacts"]
