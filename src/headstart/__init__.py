"""headstart: every serious way to initialise LoRA, behind one verb, for any Hugging Face model.

>>> import headstart as hs
>>> report = hs.initialize_(peft_model, hs.PiSSA())
>>> hs.save_lora(peft_model, "adapter/")
"""

from typing import TYPE_CHECKING, Any

from headstart import _imports  # noqa: F401 - before whatever imports PEFT
from headstart._version import __version__
from headstart.errors import (
    CheckpointError,
    DataError,
    HeadstartError,
    LayerError,
    MethodError,
    ModelError,
)
from headstart.initialize import initialize_
from headstart.layers import peft_hooks
from headstart.layers.checkpoint import load_checkpoint, save_checkpoint
from headstart.layers.core import optimal_gradient
from headstart.layers.export import save_lora
from headstart.layers.lora_fa import lora_fa_
from headstart.methods import (
    Factors,
    Form,
    Layer,
    Method,
    Training,
    Wants,
    get_method,
    method_names,
    methods_by_class,
    register,
)
from headstart.methods.registry import load_plugins
from headstart.report import LayerReport, Report
from headstart.statistics.training import TrainingData

peft_hooks.register()

load_plugins()
# Every method is exported by its class's name, so that a new one is one file in headstart.methods.
globals().update(methods_by_class())
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


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
    "Report",
    "Training",
    "TrainingData",
    "Wants",
    "__version__",
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
