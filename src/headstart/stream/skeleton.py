"""The model without its weights: PEFT resolves targets, ranks and scalings on it, and its names find the tensors."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from headstart.errors import CheckpointError, LayerError, ModelError
from headstart.layers.convolutions import is_convolution
from headstart.layers.experts import is_stack
from headstart.layers.factors import is_embedding
from headstart.layers.find import TargetLayer, check_untied, find_layers, lora_layers, shown
from headstart.layers.matrices import matrices_of
from headstart.layers.weights import adapted_parameter
from headstart.names import in_base
from headstart.stream.source import Source, check_model_folder
from headstart.stream.stored import Group, ModelAsked, Names, StoredStack, check_numbers, stored_names
from headstart.training.wrap import wrap_lora

ADAPTER = "default"


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A PEFT model on the meta device.

    Attributes:
        model: the PEFT model; it holds no numbers.
        targets: PEFT's layers, checked, in the model's order.
        layers: the same as a start sees them, each a matrix.
        keys: the checkpoint's tensor by the model's parameter, for the layers and for heads that are saved beside them.
        stacks: by the model's parameter, how the checkpoint stores those that hold several matrices.
    """

    model: Any
    targets: list[TargetLayer]
    layers: list[TargetLayer]
    keys: dict[str, str]
    stacks: dict[str, StoredStack]


def model_class(folder: Path, config: Any) -> Any:
    """Return the class to build: the causal language model, as it is loaded in memory, else what config.json names.

    Raises:
        ModelError: Transformers has no such class (custom code is not run).
    """
    names = list(config.architectures or [])
    causal: set[str] = set()
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([classes] if isinstance(classes, str) else classes)
    if not causal.isdisjoint(names) or (not names and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForCausalLM
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None or not hasattr(cls, "_from_config"):
        raise ModelError(f"{folder} is a {names[0] if names else config.model_type}, which Transformers doesn't have.")
    return cls


def task_type(folder: Path) -> str | None:
    """Return PEFT's task type for a folder's model: "CAUSAL_LM", or None for any other kind.

    Raises:
        ModelError: it is no folder of a model.
    """
    check_model_folder(folder)
    return "CAUSAL_LM" if model_class(folder, _config(folder)) is AutoModelForCausalLM else None


def build(source: Source, lora: LoraConfig, name: str | None = None) -> Skeleton:
    """Build the model on the meta device, put PEFT's layers on it, and find their tensors in the checkpoint.

    Args:
        source: the checkpoint.
        lora: target modules, ranks and all the rest.
        name: the base model's name for the adapter's config; the folder by default.

    Raises:
        ModelError: the model can't be built.
        LayerError: a target is of a kind that can't be initialised; see ``find_layers``.
        CheckpointError: a target layer's weight is not in the checkpoint, or not as the model holds it.
    """
    for field in ("layer_replication", "trainable_token_indices"):
        if getattr(lora, field, None):
            raise LayerError(f"{field} can't be streamed, because its layers are not the checkpoint's; leave it out.")
    if lora.init_lora_weights not in (True, "gaussian"):
        raise LayerError(
            f"init_lora_weights={lora.init_lora_weights!r} lets PEFT make a start of its own when the adapter is "
            "loaded; leave it out, and give the method by its name."
        )
    if lora.bias != "none":
        raise LayerError(f"bias={lora.bias!r} can't be streamed, which reads weights alone; initialise in memory.")
    config = _config(source.folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source.folder} is a quantised checkpoint; streaming reads whole weights only.")
    dtype = next((entry.dtype for shard in source.shards.values() for entry in shard.entries.values()), None)
    dtype = dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
    cls = model_class(source.folder, config)
    make = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
    try:
        with torch.device("meta"), _silenced():
            base = make(config, dtype=dtype)
            base.tie_weights()
    except Exception as error:  # each architecture raises its own kinds for a config that it can't take
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        raise ModelError(f"The model in {source.folder} can't be built from its config.json ({reason}).") from error
    # PEFT copies the model's name into the adapter's config, from the instance itself.
    base.name_or_path = base.config._name_or_path = name or str(source.folder)
    names = stored_names(base, source)
    asked = ModelAsked(base)
    tied = _tied(base, names.keys)
    with torch.device("meta"), _silenced():
        model = _wrapped(base, lora)
    for target in lora_layers(model, ADAPTER):
        _check_streamed(target)
        # What find_layers looks at: B is zero, a stack of matrices has values, and one number holds either.
        B = target.module.lora_B[ADAPTER]
        B.weight = _zero(B.weight)
        if is_stack(target.module):
            holder, parameter = target.module.get_base_layer(), adapted_parameter(target.module)
            setattr(holder, parameter, _zero(holder.get_parameter(parameter)))
    targets = find_layers(model, ADAPTER)
    check_untied(model, targets, "it is not streamed; leave it out of target_modules, or start the loaded model.")
    keys: dict[str, str] = {}
    stacks: dict[str, StoredStack] = {}
    layouts: set[tuple[object, ...]] = set()
    for target in targets:
        name, shape = parameter_of(target), weight_shape(target)
        if is_stack(target.module) and len(shape) == 3:
            stacks[name] = stack = _stack(name, shape, names, source, asked)
            stack.check()
            if stack.layout not in layouts:
                stack.check_alone()
                layouts.add(stack.layout)
        else:
            keys[name] = _key(target, names.keys, source)
    return Skeleton(model, targets, matrices_of(targets), {**tied, **names.keys, **keys}, stacks)


def parameter_of(target: TargetLayer) -> str:
    """Return the name in the model of the parameter that one of PEFT's layers adapts."""
    return f"{in_base(target.name)}.{adapted_parameter(target.module)}"


def weight_shape(target: TargetLayer) -> tuple[int, ...]:
    """Return the shape of that parameter."""
    return tuple(getattr(target.module.get_base_layer(), adapted_parameter(target.module)).shape)


def _stack(name: str, shape: tuple[int, ...], names: Names, source: Source, model: ModelAsked) -> StoredStack:
    group = names.groups.get(name)
    if group is None and name in names.keys:
        group = Group(None, {"": [names.keys[name]]})
    if group is None:
        raise _missing(name, source)
    return StoredStack(name, shape, group, source, model)


def _check_streamed(target: TargetLayer) -> None:
    if is_convolution(target.module) or is_embedding(target.module):
        what = "a convolution" if is_convolution(target.module) else "an embedding"
        raise LayerError(
            f"layer {target.name!r} is {what}, which is not streamed: leave it out of target_modules, or start the "
            "loaded model."
        )


def _tied(base: Any, names: dict[str, str]) -> dict[str, str]:
    """Return the checkpoint's tensors by the names of parameters that share them with another, as tied heads do."""
    groups: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: names[stored]
        for group in groups.values()
        if (stored := next((name for name in group if name in names), None)) is not None
        for name in group
    }


