"""headstart: every serious way to initialise LoRA, behind one verb, for any Hugging Face model.

>>> import headstart as hs
>>> report = hs.initialize_(peft_model, hs.PiSSA())
>>> hs.save_lora(peft_model, "adapter/")
"""

import importlib
from typing import TYPE_CHECKING, Any

from headstart import _imports
from headstart._version import __version__
from headstart.errors import (
    CheckpointError,
    DataError,
    HeadstartError,
    LayerError,
    MethodError,
    ModelError,
    RunError,
    TaskError,
)
from headstart.layers import peft_steps
from headstart.methods import (
    Factors,
    Form,
    Layer,
    Method,
    PerLayer,
    Training,
    Wants,
    get_method,
    method_names,
    methods_by_class,
    register,
)
from headstart.methods.registry import load_plugins

if TYPE_CHECKING:
    from headstart.allocate import allocate_ranks_
    from headstart.initialize import initialize_
    from headstart.layers.checkpoint import load_checkpoint, save_checkpoint
    from headstart.layers.core import optimal_gradient
    from headstart.layers.export import save_lora
    from headstart.layers.lora_fa import lora_fa_
    from headstart.monitor import Monitor
    from headstart.report import LayerReport, Report
    from headstart.statistics.training import TrainingData

# What needs PEFT and Transformers, which take several times as long as torch, is imported when it is asked for.
_LATER = {
    "LayerReport": "headstart.report",
    "Monitor": "headstart.monitor",
    "Report": "headstart.report",
    "TrainingData": "headstart.statistics.training",
    "allocate_ranks_": "headstart.allocate",
    "initialize_": "headstart.initialize",
    "load_checkpoint": "headstart.layers.checkpoint",
    "lora_fa_": "headstart.layers.lora_fa",
    "optimal_gradient": "headstart.layers.core",
    "save_checkpoint": "headstart.layers.checkpoint",
    "save_lora": "headstart.layers.export",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # All of PEFT before its parts: a part that is imported while another thread imports PEFT may find it half-made.
    importlib.import_module("peft")
    globals()[name] = value = getattr(importlib.import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


_imports.after_peft(peft_steps.extend_peft)
load_plugins()
# Every method is exported by its class's name, so that a new one is one file in headstart.methods.
globals().update(methods_by_class())

__all__ = [
    *sorted(methods_by_class()),
    "CheckpointError",
    "DataError",
    "Factors",
    "Form",
    "HeadstartError",
    "Layer",
    "LayerError",
    "LayerReport",
    "Method",
    "MethodError",
    "ModelError",
    "Monitor",
    "PerLayer",
    "Report",
    "RunError",
    "TaskError",
    "Training",
    "TrainingData",
    "Wants",
    "__version__",
    "allocate_ranks_",
    "get_method",
    "initialize_",
    "load_checkpoint",
    "lora_fa_",
    "method_names",
    "optimal_gradient",
    "register",
    "save_checkpoint",
    "save_lora",
]
