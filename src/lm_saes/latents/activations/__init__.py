"""Activation functions: which latents of each token are active. The value kept is always the pre-activation `h`.

Selection looks at `s = h * norm` with gating by the decoder norm, at `s = h` without. What is not kept is exactly 0.
A new activation function is a subclass of `ActivationFunction` in a module of this package; naming it registers it.
"""

import importlib
import pkgutil

from lm_saes.latents.activations.base import ActivationFunction

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ActivationFunction"]
