"""Finding the layers that an adapter lives in, and refusing what can't be initialised before anything is changed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headstart.errors import BASE_PREFIX, LayerError, nearest, not_finite
from headstart.layers.core import core_of, form_of
from headstart.layers.factors import FACTORS, Factor, attribute_of, by_adapter, factor, is_embedding
from headstart.layers.formats import check_not_tensor_parallel, home, unreadable
from headstart.layers.frozen import frozen_factors
from headstart.layers.kinds import check_kind, is_dora
from headstart.layers.quantised import quantisation
from headstart.layers.unwrap import plain_name
from headstart.layers.weights import adapted_parameter, dense, is_transposed, linear_shape, place, weight_digest
from headstart.linalg.product import product_norm
from headstart.methods.base import Factors, Layer
from headstart.names import in_base, kind_of

_RECORD = "headstart_record"
_RESIDUAL = "headstart_residual_of"
# What is said where weights that are tied would change together.
MERGED_TIED = (
    "merged, its adapter would change both; keep the adapter beside the model, or give each a weight of its own before "
    "merging (tie_word_embeddings=False)."
)


@dataclass(frozen=True)
class TargetLayer:
    """One LoRA layer of one adapter.

    Attributes:
        name: its name in the base model, as errors and checkpoints give it.
        module: PEFT's layer.
        adapter: the adapter's name.
    """

    name: str
    module: LoraLayer
    adapter: str

    @property
    def d_out(self) -> int:
        """The number of outputs."""
        return int(self.module.out_features)

    @property
    def d_in(self) -> int:
        """The number of inputs."""
        return int(self.module.in_features)

    @property
    def r(self) -> int:
        """The adapter's rank in this layer."""
        return int(self.module.r[self.adapter])

    @property
    def scaling(self) -> float:
        """s, the factor in front of B A."""
        return float(self.module.scaling[self.adapter])

    @property
    def trainable(self) -> int:
        """The numbers that train: A, B, and DoRA's magnitude where there is one; of a core layer R alone."""
        if self.adapter not in self.module.r:
            return 0  # a method that shares ranks out left it without one
        if core_of(self.module, self.adapter) is not None:
            return self.r**2
        frozen = frozen_factors(self.module, self.adapter)
        A, B = (width if name not in frozen else 0 for name, width in (("lora_A", self.d_in), ("lora_B", self.d_out)))
        magnitude = self.d_out if is_dora(self.module, self.adapter) else 0
        return self.r * (A + B) + magnitude

    @property
    def device(self) -> torch.device:
        """Where the layer's factors are solved for: on its own device, or the CPU where that has no float64."""
        return place(self.module)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (d_in, d_out), as GPT-2's Conv1D and embeddings do."""
        return is_transposed(self.module)

    @property
    def pattern_key(self) -> str:
        """The name by which PEFT's patterns (``rank_pattern``, ``alpha_pattern``) know the layer."""
        return self.name

    @property
    def sharded(self) -> bool:
        """Whether the weight is sharded over processes, so that all must read it together."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Return the base model's parameters that the layer adapts: the weight, and what stands beside it."""
        return list(self.module.get_base_layer().parameters())

    def stored(self) -> Tensor:
        """Return the weight as it is stored, detached; whole, and dequantised where it has to be.

        Raises:
            LayerError: it can't be read.
        """
        return dense(self.module.get_base_layer(), adapted_parameter(self.module))

    def weight(self) -> Tensor:
        """Return W (d_out, d_in) in float32.

        Raises:
            LayerError: it holds NaN or infinity.
        """
        stored = self.stored()
        weight = (stored.T if self.transposed else stored).to(self.device).float()
        # The extremes are NaN or infinite where any entry is, and need no memory of their own.
        if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(weight)):
            raise not_finite(self.name)
        return weight

    def digest(self) -> str:
        """Return the digest of the weight as it is stored."""
        return weight_digest(self.stored())

    def start_norm(self, factors: Factors) -> float:
        """Return the Frobenius norm of s B A, or of s B R A."""
        if not len(factors.A):
            return 0.0
        B = factors.B if factors.core is None else factors.B @ factors.core
        return self.scaling * product_norm(B, factors.A)

    def without_padding(self, factors: Factors) -> Factors:
        """Return a start as the layer can take it: as it is, but for embeddings with a padding token."""
        return factors

    def facts(self) -> Layer:
        """Return what a method may know of the layer before anything is read."""
        return Layer(
            name=self.name,
            d_out=self.d_out,
            d_in=self.d_in,
            r=self.r,
            scaling=self.scaling,
            dora=is_dora(self.module, self.adapter),
            frozen=frozen_factors(self.module, self.adapter),
            quantised=quantisation(self.module.get_base_layer()),
        )

    @property
    def kind(self) -> str:
        """What layers of one kind share: see :func:`headstart.names.kind_of`."""
        return kind_of(self.name)


