"""Any start at any width: made by the verb on a model of one layer, as a user would make it."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from headstart.dynamics.theory import Scheme
from headstart.dynamics.widths import Layer, Maker, Settings, Wide
from headstart.errors import MethodError
from headstart.initialize import initialize_
from headstart.layers.anchored import anchors, current_factors
from headstart.methods import Method

_ADAPTER, _LAYER = "default", "middle"
# Data points of a start that doesn't say how many it reads.
_SAMPLES = 32


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class OneLayer(nn.Module):
    """f(z) = mean(w relu(W_0 z)), with W_0 (n, n) of entries of order n^(-1/2).

    Args:
        width: n.
        generator: draws W_0 and w.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.middle = nn.Linear(width, width, bias=False)
        self.middle.weight.data = _normal(width, width, generator=generator) / math.sqrt(width)
        self.out = _normal(width, generator=generator)
        self.config = {"model_type": "one layer"}  # which PEFT looks for

    def forward(self, z: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the outputs (count, 1) for inputs (count, n), and half their mean squared error."""
        logits = (self.out * self.middle(z).relu()).mean(dim=-1)
        return {"loss": (logits - labels).square().mean() / 2, "logits": logits[:, None]}


def of_method(method: Method, settings: Settings) -> Maker:
    """Return what makes layers with a method's start; the scheme's own sizes are not read.

    Raises:
        MethodError: the method trains a core, whose A and B stand still.
    """
    if method.form == "core":
        raise MethodError(f"{method.name} trains a core between A and B, which the theory does not speak of.")

    def make(scheme: Scheme, width: int, generator: torch.Generator) -> tuple[Layer, Tensor, Tensor]:
        base = OneLayer(width, generator)
        count = int(getattr(method, "samples", None) or _SAMPLES)
        points = _normal(count, width, generator=generator)
        data = [{"z": points, "labels": points.new_ones(count)}]
        config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=[_LAYER])
        model: Any = get_peft_model(base, config)
        seed = generator.initial_seed() % 2**31
        initialize_(model, method, data=data, seed=seed, cache=False, progress=False)
        layer = model.base_model.model.middle
        A, B = (part.double() for part in current_factors(layer, _ADAPTER))
        z = points[0].double()
        frozen = layer.get_base_layer().weight.detach().double() @ z
        if (anchor := anchors(layer, _ADAPTER)) is not None:
            A0, B0 = (part.detach().double() for part in anchor)
            frozen = frozen - B0 @ (A0 @ z)
        return Wide(z, frozen, base.out.double()), A.clone(), B.clone()

    return make
