"""headstart: every serious way to initialise LoRA, behind one verb, for any Hugging Face model.

>>> import headstart as hs
>>> report = hs.initialize_(peft_model, hs.PiSSA())
>>> hs.save_lora(peft_model, "adapter/")
"""

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
from headstart.layers.decay import decay_to_anchor_
from headstart.layers.export import save_lora
from headstart.layers.lora_fa import lora_fa_
from headstart.methods import Factors, LayerInputs, Method, Needs, get_method, method_names, register
from headstart.methods.gradient import LoRAGA, LoRAOne
from headstart.methods.handed import EVA, CorDA, LoftQ, MiCA, PiSSANiter
from headstart.methods.inilora import IniLoRA
from headstart.methods.inilora_random import IniLoRAAlpha, IniLoRABeta
from headstart.methods.lora_da import LoRADA
from headstart.methods.lora_sb import LoRASB
from headstart.methods.lora_xs import LoRAXS
from headstart.methods.nonzero import InitAB, InitABPlus
from headstart.methods.spectral import MiLoRA, OLoRA, PiSSA
from headstart.methods.zero import Gaussian, InitA, InitB, LoRA, Orthogonal
from headstart.report import LayerReport, Report

peft_hooks.register()

__all__ = [
    "EVA",
    "CheckpointError",
    "CorDA",
    "DataError",
    "Factors",
    "Gaussian",
    "HeadstartError",
    "IniLoRA",
    "IniLoRAAlpha",
    "IniLoRABeta",
    "InitA",
    "InitAB",
    "InitABPlus",
    "InitB",
    "LayerError",
    "LayerInputs",
    "LayerReport",
    "LoRA",
    "LoRADA",
    "LoRAGA",
    "LoRAOne",
    "LoRASB",
    "LoRAXS",
    "LoftQ",
    "Method",
    "MethodError",
    "MiCA",
    "MiLoRA",
    "ModelError",
    "Needs",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "PiSSANiter",
    "Report",
    "__version__",
    "decay_to_anchor_",
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
