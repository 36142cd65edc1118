"""Putting LoRA layers on a model, with PEFT's refusals in words that name the modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from headstart.errors import LayerError, nearest


def accelerator() -> torch.device:
    """Return the device to compute on: the accelerator where there is one, else the CPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def wrap_lora(model: nn.Module, target_modules: str | Sequence[str], **settings: Any) -> Any:
    """Return the PEFT model; ``settings`` are LoraConfig's.

    Raises:
        LayerError: a target module is not in the model; the message gives the nearest names.
    """
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    if not target_modules:
        raise LayerError(f"no target modules are named; the model's linear layers are: {', '.join(sorted(linear))}.")
    if not isinstance(target_modules, str):
        names = [name for name, _ in model.named_modules()]
        for target in target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise LayerError(
                    f"target module {target!r} is not in the model.{nearest(target, linear)} Its linear layers are: "
                    f"{', '.join(sorted(linear))}."
                )
        target_modules = list(target_modules)
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise LayerError(f"target modules {target_modules!r} are no regular expression: {error}.") from error
    try:
        return get_peft_model(model, LoraConfig(target_modules=target_modules, **settings))
    except ValueError as error:
        raise LayerError(
            f"PEFT can't put LoRA layers on {target_modules!r} ({str(error).rstrip('.')}); its linear layers are: "
            f"{', '.join(sorted(linear))}."
        ) from error
