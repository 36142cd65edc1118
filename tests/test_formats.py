"""Bases whose weights are no plain numbers: refused by name where the weight is read, usable where it isn't."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torch.nn import functional
from transformers import GptOssConfig
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear, FP8Linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.pytorch_utils import Conv1D

import headstart as hs
from conftest import ANY_BASE, factors_of, perturb, quick, tiny_llama, token_batch, wrap
from headstart.errors import LayerError
from headstart.layers.find import lora_layers
from headstart.layers.formats import format_of, unreadable
from headstart.layers.weights import dense, fingerprint
from headstart.methods import parse_method
from headstart.methods.base import ANY_LAYER

METHODS = [quick(name) for name in ANY_BASE]
READING = [method for method in METHODS if parse_method(method).wants(ANY_LAYER).reads_weight]
OTHERS = [method for method in METHODS if method not in READING]


class Rounded(nn.Linear):
    """A stranger's format: whole numbers of 8 bits and a scale a row."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / step).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.step = nn.Parameter(step, requires_grad=False)

    def numbers(self):
        return self.weight.float() * self.step

    def forward(self, x):
        return functional.linear(x, self.numbers())


def rounded(base):
    """Return a model in that format, and the model that it stands for."""
    twin = copy.deepcopy(base)
    for block, plain in zip(base.model.layers, twin.model.layers, strict=True):
        for part, own in ((block.self_attn, plain.self_attn), (block.mlp, plain.mlp)):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Rounded(child))
                    getattr(own, name).weight.data = getattr(part, name).numbers()
    return base, twin


