"""The quantised formats that are read: how each is told, what its codes stand for, and PEFT's layer on it.

A further format is a further entry of ``FORMATS``. What none of them recognises is refused by name
(:mod:`headstart.layers.formats`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn


@dataclass(frozen=True)
class QuantisedFormat:
    """One format.

    Attributes:
        title: it in words, as errors list what can be read.
        recognise: returns for a base layer of the format what its weight is held in ("4-bit", "torchao's Int8Tensor"),
            as errors, warnings and checkpoints say it; None for any other layer.
        dequantise: returns such a layer's weight in the layer's own storage order, by the format's own library
            wherever that has a function for it.
        peft: the module of PEFT that has the LoRA layer for it.
    """

    title: str
    recognise: Callable[[Any], str | None]
    dequantise: Callable[[Any], Tensor]
    peft: str


def quantised_format(base: Any) -> QuantisedFormat | None:
    """Return the format of a base layer, None where its weight is in none that is read."""
    return next((candidate for candidate in FORMATS if candidate.recognise(base)), None)


def quantisation(base: Any) -> str | None:
    """Return what a base layer's weight is held in, such as "4-bit"; None where that is no format that is read."""
    return next((words for candidate in FORMATS if (words := candidate.recognise(base))), None)


def rounds_inputs(base: Any) -> str | None:
    """Return the name of a torchao tensor that rounds the layer's inputs as it runs, which stops every gradient."""
    weight = getattr(base, "weight", None)
    if not _of(weight, "torchao"):
        return None
    settings = (getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return type(weight).__name__ if any(setting is not None for setting in settings) else None


def _of(thing: object, package: str) -> bool:
    """Return whether a class is a package's, which needn't be installed to be told."""
    return type(thing).__module__.partition(".")[0] == package


def _four_bits(base: Any) -> str | None:
    return "4-bit" if type(getattr(base, "weight", None)).__name__ == "Params4bit" else None


def _dequantise_four_bits(base: Any) -> Tensor:
    """On a CPU in evaluation mode, layers are reordered for inference; saving puts them back in order."""
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()
    return dequantize_module_weight(base)


def _eight_bits(base: Any) -> str | None:
    return "8-bit" if type(getattr(base, "weight", None)).__name__ == "Int8Params" else None


def _dequantise_eight_bits(base: Any) -> Tensor:
    """PEFT's function for modules would also put a new weight there, and lose what the next forward pass needs."""
    return dequantize_bnb_weight(base.weight, state=base.state)


# Weight-only, and tested; its other tensors run on some GPUs alone, or are packed for a kernel.
_TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


def _torchao(base: Any) -> str | None:
    weight = getattr(base, "weight", None)
    name = type(weight).__name__
    # With act_pre_scale, the codes stand for a weight whose columns are scaled further.
    plain = rounds_inputs(base) is None and getattr(weight, "act_pre_scale", None) is None
    readable = isinstance(base, nn.Linear) and _of(weight, "torchao") and name in _TORCHAO
    return f"torchao's {name}" if readable and plain else None


def _hqq(base: Any) -> str | None:
    ready = type(base).__name__ == "HQQLinear" and _of(base, "hqq") and base.ready
    return f"HQQ, {base.meta['nbits']}-bit" if ready else None


def _fp8(base: Any) -> str | None:
    """Transformers' own layer, exactly: of its subclass for groups, the weight is no matrix from inputs to outputs."""
    fp8 = type(base).__name__ == "FP8Linear" and type(base).__module__.endswith(".finegrained_fp8")
    return "FP8" if fp8 and base.weight.dtype == torch.float8_e4m3fn else None


def _dequantise_fp8(base: Any) -> Tensor:
    """Return W in float32: each code times the scale of its block, which at the edges may be cut off."""
    weight, scale = base.weight.float(), base.weight_scale_inv.float()
    if base.block_size is None:
        return weight * scale
    for side, length in enumerate(base.block_size):
        scale = scale.repeat_interleave(length, side).narrow(side, 0, weight.shape[side])
    return weight * scale


def _gptq(base: Any) -> str | None:
    """The layer in PyTorch's own operations; those of other kernels hold their codes in an order of their own."""
    plain = type(base).__name__ == "TorchLinear" and _of(base, "gptqmodel") and base.adapter is None
    return f"GPTQ, {base.bits}-bit" if plain else None


FORMATS = (
    QuantisedFormat("bitsandbytes' 4 bits", _four_bits, _dequantise_four_bits, "peft.tuners.lora.bnb"),
    QuantisedFormat("bitsandbytes' 8 bits", _eight_bits, _dequantise_eight_bits, "peft.tuners.lora.bnb"),
    QuantisedFormat("torchao's weight-only ones", _torchao, dequantize_module_weight, "peft.tuners.lora.torchao"),
    QuantisedFormat("HQQ", _hqq, dequantize_module_weight, "peft.tuners.lora.hqq"),
    QuantisedFormat("FP8 with scales of blocks", _fp8, _dequantise_fp8, "peft.tuners.lora.layer"),
    QuantisedFormat("GPTQ in PyTorch", _gptq, lambda base: base.dequantize_weight().T, "peft.tuners.lora.gptq"),
)
