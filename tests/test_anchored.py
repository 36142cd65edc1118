"""Anchored layers: exact starts, untouched weights, the subtracted form's gradients, and what PEFT does to a layer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import ARCHITECTURES, factors_of, logits, perturb, started, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers

SUBTRACTING = [
    "init-ab",
    "inilora-alpha",
    "inilora-beta",
    "pissa",
    "milora",
    "olora",
    "inilora:solver=adam,steps=3",
    "inilora:solver=svd",
]


def base_state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SUBTRACTING)
def test_start_is_the_base_model_bit_for_bit(method, dtype, batch):
    base = tiny_llama().to(dtype)
    expected = logits(base, batch)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = started(base, method)
    assert torch.equal(logits(model, batch), expected)
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    for target in lora_layers(model, "default"):
        assert factors_of(target.module)[1].abs().sum() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_starts_exactly(architecture):
    make, batch_of, targets = ARCHITECTURES[architecture]
    base = make()
    batch = batch_of()
    expected = logits(base, batch)
    model = started(base, "init-ab:beta=4", target_modules=targets)
    assert torch.equal(logits(model, batch), expected)
    perturb(model)
    assert not torch.equal(logits(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


def test_gradients_are_those_of_the_subtracted_form(batch):
    """In float64, where only rounding separates the two forms, at the start and away from it."""
    anchored = started(tiny_llama().double(), "init-ab:beta=3")
    residual = started(tiny_llama().double(), "init-ab:beta=3", form="residual")
    for step in range(2):
        for model in (anchored, residual):
            model.zero_grad()
            model(**batch).loss.backward()
        mine = dict(anchored.named_parameters())
        for name, parameter in residual.named_parameters():
            if parameter.requires_grad:
                assert torch.allclose(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-7), name
                assert parameter.grad.norm() > 0
        if step == 0:
            perturb(anchored, seed=7)
            perturb(residual, seed=7)
    assert torch.allclose(logits(anchored, batch), logits(residual, batch), atol=1e-5)


def test_forward_is_the_formula(batch):
    model = started(tiny_llama().double(), "init-ab:beta=3").eval()
    perturb(model)
    target = next(iter(lora_layers(model, "default")))
    x = torch.randn(3, 5, target.d_in, dtype=torch.float64)
    # PEFT casts the input to the factors' dtype, float32 here.
    A, B = (factor.double() for factor in factors_of(target.module))
    A0, B0 = (anchor.double() for anchor in anchors(target.module, "default"))
    W = target.module.get_base_layer().weight
    expected = x @ (W + target.scaling * (B @ A - B0 @ A0)).T
    assert torch.allclose(target.module(x), expected, atol=1e-6)


def test_merge_unmerge_and_unload(batch):
    for base, targets in ((tiny_llama(), "all-linear"), (tiny_gpt2(), ["c_attn", "c_proj"])):
        model = started(base, "init-ab:beta=2", target_modules=targets)
        perturb(model)
        expected = logits(model, batch)
        before = base_state(model)
        model.merge_adapter()
        assert torch.allclose(logits(model, batch), expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(logits(model, batch), expected, atol=1e-5)
        for name, value in base_state(model).items():
            assert torch.allclose(value, before[name], atol=1e-6), name
        model.merge_adapter(safe_merge=True)
        assert torch.allclose(logits(model, batch), expected, atol=1e-5)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        assert torch.allclose(logits(merged, batch), expected, atol=1e-5)
        assert not any("lora" in name for name, _ in merged.named_parameters())


def test_merging_a_fresh_start_changes_nothing(batch):
    model = started(tiny_llama().bfloat16(), "inilora-alpha")
    before = base_state(model)
    model.merge_adapter()
    for name, value in base_state(model).items():
        assert torch.equal(value, before[name])


def test_a_second_adapter_is_undisturbed(batch):
    model = wrap(tiny_llama(), init_lora_weights=False)
    expected = logits(model, batch)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("second")
    hs.initialize_(model, "pissa")
    perturb(model, adapter="second")
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model, batch), expected)
    assert not any("anchor" in name and "second" in name for name, _ in model.named_parameters())
    assert all(anchors(target.module, "default") is None for target in lora_layers(model, "default"))


def test_anchors_never_train(batch):
    model = started(tiny_llama())
    for _ in range(2):
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("other")
        model.set_adapter("default")
        model.delete_adapter("other")


def test_dropout_reaches_both_halves(batch):
    """With the same mask, the anchored form and the subtracted form are the same function."""
    outputs = []
    for form in ("anchored", "residual"):
        model = started(tiny_llama().double(), "init-ab:beta=2", form=form, lora_dropout=0.5)
        perturb(model, scale=0.0)
        model.train()
        torch.manual_seed(3)
        outputs.append(model(**batch).logits)
    # At the start the anchored form is the base model whatever the mask; the subtracted form is not.
    assert torch.equal(outputs[0], logits(tiny_llama().double(), batch))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)


def test_checkpointing_gives_the_same_gradients(batch):
    gradients = []
    for checkpointing in (False, True):
        model = started(tiny_llama())
        perturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7)


def test_autocast(batch):
    base = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(base, batch)
    model = started(base, "inilora-alpha")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model, batch), expected)
        model.train()
        model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_factors_cast_by_a_trainer_still_start_exactly(batch):
    """Some training programs cast what trains to half precision after the start is made."""
    base = tiny_llama().bfloat16()
    expected = logits(base, batch)
    model = started(base, "inilora-alpha")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(model, batch), expected)


def test_compile():
    """By the compiler itself, which takes a minute for more than a layer; other tests compile those without it."""
    model = started(tiny_llama(num_hidden_layers=1), "init-ab:beta=2").train()
    perturb(model)
    block = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    expected = block(x)
    gradients = torch.autograd.grad(expected.square().sum(), trained)
    compiled = torch.compile(block)(x)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)
    for own, reference in zip(torch.autograd.grad(compiled.square().sum(), trained), gradients, strict=True):
        torch.testing.assert_close(own, reference, atol=1e-5, rtol=1e-5)


def test_mixed_adapters_in_one_batch(batch):
    model = started(tiny_llama(), "init-ab:beta=2").eval()
    perturb(model)
    with torch.no_grad():
        mine = model(**batch).logits
        with model.disable_adapter():
            plain = model(**batch).logits
        both = model(**batch, adapter_names=["default", "__base__"] * 2).logits
    assert torch.allclose(both[0::2], mine[0::2], atol=1e-6)
    assert torch.allclose(both[1::2], plain[1::2], atol=1e-6)


def test_residual_form_starts_near_the_base_model(batch):
    base = tiny_llama()
    expected = logits(base, batch)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = started(base, "pissa", form="residual")
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    target = next(iter(lora_layers(model, "default")))
    A, B = target.module.lora_A["default"].weight, target.module.lora_B["default"].weight
    weight = before[f"{target.name}.weight"]
    residual = target.module.get_base_layer().weight
    assert torch.allclose(residual + target.scaling * B @ A, weight, atol=1e-6)
    assert not torch.allclose(residual, weight, atol=1e-3)


def test_merging_residual_weights(batch):
    model = started(tiny_llama(), "pissa", form="residual")
    perturb(model)
    expected = logits(model, batch)
    model.merge_adapter()
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model.merge_and_unload(), batch), expected, atol=1e-5)


def test_peft_refuses_to_convert_what_it_would_get_wrong():
    model = started(tiny_llama())
    assert not any(t.module.supports_lora_conversion("default") for t in lora_layers(model, "default"))


def test_anchors_get_no_gradient_even_if_unfrozen(batch):
    model = started(tiny_llama())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("lora_A" not in name and "lora_B" not in name), name


def kept_for_backward(model, batch):
    """Bytes that a forward pass keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch).loss.backward()
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("freeze_A", [False, True])
def test_an_anchored_layer_keeps_no_more_for_backward_than_a_plain_one(freeze_A):
    batch = token_batch()
    sizes = {}
    for method in ("lora", "pissa"):
        model = started(tiny_llama(), method, lora_dropout=0.0).train()
        if freeze_A:
            hs.lora_fa_(model)
        sizes[method] = kept_for_backward(model, batch)
    assert sizes["pissa"] <= sizes["lora"]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_first_and_second_derivatives_are_those_of_the_formula(shape):
    """Against the dense s (B A - B0 A0) x, away from the start."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(5, 4, bias=False)), LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    )
    hs.initialize_(model, "pissa", progress=False)
    perturb(model, scale=0.3)
    model, layer = model.double(), model.base_model.model[0]
    A0, B0 = (anchor.detach() for anchor in anchors(layer, "default"))
    W, s = layer.base_layer.weight, layer.scaling["default"]
    dA, dB = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    found = torch.func.functional_call(model, {}, (x,))
    expected = x @ (W + s * ((B0 + dB) @ (A0 + dA) - B0 @ A0)).T
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), (x, dA, dB), create_graph=True) for y in (found, expected)]
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in first), (x, dA, dB)) for first in gradients]
    for mine, dense in zip((*gradients[0], *seconds[0]), (*gradients[1], *seconds[1]), strict=True):
        torch.testing.assert_close(mine, dense)


def test_a_gradient_for_each_sample_by_function_transforms():
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0"]))
    hs.initialize_(model, "pissa", progress=False)
    perturb(model, scale=0.3)
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def loss(factors, row):
        return torch.func.functional_call(model, factors, (row[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x)
    for row in range(3):
        model.zero_grad()
        model(x[row : row + 1]).square().sum().backward()
        for name in factors:
            torch.testing.assert_close(found[name][row], model.get_parameter(name).grad)


def test_no_tokens_at_all_train_like_any_others():
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), LoraConfig(r=4, target_modules=["0"]))
    hs.initialize_(model, "pissa")
    x = torch.zeros(0, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == (0, 16)
    assert not model.base_model.model[0].lora_A["default"].weight.grad.count_nonzero()
