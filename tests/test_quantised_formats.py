"""Starts on bases in the quantised formats that are read, beside bitsandbytes' (test_quantised.py)."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8

import headstart as hs
from conftest import all_factors, factors_of, perturb, quick, tiny_llama, token_batch, wrap
from headstart.errors import HeadstartWarning, LayerError
from headstart.layers.find import lora_layers
from headstart.layers.formats import unreadable
from headstart.layers.quantised import quantisation
from headstart.layers.weights import dense
from inputs import normal
from oracles import relative, tail
from quantised_bases import FORMATS, WAYS, WIDE, base_folder, fp8_kernel, fp8_layer, gptq_layer, hqq_layer, replaced

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of each form.
METHODS = ["pissa", "lora-xs", "init-ab-plus"]
# One for all that a start can read, on formats that tests/supported.py can't make.
FAMILIES = [*METHODS, "init-ab", "corda", "lora-one", "lora-da"]
EVERY_START = [
    pytest.param(*name.values, method, marks=name.marks)
    for name in FORMATS
    for method in (FAMILIES if name.values[0] in ("FP8", "GPTQ") else METHODS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_kernel)


def quantised(folder, name, dtype=None):
    return WAYS[name].make(folder, dtype or WAYS[name].dtype)


def plain(folder, name):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=WAYS[name].dtype)


def wrapped(base, **changes):
    """PEFT's "all-linear" knows no HQQ or GPTQ layer."""
    return wrap(base, **(dict(target_modules=LAYERS) | changes))


def dense_copy(base, folder, name):
    """A model of plain numbers, those that the quantised ones stand for."""
    twin = plain(folder, name)
    for layer, module in base.named_modules():
        if quantisation(module):
            twin.get_submodule(layer).weight.data = dense(module).to(WAYS[name].dtype)
    return twin


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def eps(name):
    return torch.finfo(WAYS[name].dtype).eps


