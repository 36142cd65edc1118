"""What of a model an adapter leaves out; experts of mixtures above all, which a list of linear layers may not name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from headstart.errors import BASE_PREFIX
from headstart.layers.find import TargetLayer
from headstart.layers.quantised import quantised_format
from headstart.names import in_base, kind_of
from headstart.report import LeftOut

_EXPERTS = re.compile(r"(^|_)experts?$")


def left_out(model: nn.Module, layers: Sequence[TargetLayer]) -> LeftOut:
    """Return how many of a model's parameters lie in no layer of the adapter, nor train beside it.

    Args:
        model: the PEFT model.
        layers: those of the adapter.
    """
    added = {id(parameter) for module in model.modules() for parameter in _added(module)}
    # Where a method shares ranks out, a layer may be left without any, and so without the adapter.
    adapted = [layer for layer in layers if layer.trainable]
    reached = {id(parameter) for layer in adapted for parameter in layer.parameters()}
    reached |= {id(layer.module.get_base_layer()) for layer in adapted}
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            reached |= {id(parameter) for parameter in module.original_module.parameters()}
    total, missed = 0, 0
    experts, routers = dict[str, int](), dict[str, int]()
    counted: set[int] = set()
    for path, module in model.named_modules():
        for holder, size, trains in _numbers(module):
            if id(holder) in added or id(holder) in counted:
                continue
            counted.add(id(holder))
            total += size
            if id(holder) in reached or trains:
                continue
            missed += size
            if kind := _experts(path.removeprefix(BASE_PREFIX), module):
                experts[kind] = experts.get(kind, 0) + size
            elif "Router" in type(module).__name__:
                kind = kind_of(in_base(path.removeprefix(BASE_PREFIX)))
                routers[kind] = routers.get(kind, 0) + size
    return LeftOut(missed, total, experts, routers)


def _numbers(module: Any) -> Iterator[tuple[object, int, bool]]:
    """Yield a module's own parameters, how many numbers each stands for, and whether it trains.

    A quantised weight holds fewer numbers than it stands for; where it is no parameter, the module stands for it.
    Scales and the like beside it are none of the model's.
    """
    own: dict[str, nn.Parameter] = dict(module.named_parameters(recurse=False))
    quantised = not isinstance(module, BaseTunerLayer) and quantised_format(module) is not None
    weights = {"weight", "W_q"} if quantised or isinstance(module, nn.Linear) else set[str]()
    whole = module.in_features * module.out_features if weights else 0
    for name, parameter in own.items():
        if not quantised or name in weights | {"bias"}:
            yield parameter, whole if name in weights else parameter.numel(), parameter.requires_grad
    if quantised and not own.keys() & weights:
        yield module, whole, False


def _added(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what PEFT has added to a module: factors, anchors, and copies that train in an original's place."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        originals = {id(parameter) for parameter in module.original_module.parameters()}
        yield from (parameter for parameter in module.parameters() if id(parameter) not in originals)
    elif isinstance(module, BaseTunerLayer):
        for name in (*module.adapter_layer_names, *module.other_param_names):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                yield from part.parameters()


def _experts(path: str, module: nn.Module) -> str:
    """Return the kind of the experts that a module is, or is a part of; empty where it is none."""
    parts = in_base(path).split(".")
    for place, part in enumerate(parts):
        if _EXPERTS.search(part):
            return kind_of(".".join(parts[: place + 1]))
    return kind_of(".".join(parts)) if "Expert" in type(module).__name__ else ""
