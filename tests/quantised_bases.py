"""Tiny bases in each quantised format that is read, beside bitsandbytes', and what their codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8

from conftest import tiny_llama

# Widths that blocks and groups divide.
WIDE = dict(hidden_size=64, intermediate_size=128)
GROUP = 32


def torchao_base(config):
    def make(folder, dtype):
        from torchao import quantization
        from transformers import TorchAoConfig

        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=TorchAoConfig(config(quantization)), device_map={"": "cpu"}, dtype=dtype
        )

    return make


def replaced(make_layer):
    """A model whose linear layers, but for the head, are replaced one by one."""

    def make(folder, dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, make_layer(module))
        return model

    return make


def hqq_layer(bits, **settings):
    def make(linear):
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, **settings)
        return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu", del_orig=True)

    return make


def fp8_layer(linear, block_size=(16, 32), scale_fmt="float"):
    """By blocks, those at the edges cut off where the sides aren't whole numbers of them."""
    d_out, d_in = linear.weight.shape
    rows, columns = block_size or (d_out, d_in)
    layer = finegrained_fp8.FP8Linear(
        d_in, d_out, block_size=block_size, scale_fmt=scale_fmt, has_bias=linear.bias is not None
    )
    layer.bias = linear.bias
    W = linear.weight.detach().float()
    padded = functional.pad(W, (0, -d_in % columns, 0, -d_out % rows))
    largest = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3))
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    if scale_fmt == "ue8m0":
        scale = scale.log2().ceil().exp2()
    spread = scale.repeat_interleave(rows, 0)[:d_out].repeat_interleave(columns, 1)[:, :d_in]
    layer.weight = nn.Parameter((W / spread).to(torch.float8_e4m3fn), requires_grad=False)
    scale = scale.reshape(()) if block_size is None else scale
    layer.weight_scale_inv = nn.Parameter(scale.to(layer.weight_scale_inv.dtype), requires_grad=False)
    return layer


def fp8_kernel(x, weight, weight_scale_inv, block_size=None, bias=None, *_):
    """What Transformers' kernel computes, which comes from the hub and wants a GPU; inputs aren't rounded here."""
    W = finegrained_fp8._dequantize_fp8_weight(weight, weight_scale_inv, block_size, x.dtype)
    return functional.linear(x, W, bias)


def gptq_layer(linear, bits=4, order=None):
    """Rounded to the nearest in groups of inputs, which ``order`` (d_in,) mixes as activations' order does."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    d_out, d_in = linear.weight.shape
    W = linear.weight.detach().float()
    group_of = torch.arange(d_in) // GROUP if order is None else order
    by_group = torch.stack([W[:, group_of == group] for group in range(d_in // GROUP)], 1)
    low, high = by_group.amin(2).clamp(max=0), by_group.amax(2).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    layer = TorchLinear(bits, GROUP, False, order is not None, d_in, d_out, bias=linear.bias is not None)
    layer.pack_original(linear.float(), scales, (-low / scales).round(), group_of.int())
    layer.post_init()
    return layer


@dataclass(frozen=True)
class Way:
    """A format.

    Attributes:
        package: that makes it.
        make: returns a model of a folder in it, in a floating-point type.
        words: what is said of it.
        library: returns what a layer's codes stand for, by the format's own library.
        step: the largest error of rounding, of the largest entry.
        dtype: of the model in which it computes exactly as a plain layer of what it stands for does.
    """

    package: str
    make: Callable
    words: str
    library: Callable
    step: float
    dtype: torch.dtype = torch.float32


def by_torchao(base):
    return base.weight.dequantize()


def by_transformers(base):
    return finegrained_fp8._dequantize_fp8_weight(base.weight, base.weight_scale_inv, base.block_size, torch.float64)


WAYS = {
    "torchao int8": Way(
        "torchao", torchao_base(lambda ao: ao.Int8WeightOnlyConfig()), "torchao's Int8Tensor", by_torchao, 0.5 / 127
    ),
    "torchao int4": Way(
        "torchao",
        torchao_base(lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))),
        "torchao's IntxUnpackedToInt8Tensor",
        by_torchao,
        0.5 / 7,
    ),
    "torchao float8": Way(
        "torchao", torchao_base(lambda ao: ao.Float8WeightOnlyConfig()), "torchao's Float8Tensor", by_torchao, 1 / 16
    ),
    "HQQ 4": Way("hqq", replaced(hqq_layer(4, axis=1)), "HQQ, 4-bit", lambda base: base.dequantize(), 0.2),
    "HQQ 8": Way("hqq", replaced(hqq_layer(8, axis=0)), "HQQ, 8-bit", lambda base: base.dequantize(), 0.02),
    "FP8": Way("torch", replaced(fp8_layer), "FP8", by_transformers, 1 / 16),
    "GPTQ": Way(
        "gptqmodel", replaced(gptq_layer), "GPTQ, 4-bit", lambda base: base.dequantize_weight().T, 0.2, torch.float16
    ),
}
FORMATS = [
    pytest.param(
        name, marks=pytest.mark.skipif(find_spec(way.package) is None, reason=f"{way.package} is not installed")
    )
    for name, way in WAYS.items()
]


def base_folder(path):
    tiny_llama(**WIDE).save_pretrained(path)
    return path