# What the codes stand for.


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_that_is_read_is_the_librarys_and_what_the_layer_computes_with(folder, name):
    way, stored = WAYS[name], tiny_llama(**WIDE)
    for layer, module in quantised(folder, name).named_modules():
        if layer.rpartition(".")[2] not in LAYERS:
            continue
        assert quantisation(module) == way.words
        W = dense(module)
        assert W.shape == (module.out_features, module.in_features)
        torch.testing.assert_close(W.double(), way.library(module).double(), rtol=2**-23, atol=0)
        computed = module(torch.eye(module.in_features, dtype=way.dtype)).T
        torch.testing.assert_close(W.to(way.dtype), computed.detach(), rtol=4 * eps(name), atol=1e-7)
        exact = stored.get_submodule(layer).weight
        assert 0 < (W - exact).abs().max() <= way.step * exact.abs().max()


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block_size", [(16, 32), (7, 5), (64, 64), None])
def test_fp8_is_each_code_times_the_scale_of_its_block(block_size, scale_fmt):
    """Entry by entry, where blocks are cut off at the edges too."""
    torch.manual_seed(0)
    layer = fp8_layer(nn.Linear(48, 32), block_size, scale_fmt)
    codes, scales = layer.weight.double(), torch.atleast_2d(layer.weight_scale_inv.double())
    rows, columns = block_size or (32, 48)
    expected = torch.tensor(
        [[codes[i, j] * scales[i // rows, j // columns] for j in range(48)] for i in range(32)], dtype=torch.float64
    )
    assert torch.equal(dense(layer), expected.float())


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_is_what_transformers_loads_dequantised(scale_fmt):
    torch.manual_seed(0)
    layer = fp8_layer(nn.Linear(64, 32), scale_fmt=scale_fmt)
    loaded = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(layer.weight, layer.weight_scale_inv, torch.float32)
    assert torch.equal(dense(layer), loaded)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq_of_any_number_of_bits_is_what_the_layer_computes_with(bits, axis):
    pytest.importorskip("hqq")
    torch.manual_seed(0)
    layer = hqq_layer(bits, axis=axis)(nn.Linear(64, 32, bias=False))
    assert quantisation(layer) == f"HQQ, {bits}-bit"
    torch.testing.assert_close(dense(layer), layer(torch.eye(64)).T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mixed", [False, True])
def test_gptq_with_or_without_the_activations_order_is_what_the_layer_computes_with(bits, mixed):
    pytest.importorskip("gptqmodel")
    torch.manual_seed(0)
    order = torch.randperm(64) // 32 if mixed else None
    layer = gptq_layer(nn.Linear(64, 32, bias=False), bits, order)
    assert quantisation(layer) == f"GPTQ, {bits}-bit"
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(dense(layer), layer(torch.eye(64, dtype=torch.float16)).T)


# Starts.


@pytest.mark.parametrize(("name", "method"), EVERY_START)
def test_every_start_leaves_or_moves_the_quantised_base_as_it_says(folder, name, method):
    base, batch = quantised(folder, name), token_batch()
    before = logits(base, batch)
    weights = {layer: dense(module).clone() for layer, module in base.named_modules() if quantisation(module)}
    assert len(weights) == 14
    model = wrapped(base)
    report = hs.initialize_(model, quick(method), data=[batch], preserve=[batch], progress=False)
    moves = any(layer.norm_product > 0 and layer.form in ("kept", "core") for layer in report.layers)
    if not moves or WAYS[name].dtype == torch.float32:  # half precision doesn't show the smallest moves
        assert torch.equal(before, logits(model, batch)) == (not moves)
    for target in lora_layers(model, "default"):
        assert torch.equal(dense(target.module.get_base_layer()), weights[target.name]), target.name
    model.train()(**batch).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", ["pissa", "lora-da:samples=4"])
def test_the_factors_are_those_of_the_dequantised_model(folder, name, method):
    compare_with_the_dequantised_model(folder, name, method)


@pytest.mark.parametrize("name", FORMATS[:1])
@pytest.mark.parametrize("method", ["olora", "lora-xs", "lora-one:samples=4", "lora-sb:samples=4,lr=0.001"])
def test_so_are_those_of_other_methods(folder, name, method):
    compare_with_the_dequantised_model(folder, name, method)


def compare_with_the_dequantised_model(folder, name, method):
    base, batch = quantised(folder, name), token_batch()
    twin, model = wrapped(dense_copy(base, folder, name)), wrapped(base)
    reports = [hs.initialize_(side, method, data=[batch], progress=False) for side in (model, twin)]
    # What a layer computes differs in its last digits, by which starts from data may differ more.
    close = (1e-2 if ":" in method else 1e-4) if WAYS[name].dtype == torch.float32 else 0.1
    for own, other in zip(*(lora_layers(side, "default") for side in (model, twin)), strict=True):
        added = []
        for target in (own, other):
            A, B = (factor.double() for factor in factors_of(target.module))
            core = getattr(target.module, "lora_core", None)
            added.append(B @ (A if core is None else core["default"].weight.detach().double() @ A))
        assert relative(*added) < close, own.name
    for lines in zip(*(report.layers for report in reports), strict=True):
        assert lines[0].norm_weight == pytest.approx(lines[1].norm_weight, rel=1e-3)


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4", "torchao float8", "HQQ 4"])
@pytest.mark.parametrize("method", ["pissa", "lora-one:samples=4"])
def test_in_bfloat16_an_anchored_start_is_the_base_bit_for_bit(folder, name, method):
    pytest.importorskip(WAYS[name].package)
    base, batch = quantised(folder, name, torch.bfloat16), token_batch()
    before = logits(base, batch)
    model = wrapped(base)
    hs.initialize_(model, method, form="anchored", data=[batch], progress=False)
    assert before.dtype == torch.bfloat16
    assert torch.equal(before, logits(model, batch)) == (method == "pissa")


@pytest.mark.parametrize("name", FORMATS)
def test_residual_weights_are_refused(folder, name):
    model = wrapped(quantised(folder, name))
    with pytest.raises(LayerError, match=f"is quantised \\({WAYS[name].words}\\).*anchored"):
        hs.initialize_(model, "pissa", form="residual", progress=False)


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_counts_the_numbers_that_codes_stand_for(folder, name):
    if name == "GPTQ":
        pytest.skip("its codes are no parameters")
    counts = []
    for base in (quantised(folder, name), plain(folder, name)):
        model = wrapped(base, target_modules=["q_proj", "v_proj"])
        counts.append(hs.initialize_(model, "pissa", progress=False).left_out)
    scales = 0
    for module in quantised(folder, name).modules():
        scale = getattr(module, "weight_scale_inv", None)
        scales += 0 if scale is None else scale.numel()
    assert counts[1].total <= counts[0].total <= counts[1].total + scales
    assert counts[0].parameters >= counts[1].parameters > 0


@pytest.mark.parametrize("name", FORMATS)
def test_loftq_gives_back_what_quantisation_took(folder, name):
    model = wrapped(quantised(folder, name))
    hs.initialize_(model, hs.LoftQ(model_path=str(folder)), progress=False)
    stored = tiny_llama(**WIDE)
    for target in lora_layers(model, "default"):
        E = stored.get_submodule(target.name).weight.detach().double() - dense(target.module.get_base_layer()).double()
        A, B = (factor.double() for factor in factors_of(target.module))
        assert float((E - target.scaling * B @ A).square().sum()) == pytest.approx(tail(E, target.r), rel=1e-2)


# Saved, loaded, merged.


def moved(folder, name, method, **changes):
    """A started model, a little away from its start."""
    model = wrapped(quantised(folder, name), **changes)
    hs.initialize_(model, method, progress=False)
    perturb(model)
    for target in lora_layers(model, "default"):
        core = getattr(target.module, "lora_core", None)
        if core is not None:
            core["default"].weight.data += 0.5 * normal(target.r, target.r).float()
    return model


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_comes_back_exported_or_as_a_checkpoint(folder, name, method, tmp_path):
    batch = token_batch()
    model = moved(folder, name, method)
    expected = logits(model, batch)
    hs.save_lora(model, tmp_path / "lora")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    exported = PeftModel.from_pretrained(quantised(folder, name), tmp_path / "lora")
    torch.testing.assert_close(logits(exported, batch), expected, atol=20 * eps(name), rtol=20 * eps(name))
    loaded = hs.load_checkpoint(quantised(folder, name), tmp_path / "checkpoint")
    assert torch.equal(logits(loaded, batch), expected)
    # PEFT alone builds the form from the config.
    by_peft = PeftModel.from_pretrained(quantised(folder, name), tmp_path / "checkpoint", is_trainable=True)
    assert torch.equal(logits(by_peft, batch), expected)


@pytest.mark.parametrize("name", [part for part in FORMATS if part.values[0] not in ("FP8", "GPTQ")])
@pytest.mark.parametrize("method", METHODS)
def test_merging_requantises_base_and_adapter_together(folder, name, method):
    model = moved(folder, name, method)
    wanted, before = {}, {}
    for target in lora_layers(model, "default"):
        module, variant = target.module, target.module.lora_variant.get("default")
        added = module.get_delta_weight("default") if variant is None else variant.delta(module, "default")
        before[target.name] = dense(module.get_base_layer())
        wanted[target.name] = before[target.name] + added.detach()
    model.merge_adapter()
    for target in lora_layers(model, "default"):
        merged, exact = dense(target.module.get_base_layer()), wanted[target.name]
        assert quantisation(target.module.get_base_layer()) == WAYS[name].words
        assert (merged - exact).abs().max() <= WAYS[name].step * exact.abs().max(), target.name
        # Nearer to what it should be than to what it was.
        assert (merged - exact).norm() < (before[target.name] - exact).norm(), target.name


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_merged_into_fp8_codes(folder, method):
    model = moved(folder, "FP8", method)
    weights = {target.name: target.module.get_base_layer().weight for target in lora_layers(model, "default")}
    before = {name: weight.view(torch.uint8).clone() for name, weight in weights.items()}
    formed = method != "init-ab-plus"  # into a kept start's layer, PEFT itself merges
    for safe in (False, True):
        with pytest.raises(
            LayerError if formed else RuntimeError, match="merge it into the unquantised base" if formed else "Float8"
        ):
            model.merge_adapter(safe_merge=safe)
    for name, weight in weights.items():
        assert torch.equal(weight.view(torch.uint8), before[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_merged_into_gptq(folder, method):
    pytest.importorskip("gptqmodel")
    model = moved(folder, "GPTQ", method)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises((NotImplementedError, ValueError)):
            merge()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("to", ["unquantised", "quantised"])
def test_a_checkpoint_of_a_quantised_base_goes_on_the_other_one_with_a_warning_and_merges(folder, name, to, tmp_path):
    here, there = quantised(folder, name), plain(folder, name)
    if to == "quantised":
        here, there = there, here
    same = copy.deepcopy(here) if to == "quantised" else quantised(folder, name)
    model = wrapped(here, target_modules=["q_proj", "v_proj"])
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    words = [f"held in {WAYS[name].words.replace('-bit', ' bits')}", "not quantised"]
    made, met = words if to == "unquantised" else reversed(words)
    with pytest.warns(HeadstartWarning, match=f"made on a base model that is {made}, and this one is {met}") as seen:
        loaded = hs.load_checkpoint(there, tmp_path / "c")
    assert len([warning for warning in seen if issubclass(warning.category, HeadstartWarning)]) == 1
    for pair in zip(all_factors(model).values(), all_factors(loaded).values(), strict=True):
        assert all(torch.equal(*factors) for factors in zip(*pair, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        hs.load_checkpoint(loaded, tmp_path / "c", check_base=False)
        hs.load_checkpoint(same, tmp_path / "c")
    if to == "unquantised":
        batch = token_batch()
        before = logits(loaded, batch)
        torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), before, atol=0.01, rtol=20 * eps(name))


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_counts_what_the_codes_stand_for(folder, name):
    targets = ["q_proj", "v_proj"]
    counts = [
        hs.initialize_(wrapped(base, target_modules=targets), "lora", progress=False).left_out
        for base in (quantised(folder, name), plain(folder, name))
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", FORMATS)
def test_another_base_is_refused_quantised_or_not(folder, name, tmp_path):
    model = wrapped(quantised(folder, name), target_modules=["q_proj", "v_proj"])
    hs.save_checkpoint(model, tmp_path / "c")
    other = tiny_llama(**WIDE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    words = WAYS[name].words.replace("-bit", " bits")
    with pytest.raises(hs.CheckpointError, match=f"other weights.*held in {words}.*check_base=False"):
        hs.load_checkpoint(other, tmp_path / "c")
    hs.load_checkpoint(other, tmp_path / "c", check_base=False)


def test_what_is_quantised_too_coarsely_to_be_told_goes_on_its_base_when_it_is_said_to(folder, tmp_path):
    pytest.importorskip("hqq")
    base = replaced(hqq_layer(1, axis=1))(folder, torch.float32)
    model = wrapped(base, target_modules=["q_proj", "v_proj"])
    hs.save_checkpoint(model, tmp_path / "c")
    with pytest.raises(
        hs.CheckpointError, match=r"held in HQQ, 1 bits, and this one is not quantised.*check_base=False"
    ):
        hs.load_checkpoint(plain(folder, "HQQ 4"), tmp_path / "c")
    hs.load_checkpoint(plain(folder, "HQQ 4"), tmp_path / "c", check_base=False)


# What is refused.


@pytest.mark.parametrize("config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=4"])
def test_torchao_layers_that_round_their_inputs_are_refused_as_no_gradient_comes_through(config, method):
    quantization = pytest.importorskip("torchao.quantization")
    base = tiny_llama(**WIDE)
    quantization.quantize_(base.model, getattr(quantization, config)())
    x = torch.randn(3, 64, requires_grad=True)
    layer = base.model.layers[0].mlp.up_proj
    (layer(x) + x.sum()).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3 * 128))  # of the second summand alone
    with pytest.warns(UserWarning, match="get_apply_tensor_subclass"):
        model = wrapped(base)
    with pytest.raises(LayerError, match=r"'model.layers.0.self_attn.q_proj' rounds its inputs.*Int8WeightOnly"):
        hs.initialize_(model, method, data=[token_batch()], progress=False)


@pytest.mark.parametrize("kind", ["NF4", "scaled further", "an embedding"])
def test_what_else_torchao_has_is_refused_by_name(kind):
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Linear(256, 64, bias=False)
    if kind == "NF4":
        base.weight = nn.Parameter(quantization.to_nf4(base.weight.detach(), 64, 256), requires_grad=False)
    elif kind == "scaled further":
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
        assert not unreadable(base)
        base.weight.act_pre_scale = torch.full((256,), 2.0)
    else:
        base = nn.Embedding(64, 256)
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(base, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    with pytest.raises(
        LayerError, match=r"holds its weight in a \w+Tensor of torchao.*load the base model unquantised"
    ):
        dense(base)