def _key(target: TargetLayer, names: dict[str, str], source: Source) -> str:
    name = parameter_of(target)
    if (key := names.get(name)) is None:
        raise _missing(shown(target), source)
    check_entry(source, key, weight_shape(target), shown(target))
    return key


def _missing(name: str, source: Source) -> CheckpointError:
    return CheckpointError(
        f"layer {name!r}: {source.folder} has no tensor of its own for its weight (the checkpoint may be fused, "
        "quantised, or lack it); leave the layer out of target_modules or target_parameters, or initialise in memory."
    )


def check_entry(source: Source, key: str, shape: tuple[int, ...], name: str) -> None:
    """Raise CheckpointError unless a tensor has the model's shape and a floating-point type of two bytes and more."""
    entry = source.entry(key)
    if entry.shape != shape:
        raise CheckpointError(
            f"layer {name!r}: tensor {key!r} has shape {entry.shape}, and the model's is {shape}: config.json and "
            "shards don't belong together, or the checkpoint is quantised."
        )
    check_numbers(entry, name)


def _wrapped(base: Any, lora: LoraConfig) -> Any:
    settings = {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora) if field.init}
    targets = settings.pop("target_modules")
    if targets is None:
        return get_peft_model(base, dataclasses.replace(lora))
    return wrap_lora(base, targets if isinstance(targets, str) else sorted(targets), **settings)


def _zero(like: torch.Tensor) -> nn.Parameter:
    """Return zeros of a tensor's shape and type in the memory of one number."""
    return nn.Parameter(torch.zeros((), dtype=like.dtype, device="cpu").expand(like.shape), requires_grad=False)


def _config(folder: Path) -> Any:
    try:
        with _silenced():
            return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # Transformers, the hub library and json each raise their own kinds
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        raise ModelError(f"{folder / 'config.json'} can't be read ({reason}).") from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence Python warnings and Transformers' log."""
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.set_verbosity_error()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
