"""Making the pieces: one layer's weight read, its factors found and put in a layer of its own, and the result kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from headstart.cache import FactorCache
from headstart.context import Context
from headstart.errors import BASE_PREFIX
from headstart.layers.checkpoint import record_to_save
from headstart.layers.experts import ExpertLayer, joined
from headstart.layers.export import adapter_tensors
from headstart.layers.find import TargetLayer
from headstart.layers.install import LayerForm, Subtracting, install, start_note
from headstart.layers.parts import Part, by_layer, divide
from headstart.methods.base import Method, Moments, Training
from headstart.reporting import layer_report
from headstart.solve import solve
from headstart.statistics.gather import Statistics
from headstart.statistics.moments import kind_moments
from headstart.stream.experts import narrowed, sampled, targets_of
from headstart.stream.skeleton import ADAPTER, Skeleton, parameter_of
from headstart.stream.source import Source


def layer_name(place: int) -> str:
    """Return the name of a layer's finished piece."""
    return f"layer-{place:05d}"


@dataclass(frozen=True)
class Finished:
    """All that was made.

    Attributes:
        layers: the facts of each layer, by the name of its piece, in the model's order.
        shards: the SHA-256 of each shard of the residual model, none where there is no such model.
    """

    layers: dict[str, dict[str, Any]]
    shards: dict[str, str]


@dataclass
class Maker:
    """What all pieces have in common.

    Attributes:
        source, skeleton: the checkpoint, and the model without its weights.
        method: as the verb was given it.
        subtracting: what becomes of the weights where a start must not change the model.
        device: where factors are computed.
        context: of the start.
        cache: where to look factors up and keep them, None for nowhere.
        moments: by layer, those of its kind, once they are known.
    """

    source: Source
    skeleton: Skeleton
    method: Method
    subtracting: Subtracting
    device: torch.device
    context: Context
    cache: FactorCache | None = None
    moments: dict[str, Moments] = field(default_factory=dict)

    @cached_property
    def parts(self) -> list[Part]:
        """Which method starts which layers."""
        return divide(self.method, self.skeleton.layers)

    @cached_property
    def part_of(self) -> dict[str, Part]:
        """The part of each layer, by name."""
        return by_layer(self.parts)

    @cached_property
    def forms(self) -> dict[str, LayerForm]:
        """How the starts live in their layers, by name, in the model's order."""
        return {layer.name: self.part_of[layer.name].form(self.subtracting) for layer in self.skeleton.layers}

    @property
    def residual(self) -> bool:
        """Whether a start is subtracted from a weight."""
        return "residual" in self.forms.values()

    @cached_property
    def target_forms(self) -> dict[str, LayerForm]:
        """The same of PEFT's layers, of which one may hold several matrices."""
        places = targets_of(self.skeleton.layers)
        return {name: self.forms[self.skeleton.layers[own[0]].name] for name, own in places.items()}

    def filled(self, layer: TargetLayer) -> TargetLayer:
        """Return a layer like the skeleton's that holds the checkpoint's weight, and zeros for its factors."""
        if isinstance(layer, ExpertLayer):
            name = parameter_of(layer.stack)
            stack = self.skeleton.stacks.get(name)
            stored = self.source.read(self.skeleton.keys[name]) if stack is None else stack.read(layer.expert)
            return narrowed(layer, stored.to(self.device))
        module = copy.deepcopy(layer.module)
        # As in the model, which the layer was copied out of without its hooks.
        base = module.get_base_layer()
        weight = self.source.read(self.skeleton.keys[parameter_of(layer)]).to(self.device)
        base.weight = nn.Parameter(weight, requires_grad=False)
        for factors in (module.lora_A, module.lora_B, getattr(module, "lora_magnitude_vector", {})):
            if ADAPTER in factors:
                own: Any = factors[ADAPTER]
                zeros = torch.zeros(own.weight.shape, dtype=own.weight.dtype, device=self.device)
                own.weight = nn.Parameter(zeros)
        return replace(layer, module=module)

    def starts(self, layers: Sequence[TargetLayer]) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Yield what to keep of a few layers of one shape and method: the adapter's tensors by name, and facts."""
        filled = [self.filled(layer) for layer in layers]
        method = self.part_of[layers[0].name].method
        moments = {layer.kind: self.moments[layer.name] for layer in layers if layer.name in self.moments}
        statistics = Statistics(layers=tuple(layer.name for layer in filled), moments=moments)
        solved = solve(method, filled, statistics, self.context, Training(), self.cache)
        for layer in layers:
            target = filled.pop(0)
            factors = solved.pop(target.name)
            report = layer_report(target, factors, method, self.forms[target.name], self.context)
            facts: dict[str, Any] = {"report": asdict(report)}
            if isinstance(layer, ExpertLayer):
                facts["sample"] = sampled(layer, target.stored())
            ((owner, factors),) = joined([(target, factors)])
            holder = _holder(owner, self.skeleton.model.peft_config[ADAPTER])
            install(holder, [(owner, factors)], self.target_forms, {owner.name: start_note(method, self.context.seed)})
            facts |= {"record": record_to_save(owner), "trainable": owner.trainable}
            yield own_tensors(holder, owner), facts

    def layer_moments(self, layer: TargetLayer) -> Moments:
        """Return mean and standard deviation of one layer's weight."""
        return kind_moments([(layer.kind, self.filled(layer).weight())])[layer.kind]


def own_tensors(holder: nn.Module, owner: TargetLayer) -> dict[str, Tensor]:
    """Return the tensors of one of PEFT's layers, without those of another that lies within it."""
    tensors = adapter_tensors(holder, ADAPTER)
    prefix = f"{BASE_PREFIX}{owner.name}.lora_"
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _holder(target: TargetLayer, config: LoraConfig) -> Any:
    """Return a model of this one layer, under the names that it has in the whole one."""
    holder: Any = nn.Module()
    holder.peft_config = {target.adapter: config}
    at = holder
    *path, last = f"{BASE_PREFIX}{target.name}".split(".")
    for name in path:
        at.add_module(name, nn.Module())
        at = getattr(at, name)
    at.add_module(last, target.module)
    return holder


def averaged(kinds: Sequence[str], facts: Sequence[Mapping[str, float]]) -> dict[str, Moments]:
    """Return each kind's moments from those of its layers, in the model's order, as ``kind_moments`` sums them."""
    by_kind: dict[str, list[Mapping[str, float]]] = {}
    for kind, layer in zip(kinds, facts, strict=True):
        by_kind.setdefault(kind, []).append(layer)
    return {
        kind: Moments(*(sum(layer[which] for layer in own) / len(own) for which in ("mean", "std")))
        for kind, own in by_kind.items()
    }
