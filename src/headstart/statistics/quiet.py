"""Running a model without dropout and without its adapters, and giving it back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_QUANTISED = ("Params4bit", "Int8Params")


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the block, and restore every module's mode after it.

    The model is put in evaluation mode, except that gradient checkpointing, where it is on, only works in training
    mode: then the model trains, with all dropout modules off and all dropout rates that modules keep at 0. Quantised
    layers are always in training mode: in the other, bitsandbytes may compute with them what has no gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    try:
        model.train(checkpointing)
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if type(weight).__name__ in _QUANTISED:
                module.training = True
                if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                    module.state_dict()  # saving undoes the reordering for inference
        if checkpointing:
            for module in model.modules():
                if isinstance(module, _DROPOUT):
                    module.eval()
                    # Some attention code reads the rate, and asks only whether the model trains.
                    rates.append((module, "p", module.p))
                    module.p = 0.0
                    continue
                for name, value in list(vars(module).items()):
                    if "drop" in name and isinstance(value, float) and value > 0:
                        rates.append((module, name, value))
                        setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def adapters_off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Let these LoRA layers compute their base layer alone within the block; requires_grad is not touched."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch requires_grad off for all parameters within the block, so that backward computes no gradient of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
