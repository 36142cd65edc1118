"""Every private name of PEFT and of Transformers' trainer that headstart leans on, with what is lost without it.

PEFT may rename what is its own business. A step that :func:`extend` doesn't find as it should be stays as PEFT has it:
a warning says what doesn't work then, and importing headstart, or PEFT, and loading plain adapters go on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headstart.errors import HeadstartWarning


@dataclass(frozen=True)
class Step:
    """One step of PEFT's own that headstart extends.

    Attributes:
        module, path: where it is, such as "peft.utils.hotswap" and "hotswap_adapter_from_state_dict".
        arguments: the names of the arguments that are read.
        without: what is lost where it can't be extended, a sentence.
    """

    module: str
    path: str
    arguments: tuple[str, ...]
    without: str


RESETTING = Step(
    "peft.tuners.lora.layer",
    "LoraLayer.reset_lora_parameters",
    ("self", "adapter_name", "init_lora_weights"),
    "PEFT's own functions can't add or load an adapter with anchors or cores, and say so; headstart.load_checkpoint "
    "can.",
)
LOADING = Step(
    "peft.tuners.lora.model",
    "LoraModel._remap_adapter_state_dict_for_load",
    ("model", "config", "adapter_name", "state_dict"),
    "PEFT's own loading doesn't check the form of an adapter against the model's, and doesn't read what earlier "
    "versions of headstart wrote; headstart.load_checkpoint does.",
)
COMBINING = Step(
    "peft.tuners.lora.model",
    "LoraModel._check_add_weighted_adapter",
    ("self", "adapters"),
    "add_weighted_adapter isn't refused for adapters with anchors or cores, and combines them wrongly.",
)
SWAPPING = Step(
    "peft.utils.hotswap",
    "hotswap_adapter_from_state_dict",
    ("model", "adapter_name"),
    "hotswap_adapter isn't refused for adapters with anchors or cores, and damages them.",
)
MERGING = Step(
    "peft.tuners.lora.model",
    "LoraModel._check_merge_allowed",
    ("self",),
    "merging isn't refused where the weight is another layer's as well (tied weights), and changes that, too.",
)
STEPS = (RESETTING, LOADING, COMBINING, SWAPPING, MERGING)

# Read and not extended; what breaks without each.
READ: Mapping[str, str] = {
    "LoraLayer.lora_variant": "no start with an anchor or a core can be installed",
    "LoraLayer.delete_adapter": "a deleted adapter leaves its form behind",
    "BaseTunerLayer.adapter_layer_names": "a core isn't trained, moved and deleted with its adapter",
    "BaseTunerLayer.other_param_names": "a frozen start isn't moved and deleted with its adapter",
    "BaseTunerLayer.frozen_peft_weight_names": "what a core or LoRA-FA freezes trains again once adapters are switched",
    "BaseTunerLayer._freeze_non_trainable_peft_weights": "a core and LoRA-FA can't freeze anything",
    "BaseTunerLayer._disable_adapters": "data can't be read at the base model",
    "BaseTunerLayer._get_embed_scale": "embeddings can't be started",
    "ParamWrapper._did_swap_in_out_features": "which side of an expert's matrix is its input can't be told",
    "PreTrainedConfig._experts_implementation": "what reaches the experts of a mixture can't be read",
    "Trainer._get_collator_with_removed_columns": "data=trainer can't collate as the trainer does",
}


def lora_variant() -> type[Any]:
    """Return the class of what a LoRA layer computes besides the plain form; ``object`` where this PEFT has none.

    PEFT calls its methods and asks for no more than that it has them.
    """
    return getattr(importlib.import_module("peft.tuners.lora.layer"), "LoraVariant", object)


def find(step: Step) -> tuple[Any, str, Any] | None:
    """Return (holder, name, what is there) of a step, None where this PEFT lacks it or its arguments."""
    *path, name = step.path.split(".")
    try:
        holder: Any = importlib.import_module(step.module)
        for part in path:
            holder = getattr(holder, part)
        attribute = inspect.getattr_static(holder, name)
        parameters = inspect.signature(getattr(attribute, "__func__", attribute)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return (holder, name, attribute) if all(argument in parameters for argument in step.arguments) else None


def extend(step: Step, before: Callable[[dict[str, Any]], None]) -> bool:
    """Let ``before`` run before one of PEFT's steps, once a process; return whether it will.

    Args:
        step: the step.
        before: is given the step's arguments by name, which it may replace.
    """
    place = find(step)
    if place is None:
        import peft  # which takes seconds, and is already there where its steps are extended

        warnings.warn(
            f"PEFT {peft.__version__} has no {step.module}.{step.path} as headstart knows it: {step.without}",
            HeadstartWarning,
            stacklevel=2,
        )
        return False
    holder, name, attribute = place
    function = getattr(attribute, "__func__", attribute)
    if getattr(function, "extended_by_headstart", False):
        return True
    signature = inspect.signature(function)

    @functools.wraps(function)
    def extended(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        before(bound.arguments)
        return function(*bound.args, **bound.kwargs)

    extended.extended_by_headstart = True  # type: ignore[attr-defined]
    setattr(holder, name, classmethod(extended) if isinstance(attribute, classmethod) else extended)
    return True
