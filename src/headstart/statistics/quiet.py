"""Running a model without dropout, without chance and without its adapters, and giving it back as it was."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_QUANTISED = ("Params4bit", "Int8Params")
# Rates and switches of chance, as modules and configs name them: dropout, LayerDrop, drop path, SpecAugment, jitter.
_CHANCE = re.compile(r"drop|jitter|mask_(time|feature)_prob|spec_augment")


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Switch chance off within the block, and restore every module's mode and every rate after it.

    The model is put in evaluation mode, and the rates of dropout that modules keep, or read from a config (also one
    within another), are 0. Modules for which gradient checkpointing is on stay in training mode, without which they
    would not do it. Quantised layers are always in training mode: in the other, bitsandbytes may compute with them what
    has no gradient. No keys and values are kept for generation.
    """
    modes = [(module, module.training) for module in model.modules()]
    changed: list[tuple[object, str, object]] = []

    def set_for_now(holder: object, name: str, value: object) -> None:
        changed.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    try:
        model.eval()
        for module in model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
            weight = getattr(module, "weight", None)
            if type(weight).__name__ in _QUANTISED:
                module.training = True
                if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                    module.state_dict()  # saving undoes the reordering for inference
            if isinstance(module, _DROPOUT):
                # Some attention code reads the rate, and asks only whether the model trains.
                set_for_now(module, "p", 0.0)
        for holder in [*model.modules(), *_configs(model)]:
            for name, value in list(vars(holder).items()):
                if _CHANCE.search(name) and isinstance(value, float) and value > 0:
                    set_for_now(holder, name, 0.0)
                elif value is True and ("spec_augment" in name or name == "use_cache"):
                    set_for_now(holder, name, False)
        yield
    finally:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let all of PEFT's layers compute their base layer alone within the block; requires_grad is not touched."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with attribute(layers, "_disable_adapters", True):
        yield


@contextlib.contextmanager
def attribute(holders: Sequence[object], name: str, value: object) -> Iterator[None]:
    """Give an attribute of several objects a value within the block."""
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, value)
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            setattr(holder, name, own)


def active_beside(model: nn.Module, adapter: str) -> list[str]:
    """Return the names of the adapters that are active beside this one, anywhere in the model."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sorted(
        {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters} - {adapter}
    )


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


@contextlib.contextmanager
def drawn_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed all global generators within the block, alike in every process, and put them back as they were.

    Args:
        seed: of PyTorch's, NumPy's and Python's.
        device: the accelerator whose generator is seeded as well; None, or the CPU, for none.
    """
    devices = [] if device is None or device.type == "cpu" else [device]
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _configs(model: nn.Module) -> list[object]:
    """Return the configs that the modules read, and those within them, each once."""
    seen: dict[int, object] = {}

    def add(config: object) -> None:
        if id(config) in seen or not isinstance(getattr(config, "__dict__", None), dict):
            return
        seen[id(config)] = config
        for value in vars(config).values():
            if isinstance(value, PreTrainedConfig):
                add(value)

    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and not isinstance(config, nn.Module | dict):
            add(config)
    return list(seen.values())


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Let a model run as its base model, without chance and without gradients of parameters, within the block."""
    with dropout_off(model), adapters_off(model), frozen(model):
        yield
