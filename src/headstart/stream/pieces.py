"""Making the pieces: one layer's weight read, its factors found and put in a layer of its own, and the result kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from headstart.cache import FileDigests, Store
from headstart.context import Context
from headstart.errors import BASE_PREFIX
from headstart.layers.export import adapter_tensors
from headstart.layers.find import TargetLayer, record
from headstart.layers.install import LayerForm, install, start_note
from headstart.layers.weights import dense, weight_digest
from headstart.methods.base import Method, Moments, Training
from headstart.progress import Show, silent
from headstart.reporting import layer_report
from headstart.solve import solve
from headstart.statistics.gather import Statistics
from headstart.statistics.moments import kind_moments
from headstart.stream.parts import Part
from headstart.stream.skeleton import ADAPTER, Skeleton
from headstart.stream.source import Source


def layer_name(place: int) -> str:
    """Return the name of a layer's finished piece."""
    return f"layer-{place:05d}"


@dataclass
class Maker:
    """What all pieces have in common.

    Attributes:
        source, skeleton: the checkpoint, and the model without its weights.
        method, seed: as the verb was given them.
        form: how the starts live in their layers.
        device: where factors are computed.
        store: where to look factors up and keep them, None for nowhere.
        digests: what is known of the weights' content from before, where there is a store.
        moments: by kind, once they are known.
    """

    source: Source
    skeleton: Skeleton
    method: Method
    form: LayerForm
    seed: int
    device: torch.device
    store: Store | None = None
    digests: FileDigests | None = None
    moments: dict[str, Moments] = field(default_factory=dict)

    def filled(self, layer: TargetLayer) -> TargetLayer:
        """Return a layer like the skeleton's that holds the checkpoint's weight, and zeros for its factors."""
        module = copy.deepcopy(layer.module)
        # As in the model, which the layer was copied out of without its hooks.
        base = module.get_base_layer()
        weight = self.source.read(self.skeleton.keys[f"{layer.name}.weight"]).to(self.device)
        base.weight = nn.Parameter(weight, requires_grad=False)
        for held in (module.lora_A, module.lora_B, getattr(module, "lora_magnitude_vector", {})):
            if ADAPTER in held:
                own: Any = held[ADAPTER]
                zeros = torch.zeros(own.weight.shape, dtype=own.weight.dtype, device=self.device)
                own.weight = nn.Parameter(zeros)
        return ShardLayer(layer.name, module, layer.adapter, self)

    def starts(self, layers: Sequence[TargetLayer], show: Show = silent) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Yield what to keep of each of a few layers of one shape: the adapter's tensors by name, and facts."""
        filled = [self.filled(layer) for layer in layers]
        context = Context(seed=self.seed, show=show)
        statistics = Statistics(layers=tuple(layer.name for layer in filled), moments=self.moments)
        made = solve(self.method, filled, statistics, context, Training(), self.store)
        while filled:
            target = filled.pop(0)
            factors = made.pop(target.name)
            report = layer_report(target, factors, self.form, context)
            holder = _holder(target, self.skeleton.model.peft_config[ADAPTER])
            install(holder, [(target, factors)], self.form, start_note(self.method, self.seed))
            yield (
                adapter_tensors(holder, ADAPTER),
                {
                    "report": asdict(report),
                    "record": record(target),
                    "trainable": target.trainable,
                },
            )

    def digest(self, layer: TargetLayer) -> str:
        """Return the digest of a layer's weight, remembered where that is worth it."""
        weight = dense(layer.module.get_base_layer())
        if self.digests is None:
            return weight_digest(weight)
        key = self.skeleton.keys[f"{layer.name}.weight"]
        digest = self.digests.digest_of(self.source.path(key), key, lambda: weight)
        # The weight was read before: it may not be what the file holds, and the digest is of, by now.
        self.source.check_unchanged(key)
        return digest

    def layer_moments(self, layer: TargetLayer) -> Moments:
        """Return mean and standard deviation of one layer's weight."""
        found = kind_moments([(layer.kind, self.filled(layer).weight())])
        return found[layer.kind]


@dataclass(frozen=True)
class ShardLayer(TargetLayer):
    """A layer whose weight was read from a shard; its content's digest may be known from before."""

    maker: Maker

    def digest(self) -> str:
        """Return the digest of the weight as it is stored."""
        return self.maker.digest(self)


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


def averaged(kinds: Sequence[str], parts: Sequence[Part]) -> dict[str, Moments]:
    """Return each kind's moments from those of its layers, in the model's order, as ``kind_moments`` sums them."""
    found: dict[str, list[Part]] = {}
    for kind, part in zip(kinds, parts, strict=True):
        found.setdefault(kind, []).append(part)
    return {
        kind: Moments(*(sum(part.facts[which] for part in own) / len(own) for which in ("mean", "std")))
        for kind, own in found.items()
    }
