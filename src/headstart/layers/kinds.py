"""Which kinds of layers can be initialised, and what is said of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from headstart.errors import LayerError
from headstart.layers.formats import codes_of, format_of, how_to_load
from headstart.layers.quantised import FORMATS, quantised_format, rounds_inputs
from headstart.names import in_base

if TYPE_CHECKING:
    from headstart.layers.find import TargetLayer


def is_dora(module: LoraLayer, adapter: str) -> bool:
    """Return whether the layer splits its weight into magnitude and direction."""
    return adapter in getattr(module, "lora_magnitude_vector", ())


def check_kind(target: TargetLayer) -> None:
    """Refuse a layer that is no linear layer, convolution, embedding or parameter of plain numbers.

    Raises:
        LayerError: it is another; names the layer and what to do.
    """
    base = target.module.get_base_layer()
    if nn.utils.parametrize.is_parametrized(base):
        raise LayerError(
            f"layer {target.name!r} has a parametrised weight (torch.nn.utils.parametrize, as weight norm is), which "
            "is made anew at each call: leave it out, or remove the parametrisation first."
        )
    if isinstance(target.module, ParamWrapper):
        _check_stack(target, target.module)
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        _check_convolution(target, base)
    elif isinstance(target.module, Embedding):
        _check_embedding(target, base)
    else:
        _check_linear(target, base)
    if target.module.lora_bias.get(target.adapter):
        raise LayerError(f"layer {target.name!r} has lora_bias=True, which is not supported; set lora_bias=False.")


def _check_linear(target: TargetLayer, base: Any) -> None:
    """Refuse a layer that is no linear one either, or held in codes that can't be read or trained through."""
    if tensor := rounds_inputs(base):
        raise LayerError(
            f"layer {target.name!r} rounds its inputs as it runs (torchao's {tensor}), so no gradient comes to the "
            "layers before it: quantise the weights alone (Int8WeightOnlyConfig), or load the base model unquantised."
        )
    quantised = quantised_format(base)
    # PEFT's layers on quantised ones can't all be imported where their packages aren't installed.
    supported = isinstance(target.module, Linear) or (
        quantised is not None and type(target.module).__module__ == quantised.peft
    )
    if supported and (quantised is not None or isinstance(base, (nn.Linear, Conv1D))):
        return
    readable = ", ".join(candidate.title for candidate in FORMATS)
    if words := format_of(base):
        raise LayerError(
            f"layer {target.name!r} holds its weight in {words}: {how_to_load(base)}, or in a format that can be read "
            f"({readable})."
        )
    raise LayerError(
        f"layer {target.name!r} is {_article(type(base).__name__)}: only nn.Linear, Conv1D, convolutions, "
        f"nn.Embedding and quantised layers ({readable}) can be initialised; leave it out of target_modules."
    )


def _check_convolution(target: TargetLayer, base: Any) -> None:
    """Refuse a convolution whose adapter is no change of its kernels, or that is held in codes."""
    alike = {"groups": 1, "dilation": (1,) * len(base.kernel_size), "padding_mode": "zeros"}
    for setting, plain in alike.items():
        if getattr(base, setting) != plain:
            raise LayerError(
                f"layer {target.name!r} is a convolution with {setting}={getattr(base, setting)!r}, of which PEFT's "
                "adapter is no change of its kernels; leave it out of target_modules."
            )
    if is_dora(target.module, target.adapter):
        raise LayerError(f"layer {target.name!r} is a convolution that uses DoRA; set use_dora=False, or leave it out.")
    if words := format_of(base):
        raise LayerError(
            f"layer {target.name!r} holds its kernels in {words}: only plain numbers can be initialised; "
            f"{how_to_load(base)}."
        )


def _check_embedding(target: TargetLayer, base: Any) -> None:
    """Refuse an embedding whose adapter is no change of its weight, or that is held in codes."""
    if base.max_norm is not None:
        raise LayerError(
            f"layer {target.name!r} is an embedding with max_norm={base.max_norm!r}, which cuts its rows, and those of "
            "PEFT's adapter for themselves, so that the adapter is no change of its weight; leave it out of "
            "target_modules."
        )
    if base.sparse:
        raise LayerError(
            f"layer {target.name!r} is an embedding with sparse=True, whose adapter PEFT can't train: its gradient "
            "stops where A is turned; set sparse=False, or leave it out of target_modules."
        )
    if type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
        raise LayerError(
            f"layer {target.name!r} is {_article(type(base).__name__)}, which does something else with its input than "
            "look it up, and PEFT's adapter of it doesn't; leave it out of target_modules."
        )
    if is_dora(target.module, target.adapter):
        raise LayerError(f"layer {target.name!r} is an embedding that uses DoRA; set use_dora=False, or leave it out.")
    if words := format_of(base):
        raise LayerError(
            f"layer {target.name!r} holds its rows in {words}: only plain numbers can be initialised; "
            f"{how_to_load(base)}."
        )


def _check_stack(target: TargetLayer, module: ParamWrapper) -> None:
    """Refuse a parameter (of experts, of a router) that is none of plain numbers."""
    base, name = module.get_base_layer(), module.parameter_name
    parameter = module.get_param()
    if words := format_of(base) or codes_of(parameter, type(base).__name__):
        raise LayerError(
            f"layer {in_base(target.name)!r} holds its parameter {name!r} in {words}: only plain numbers can be "
            f"initialised; {how_to_load(base)}."
        )
    if isinstance(parameter, DTensor) or parameter.device.type == "meta":
        where = "is sharded over processes" if isinstance(parameter, DTensor) else "has no values here (meta device)"
        raise LayerError(
            f"layer {in_base(target.name)!r}: its parameter {name!r} {where}, and is started whole "
            "alone: initialise before the model is sharded or offloaded."
        )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOU" else f"a {noun}"
