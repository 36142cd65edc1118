"""Giving an adapter's layers other ranks than they were made with."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from headstart.layers.adapter import exact_pattern
from headstart.layers.find import TargetLayer
from headstart.methods.base import Factors

Starts = Sequence[tuple[TargetLayer, Factors]]


def set_ranks(model: Any, adapter: str, starts: Starts, undo: ExitStack) -> Starts:
    """Give every layer the rank of its factors, in the layer and in the adapter's config; return what is left.

    A layer of rank 0 loses its adapter; where it held no other, PEFT's layer goes and leaves the base layer in its
    place. Nothing happens where all ranks are as they were. PEFT's own ``update_layer`` is not used: it draws new
    factors from torch's generator, and makes them in the base layer's precision, trainable or not as the adapter is
    active.

    Args:
        model: the PEFT model.
        adapter: the adapter's name.
        starts: all of its layers with their factors, not installed yet.
        undo: gets what puts everything back.
    """
    if all(len(factors.A) == layer.r for layer, factors in starts):
        return starts
    for layer, factors in starts:
        rank = len(factors.A)
        if rank == layer.r:
            continue
        undo.callback(_put_back, layer.module, _containers(layer.module))
        if rank:
            _resize(layer, rank, factors)
        else:
            _remove(model, layer, undo)
    left = [(layer, factors) for layer, factors in starts if len(factors.A)]
    config = model.peft_config[adapter]
    undo.callback(model.peft_config.__setitem__, adapter, config)
    # The user's own object may serve other models.
    fitting = copy.copy(config)
    fitting.rank_pattern = exact_pattern({layer.pattern_key: layer.r for layer, _ in left}, config.r)
    alphas = {layer.pattern_key: layer.module.lora_alpha[adapter] for layer, _ in left}
    fitting.alpha_pattern = exact_pattern(alphas, config.lora_alpha)
    removed = [layer.name for layer, factors in starts if not len(factors.A)]
    if removed:
        fitting.exclude_modules = _excluding(config.exclude_modules, removed, [layer.name for layer, _ in left])
    model.peft_config[adapter] = fitting
    return left


def _resize(layer: TargetLayer, rank: int, factors: Factors) -> None:
    module, adapter, before = layer.module, layer.adapter, layer.r
    for container, d_in, d_out in ((module.lora_A, layer.d_in, rank), (module.lora_B, rank, layer.d_out)):
        weight = container[adapter].weight
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False, device=weight.device, dtype=weight.dtype)
        linear.weight.requires_grad_(weight.requires_grad)
        container[adapter] = linear.train(container[adapter].training)
    ratio = math.sqrt(rank / before) if module.use_rslora[adapter] else rank / before
    module.r[adapter] = rank
    if factors.keeps == "scaling":
        module.lora_alpha[adapter] *= ratio
    else:
        module.scaling[adapter] /= ratio


def _remove(model: nn.Module, layer: TargetLayer, undo: ExitStack) -> None:
    module, adapter = layer.module, layer.adapter
    for items in _containers(module):
        if adapter in getattr(module, items):
            getattr(module, items).pop(adapter)
    if adapter in module.frozen_peft_weight_names:
        undo.callback(setattr, module, "frozen_peft_weight_names", module.frozen_peft_weight_names)
        others = {name: frozen for name, frozen in module.frozen_peft_weight_names.items() if name != adapter}
        module.frozen_peft_weight_names = others
    if len(module.r):
        return  # another adapter's
    parents = [
        (parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module
    ]
    for parent, name in parents:
        undo.callback(setattr, parent, name, module)
        setattr(parent, name, module.get_base_layer())


def _containers(module: LoraLayer) -> dict[str, dict[str, Any]]:
    """Return what a layer holds by adapter: the names of its containers, and copies of their items."""
    names = (*module.adapter_layer_names, *module.other_param_names, "lora_variant")
    return {name: dict(getattr(module, name).items()) for name in names}


def _put_back(module: LoraLayer, containers: Mapping[str, Mapping[str, Any]]) -> None:
    for name, items in containers.items():
        container = getattr(module, name)
        container.clear()
        container.update(items)


def _excluding(before: Any, removed: Sequence[str], left: Sequence[str]) -> Any:
    """Return ``exclude_modules`` that leaves out the removed layers as well, and no other."""
    if not isinstance(before, str):
        # PEFT takes a name for the end of one.
        if not any(name.endswith(f".{ending}") for name in left for ending in removed):
            return {*(before or ()), *removed}
        before = "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(before or ()))
    return "|".join(filter(None, (before, *map(re.escape, removed))))