def lora_layers(model: nn.Module, adapter: str) -> Iterator[TargetLayer]:
    """Yield all LoRA layers that hold ``adapter``, in the model's order, whatever their type, by their own names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            adapter in module.lora_A or adapter in module.lora_embedding_A or adapter in module.r
        ):
            yield TargetLayer(plain_name(name).removeprefix(BASE_PREFIX), module, adapter)


def resolve_adapter(model: nn.Module, adapter: str | None) -> str:
    """Return the adapter to work on: the one named, else the only active one.

    Raises:
        LayerError: the model holds no LoRA adapter, none of that name, or several active ones and none is named.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise LayerError(
            "the model has no LoRA layer: wrap it first, with peft.get_peft_model(model, LoraConfig(...))."
        )
    if adapter is None:
        active = active_adapters(model)
        if len(active) != 1:
            raise LayerError(
                f"{len(active)} adapters are active ({', '.join(active)}): name the one to work on with adapter=."
            )
        adapter = active[0]
    if adapter not in configs:
        raise LayerError(
            f"the model has no adapter {adapter!r}.{nearest(adapter, configs)} It has: {', '.join(configs)}."
        )
    if not isinstance(configs[adapter], LoraConfig):
        kind = type(configs[adapter]).__name__
        raise LayerError(f"adapter {adapter!r} was made from a {kind}; headstart initialises those of a LoraConfig.")
    return adapter


def find_layers(model: nn.Module, adapter: str) -> list[TargetLayer]:
    """Return the layers to initialise, checked.

    Raises:
        LayerError: there is none, or one is of a kind that can't be initialised (tied kernels or experts, merged
            weights, another LoRA variant than DoRA, split by tensor parallelism, on the meta device), holds a
            trained or already initialised adapter, or has a rank over its smaller side. The message names the layer.
    """
    targets = list(lora_layers(model, adapter))
    if not targets:
        raise LayerError(f"adapter {adapter!r} has no LoRA layer in this model: check its target_modules.")
    check_not_tensor_parallel(model, [(target.name, target.module.get_base_layer()) for target in targets])
    _check_tied(model, targets)
    for target in targets:
        check_kind(target)
        _check_state(target)
        if not target.scaling > 0:
            raise LayerError(f"layer {target.name!r}: its scaling is {target.scaling:g}; set lora_alpha above 0.")
        stack = isinstance(target.module, ParamWrapper)
        d_out, d_in = (target.d_out, target.d_in) if stack else linear_shape(target.module.get_base_layer())
        if target.r > min(d_out, d_in):
            raise LayerError(
                f"layer {shown(target)!r}: rank {target.r} is more than its smaller side, {min(d_out, d_in)} (its "
                f"weight is {d_out} x {d_in}); lower r, or set this layer's in rank_pattern."
            )
    return targets


def shown(target: TargetLayer) -> str:
    """Return a layer's name as errors give it: a parameter's with the parameter, and without what PEFT puts between."""
    parameter = adapted_parameter(target.module)
    name = in_base(target.name)
    return name if parameter == "weight" else f"{name}.{parameter}"


def base_of(model: Any) -> Any:
    """Return the base model inside PEFT's, or the model itself where PEFT's model isn't around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the active adapters of a PEFT model, or of a Transformers model with adapters of its own."""
    active: Any = getattr(model, "active_adapters", None)
    if callable(active):
        # Transformers' own asks for a release of PEFT by number, and then for what any of its layers knows.
        active = next((layer.active_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)), None)
    return list(active or getattr(model, "peft_config", None) or ())


def record(target: TargetLayer) -> dict[str, object] | None:
    """Return what :func:`set_record` noted of a layer, None for one that headstart did not initialise."""
    content = getattr(target.module, _RECORD, {}).get(target.adapter)
    return dict(content) if content is not None else None


def set_record(target: TargetLayer, content: dict[str, object] | None) -> None:
    """Note how a layer was initialised (method, form); None takes the note back."""
    module = target.module
    if not hasattr(module, _RECORD):
        setattr(module, _RECORD, {})
        # So listed, PEFT deletes the note together with the adapter.
        module.other_param_names = (*module.other_param_names, _RECORD)
    if content is None:
        getattr(module, _RECORD).pop(target.adapter, None)
    else:
        getattr(module, _RECORD)[target.adapter] = content


