"""Factors that never train, whatever adapter is switched on or off."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.lora.layer import LoraLayer

from headstart.layers.factors import FACTORS, Factor, attribute_of, factor


def freeze_factors(module: LoraLayer, adapter: str, names: Sequence[str]) -> None:
    """Freeze "lora_A" or "lora_B" of a layer, or both, for good: PEFT keeps frozen what it finds listed."""
    listed = tuple(attribute_of(module, name) for name in FACTORS if name in names)
    # A dictionary of its own, not the class's.
    module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter: listed}
    module._freeze_non_trainable_peft_weights(adapter)


def thaw_factors(module: LoraLayer, adapter: str, trained: bool) -> None:
    """Undo :func:`freeze_factors`."""
    names = frozen_factors(module, adapter)
    module.frozen_peft_weight_names = {
        key: value for key, value in module.frozen_peft_weight_names.items() if key != adapter
    }
    for name in names:
        factor(module, adapter, name).requires_grad_(trained)


def frozen_factors(module: LoraLayer, adapter: str) -> tuple[Factor, ...]:
    """Return which of "lora_A" and "lora_B" are frozen for good."""
    listed = module.frozen_peft_weight_names.get(adapter, ())
    return tuple(name for name in FACTORS if attribute_of(module, name) in listed)
