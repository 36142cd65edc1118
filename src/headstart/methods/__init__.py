"""The methods, one small file per family; importing this package registers them all.

A new method is a new file here: :mod:`pkgutil` finds it, the decorator registers it, and the command line and the
docs read the registry.
"""

from __future__ import annotations

import importlib
import pkgutil

from headstart.methods.base import ANY_LAYER, Factors, Form, Layer, Method, Moments, Training, Wants
from headstart.methods.per_layer import PerLayer
from headstart.methods.registry import get_method, method_class, method_names, methods_by_class, parse_method, register

# The order of the tables: random, spectral, approximation, inputs, gradient. A file that is not named comes last.
_RANDOM = ("zero", "nonzero", "inilora_random")
_SPECTRAL = ("spectral", "olora_tail", "rlpo", "mica", "geora", "loram", "lora_xs")
_GRADIENT = ("gradient", "lora_ga", "gora", "keeplora", "lora_sb", "lora_da", "kfac_newton")
_FAMILIES = (*_RANDOM, *_SPECTRAL, "inilora", "loftq", "eva", "corda", *_GRADIENT)
_modules = [module.name for module in pkgutil.iter_modules(__path__)]
for _name in [*_FAMILIES, *(name for name in _modules if name not in _FAMILIES)]:
    importlib.import_module(f"{__name__}.{_name}")

__all__ = [
    "ANY_LAYER",
    "Factors",
    "Form",
    "Layer",
    "Method",
    "Moments",
    "PerLayer",
    "Training",
    "Wants",
    "get_method",
    "method_class",
    "method_names",
    "methods_by_class",
    "parse_method",
    "register",
]