def residual_owner(module: LoraLayer) -> str | None:
    """Return the adapter that made the frozen weight a residual one, None where it is the base model's own."""
    return getattr(module.get_base_layer(), _residual_note(module), None)


def set_residual_owner(module: LoraLayer, adapter: str | None) -> None:
    """Note on the base layer, where it outlives the adapter, that its weight is a residual one."""
    setattr(module.get_base_layer(), _residual_note(module), adapter)


def _residual_note(module: LoraLayer) -> str:
    """Return the attribute that says so; a base layer may hold several parameters that are adapted."""
    parameter = adapted_parameter(module)
    return _RESIDUAL if parameter == "weight" else f"{_RESIDUAL}_{parameter}"


def tied_layers(model: nn.Module, targets: Iterable[TargetLayer]) -> Iterator[tuple[TargetLayer, str]]:
    """Yield the layers whose weight is another's too, with the name of the other, or of the first of them."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append((module, in_base(plain_name(path).removeprefix(BASE_PREFIX))))
    for target in targets:
        base = target.module.get_base_layer()
        weight = getattr(base, adapted_parameter(target.module), None)  # some quantisers' have none
        others = [name for module, name in holders.get(id(weight), ()) if module is not base]
        if others:
            yield target, others[0]


def check_untied(model: nn.Module, targets: Iterable[TargetLayer], why: str) -> None:
    """Raise LayerError, which goes on with ``why``, where a layer shares its weight with another part of the model."""
    for target, other in tied_layers(model, targets):
        raise LayerError(f"layer {shown(target)!r} shares its weight with {other!r} (tied weights): {why}")


def _check_tied(model: Any, targets: Sequence[TargetLayer]) -> None:
    """Refuse tied weights where an adapter of one holder alone has no start, or isn't one of one holder alone."""
    check_untied(
        model,
        (target for target in targets if isinstance(target.module, ParamWrapper | Conv1d | Conv2d | Conv3d)),
        "its gradient is that of both; leave it out of target_modules or target_parameters.",
    )
    if getattr(model.peft_config[targets[0].adapter], "ensure_weight_tying", False):
        check_untied(
            model,
            targets,
            "ensure_weight_tying=True ties their adapters as well, which have no start of their own each; set it to "
            "False, and name one of them in target_modules.",
        )


def _check_state(target: TargetLayer) -> None:
    module, adapter = target.module, target.adapter
    if module.merged:
        raise LayerError(
            f"layer {shown(target)!r} has merged adapters ({', '.join(module.merged_adapters)}): call "
            "model.unmerge_adapter() first."
        )
    owner = residual_owner(module)
    if owner == adapter:
        raise LayerError(
            f"layer {shown(target)!r}: adapter {adapter!r} is already initialised, on a residual weight; to start "
            "anew, load the base model again."
        )
    if owner is not None:
        raise LayerError(
            f"layer {shown(target)!r}: its frozen weight was made residual by adapter {owner!r} and isn't the base "
            "model's any more; load the base model again."
        )
    if record(target) is not None or form_of(module, adapter) is not None:
        raise LayerError(
            f"layer {shown(target)!r}: adapter {adapter!r} is already initialised; to start anew, delete the adapter "
            "(model.delete_adapter) and add it again."
        )
    if adapter in module.lora_variant and not isinstance(module.lora_variant[adapter], DoraLinearVariant):
        variant = type(module.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        raise LayerError(
            f"layer {shown(target)!r} uses PEFT's variant {variant}, which can't be combined with a headstart start; "
            "switch it off in the LoraConfig."
        )
    factors = [by_adapter(module, name)[adapter] for name in FACTORS]
    if any(isinstance(part, nn.Module) and has_offloaded_params(part) for part in factors):
        raise LayerError(
            f"layer {shown(target)!r}: accelerate keeps the factors of adapter {adapter!r} elsewhere (its hooks were "
            "put on after the adapter); initialise the model before cpu_offload, disk_offload or dispatch_model."
        )
    # PEFT draws an embedding's B, and leaves A zero.
    name: Factor = "lora_A" if is_embedding(module) else "lora_B"
    zero = factor(module, adapter, name).detach()
    no_values = zero.device.type == "meta"
    if no_values and home(module.get_base_layer()).type == "meta":
        raise LayerError(f"layer {shown(target)!r} {unreadable(module.get_base_layer())}")
    if not no_values and float(zero.abs().max()) != 0:
        raise LayerError(
            f"layer {shown(target)!r}: {attribute_of(module, name)} of adapter {adapter!r} is not zero, so the adapter "
            "is already trained or initialised; start from a fresh one, made with init_lora_weights=True."
        )