def fp8(d_out=32, d_in=64):
    """By groups: its weight is no matrix from inputs to outputs."""
    layer = FP8GroupedLinear(d_in, d_out, n_groups=2, block_size=(16, 16))
    layer.weight = nn.Parameter(torch.ones(d_out, d_in).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.full((d_out // 16, d_in // 16), 0.01), requires_grad=False)
    return layer


def fp4():
    """Two numbers a byte in Transformers' FP8 layer, as some checkpoints have them."""
    layer = FP8Linear(64, 32, block_size=(1, 32))
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    return layer


def mxfp4():
    return Mxfp4GptOssExperts(GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=2))


class Subclass(torch.Tensor):
    """A tensor type of a stranger's, such as quantisers put in a weight's place."""


def with_tensors(module, **tensors):
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def with_weight(weight, **tensors):
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return with_tensors(linear, **tensors)


class Packed(nn.Module):
    """A layer without a weight, as GPTQ, AWQ, HQQ and AQLM have."""

    in_features = out_features = 8


BYTES = torch.zeros(4, 4, dtype=torch.uint8)
FOREIGN = {
    "FP8 by groups": (fp8, "FP8 .*FP8GroupedLinear"),
    "FP8 by rows": (lambda: with_tensors(FbgemmFp8Linear(32, 16, False)), "FP8 .*FbgemmFp8Linear"),
    "FP4 in an FP8 layer": (fp4, "int8 codes .*FP8Linear"),
    "MXFP4": (mxfp4, r"a quantised format \(Mxfp4GptOssExperts\)"),
    "FP8, of another kind": (lambda: with_weight(torch.zeros(4, 4).to(torch.float8_e5m2)), "FP8 .*float8_e5m2"),
    "8-bit numbers": (lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8)), "int8 codes"),
    "8-bit numbers and scales": (lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8), weight_scales=BYTES), "int8"),
    "two 4-bit numbers a byte": (lambda: with_weight(BYTES, scales=BYTES), "uint8 codes"),
    "GPTQ": (lambda: with_tensors(Packed(), qweight=BYTES, qzeros=BYTES, g_idx=BYTES), "qweight in its place"),
    "HQQ": (lambda: with_tensors(Packed(), W_q=BYTES), "W_q in its place"),
    "AQLM": (lambda: with_tensors(Packed(), codes=BYTES, codebooks=BYTES), "codes in its place"),
    "compressed-tensors": (lambda: with_tensors(nn.Linear(4, 4), weight_scale=torch.ones(4)), "weight_scale beside it"),
    "packed": (lambda: with_tensors(Packed(), weight_packed=BYTES, weight_shape=BYTES), "weight_packed in its place"),
    "a tensor type": (lambda: with_weight(torch.zeros(4, 4).as_subclass(Subclass)), "a Subclass"),
    "rounded as it runs": (lambda: AutoBitLinear(4, 4, bias=False), "AutoBitLinear"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_known_to_be_numbers_is_not_read(name):
    make, words = FOREIGN[name]
    base = make()
    assert format_of(base)
    with pytest.raises(LayerError, match=f"holds its weight in .*{words}.*load the base model unquantised"):
        dense(base)
    assert fingerprint(base) is None


class Plain(nn.Linear):
    """A model's own subclass, as Falcon and Llama 4 have them."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: Plain(4, 4),
        lambda: Conv1D(4, 4),
        lambda: nn.MultiheadAttention(4, 2).out_proj,
        lambda: with_tensors(nn.Linear(4, 4), steps=torch.zeros(1)),
        *(lambda dtype=dtype: nn.Linear(4, 4, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    ],
)
def test_plain_numbers_are_read(make):
    base = make()
    assert unreadable(base) == ""
    assert torch.equal(dense(base), base.weight)
    assert len(fingerprint(base)) == 8


@pytest.mark.parametrize("method", READING)
def test_methods_that_read_the_weight_name_layer_and_format(method):
    base, _ = rounded(tiny_llama())
    model = wrap(base, target_modules=["q_proj", "down_proj"])
    with pytest.raises(LayerError, match=r"layer 'model.layers.0.self_attn.q_proj' .*int8 codes \(Rounded\)"):
        hs.initialize_(model, method, data=[token_batch()], preserve=[token_batch()], progress=False)


@pytest.mark.parametrize("method", ["pissa", "lora-xs", "inilora"])
def test_fp8_is_refused_with_the_way_to_load_it(method):
    model = get_peft_model(nn.Sequential(fp8()), LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(LayerError, match=r"layer '0' .*FP8.*FineGrainedFP8Config\(dequantize=True\)"):
        hs.initialize_(model, method, progress=False)


@pytest.mark.parametrize("method", ["lora", "init-ab", "init-ab-plus"])
def test_fp8_takes_starts_from_shapes(method):
    model = get_peft_model(nn.Sequential(fp8()), LoraConfig(r=4, target_modules=["0"]))
    plain = get_peft_model(nn.Sequential(nn.Linear(64, 32)), LoraConfig(r=4, target_modules=["0"]))
    for each in (model, plain):
        hs.initialize_(each, method, progress=False)
    for own, other in zip(lora_layers(model, "default"), lora_layers(plain, "default"), strict=True):
        for found, expected in zip(factors_of(own.module), factors_of(other.module), strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)


@pytest.mark.parametrize("method", OTHERS)
def test_methods_that_do_not_read_it_work_as_on_the_model_that_it_stands_for(method, tmp_path):
    base, twin = rounded(tiny_llama())
    batch = token_batch()
    models = [wrap(each, target_modules=["q_proj", "down_proj"]) for each in (base, twin)]
    reports = [hs.initialize_(model, method, data=[batch], preserve=[batch], progress=False) for model in models]
    for own, other in zip(*(lora_layers(model, "default") for model in models), strict=True):
        for found, expected in zip(factors_of(own.module), factors_of(other.module), strict=True):
            assert torch.allclose(found, expected, atol=1e-6), own.name
    assert torch.allclose(models[0](**batch).logits, models[1](**batch).logits, atol=1e-6)
    assert [layer.norm_weight for layer in reports[0].layers] == [None] * 4
    # Neither the table nor JSON has a number that isn't known.
    assert "nan" not in str(reports[0]).lower()
    assert "NaN" not in json.dumps(reports[0].to_dict())
    for model in models:
        perturb(model)
        hs.save_checkpoint(model, tmp_path / str(len(list(tmp_path.iterdir()))))
    # Either's adapter goes on either base: there is no fingerprint to compare with, or none to be compared.
    for folder in ("0", "1"):
        fresh, _ = rounded(tiny_llama())
        loaded = hs.load_checkpoint(fresh, tmp_path / folder)
        assert torch.allclose(loaded(**batch).logits, models[0](**batch).logits, atol=1e-5)


def test_residual_weights_read_it():
    base, _ = rounded(tiny_llama())
    model = wrap(base, target_modules=["q_proj"])
    with pytest.raises(LayerError, match=r"layer 'model.layers.0.self_attn.q_proj' .*int8"):
        hs.initialize_(model, "init-ab", form="residual", progress=False)


@pytest.mark.parametrize("peft_layer", [GPTQLoraLinear, AwqLoraLinear])
def test_a_layer_of_peft_that_only_such_bases_have_is_refused_by_the_format(peft_layer):
    """PEFT has layers of its own for AWQ and the like, into which no start can be put, and for GPTQ's many kernels."""
    config = LoraConfig(r=4, target_modules=["0"])
    config._register_custom_module({Packed: peft_layer})
    packed = with_tensors(Packed(), qweight=BYTES, qzeros=BYTES)
    model = get_peft_model(nn.Sequential(packed, nn.Linear(8, 8)), config)
    for method in ("lora", "pissa"):
        with pytest.raises(
            LayerError, match=r"layer '0' holds its weight in .*qweight.*load the base model unquantised"
        ):
            hs.initialize_(model, method, progress=False)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=4"])
def test_experts_in_mxfp4_are_refused_with_the_way_to_load_them(method):
    base = nn.ModuleDict({"experts": mxfp4()})
    base.config = GptOssConfig()
    model = get_peft_model(base, LoraConfig(r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    with pytest.raises(LayerError, match=r"'experts' .*Mxfp4GptOssExperts.*Mxfp4Config\(dequantize=True\)"):
        hs.initialize_(model, method, data=[token_batch()], progress=False)


class Stack(nn.Module):
    """Experts in one parameter of a tensor type that says it is of numbers, as torchao's do."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 8, 8).as_subclass(Subclass), requires_grad=False)


def test_experts_in_a_tensor_type_are_refused_by_name():
    model = get_peft_model(nn.Sequential(Stack()), LoraConfig(r=4, target_modules=[], target_parameters=["0.w"]))
    with pytest.raises(LayerError, match=r"layer '0' holds its parameter 'w' in a Subclass.*load the base model unqu"):
        hs.initialize_(model, "pissa", progress=False)


def test_awq_is_refused_by_name():
    """As its package has it; PEFT's layer on it asks no form what it computes."""
    awq = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    layer = awq.AwqTorchLinear(4, 32, False, False, 64, 32)
    layer.pack(nn.Linear(64, 32, bias=False), torch.full((32, 2), 0.02), torch.full((32, 2), 8.0))
    model = get_peft_model(nn.Sequential(layer, nn.Linear(32, 2)), LoraConfig(r=4, target_modules=["0"]))
    assert isinstance(model.base_model.model[0], AwqLoraLinear)
    for method in ("lora", "pissa"):
        with pytest.raises(LayerError, match=r"AwqTorchLinear, with \w+ in its place.*load the base model"):
            hs.initialize_(model, method, progress=False)
