"""Where PEFT's layers hold A and B: as modules in most layers, as parameters of their own in an embedding's."""

from __future__ import annotations

from typing import Any, Literal

from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import nn

Factor = Literal["lora_A", "lora_B"]
FACTORS: tuple[Factor, Factor] = ("lora_A", "lora_B")


def is_embedding(module: LoraLayer) -> bool:
    """Return whether a layer of PEFT's adapts an embedding."""
    return isinstance(module, Embedding)


def attribute_of(module: LoraLayer, name: Factor) -> str:
    """Return the layer's own name for A or B."""
    return name.replace("lora_", "lora_embedding_") if is_embedding(module) else name


def by_adapter(module: LoraLayer, name: Factor) -> Any:
    """Return what a layer holds of A or B, by adapter: modules, or an embedding's parameters."""
    return getattr(module, attribute_of(module, name))


def factor(module: LoraLayer, adapter: str, name: Factor) -> nn.Parameter:
    """Return A (r, d_in) or B (d_out, r) as the layer holds it: of a convolution as kernels, of a stack laid together.

    Of an anchored layer that is the difference to the anchor.
    """
    part = by_adapter(module, name)[adapter]
    parameter: nn.Parameter = part if is_embedding(module) else part.weight
    return parameter


def both(module: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return (A, B) as the layer holds them."""
    return factor(module, adapter, "lora_A"), factor(module, adapter, "lora_B")
