"""Every method on every architecture, against a dense float64 model; and what can't work, refused in words."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call

import headstart as hs
from conftest import (
    ANY_BASE,
    ARCHITECTURES,
    factors_of,
    logits,
    quick,
    tiny_experts,
    tiny_gpt2,
    tiny_mixtral,
    tiny_qwen,
    tiny_roberta,
    tiny_t5,
    tiny_tied,
    token_batch,
    wrap,
)
from headstart.layers.anchored import anchors
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers
from headstart.layers.frozen import frozen_factors
from headstart.methods.registry import parse_method
from oracles import relative

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = ARCHITECTURES | {
    "qwen": (tiny_qwen, token_batch, "all-linear"),
    "tied": (tiny_tied, token_batch, "all-linear"),
    "mixtral": (tiny_mixtral, token_batch, ATTENTION),
    "experts": (tiny_experts, token_batch, [*ATTENTION, "w1", "w2", "w3"]),
    "roberta": (tiny_roberta, ARCHITECTURES["bert"][1], ["query", "value", "dense"]),
}


def small(name):
    """A method with settings that are quick and suit classifiers too, whose tokens have no labels."""
    return quick(name) + (",tokens=attention" if name == "eva" else "")


@functools.cache
def case(architecture):
    """One base model in evaluation mode, its batch in float32 and float64, its targets and its logits."""
    make, batch_of, targets = EVERY[architecture]
    base, batch = make().eval(), batch_of()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return base, copy.deepcopy(base).double(), batch, wide, targets, logits(base, batch)


def factors(target):
    """A, B, the product of A0 and B0 (0 without anchors), and R (None without a core), in float64."""
    A, B = (factor.double() for factor in factors_of(target.module))
    held = anchors(target.module, "default")
    start = held[1].double() @ held[0].double() if held else 0 * B @ A
    R = core_of(target.module, "default")
    return A, B, start, None if R is None else R.detach().double()


def dense_weights(model, base):
    """By the names of ``base``'s parameters: W + s (B A - B0 A0) or W + s B R A, as leaves that take gradients."""
    weights = {}
    for target in lora_layers(model, "default"):
        A, B, start, R = factors(target)
        update = target.scaling * (B @ A - start if R is None else B @ R @ A)
        weight = base.get_parameter(f"{target.name}.weight").detach()
        weights[f"{target.name}.weight"] = (weight + (update.T if is_conv1d(target) else update)).requires_grad_(True)
    return weights


def is_conv1d(target):
    return type(target.module.get_base_layer()).__name__ == "Conv1D"


def expected_gradients(model, weights):
    """Of every trainable parameter by its identity: s B'G and s G A', of a core s B'G A'."""
    found = {}
    for target in lora_layers(model, "default"):
        A, B, _, R = factors(target)
        G = weights[f"{target.name}.weight"].grad
        G = torch.zeros(target.d_out, target.d_in) if G is None else G.T if is_conv1d(target) else G
        G = target.scaling * G.double()
        if R is not None:
            found[id(core_of(target.module, "default"))] = B.T @ G @ A.T
            continue
        frozen = frozen_factors(target.module, "default")
        for part, gradient in (("lora_A", B.T @ G), ("lora_B", G @ A.T)):
            if part not in frozen:
                found[id(getattr(target.module, part)["default"].weight)] = gradient
    return found


def starts_exactly(model):
    """Whether nothing is added to the base layers' outputs, to the bit: A = A0 and B = B0, or A or B is zero."""
    for target in lora_layers(model, "default"):
        A, B, _, R = factors(target)
        if R is not None or not (anchors(target.module, "default") or not A.any() or not B.any()):
            return False
    return True


# Every method on one architecture, and one of each family on all others.
FAMILIES = ("lora", "init-ab-plus", "pissa", "corda", "lora-one", "lora-ga", "lora-da", "lora-xs")
PAIRS = [(name, of) for of in EVERY for name in (ANY_BASE if of == "llama" else FAMILIES)]


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_every_method_on_every_architecture(name, architecture, tmp_path):
    base, base_wide, batch, wide, targets, base_logits = case(architecture)
    model = wrap(copy.deepcopy(base), target_modules=targets).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hs.errors.HeadstartWarning)  # layers that no gradient reaches are told of
        report = hs.initialize_(model, small(name), data=[batch], preserve=[batch], progress=False)

    # The start is the dense model's, and the base model's to the bit where nothing is added.
    weights = dense_weights(model, base_wide)
    dense = functional_call(base_wide, weights, kwargs=wide)
    start = logits(model, batch)
    assert relative(start, dense.logits.detach()) < 1e-5
    assert torch.equal(start, base_logits) == starts_exactly(model)
    if name not in ("lora-xs", "lora-sb", "lora-one", "lora-da", "kfac-newton", "gora", "init-ab-plus", "orthogonal"):
        assert starts_exactly(model)

    # What doesn't train is what the method declares, but where a layer starts as lora does.
    plain = [target.module for target in lora_layers(model, "default") if core_of(target.module, "default") is None]
    frozen = {frozen_factors(module, "default") for module in plain}
    declared = parse_method(report.method).freezes
    assert not plain or {declared} <= frozen <= {declared, ()}

    # Gradients, of exactly the parameters that train.
    dense.loss.backward()
    model(**batch).loss.backward()
    expected = expected_gradients(model, weights)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert report.trainable == sum(p.numel() for p in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    scale = max(float(value.norm()) for value in expected.values())
    assert scale > 0
    for key, parameter in trained.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(
            found.double(), expected[key], rtol=0, atol=1e-4 * float(expected[key].norm()) + 1e-6 * scale
        )

    # A step does something.
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    stepped = logits(model, batch)
    assert relative(stepped, start) > 1e-6
    assert relative(stepped, functional_call(base_wide, dense_weights(model, base_wide), kwargs=wide).logits) < 1e-5

    # It leaves as a plain LoRA, and merges.
    assert hs.save_lora(model, tmp_path / "lora") == 0
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert not any(anchors(t.module, "default") or core_of(t.module, "default") for t in lora_layers(plain, "default"))
    assert relative(logits(plain, batch), stepped) < 1e-5
    model.merge_adapter()
    assert relative(logits(model, batch), stepped) < 1e-5
    model.unmerge_adapter()
    assert relative(logits(model, batch), stepped) < 1e-5


def refused(model, match, name="init-ab"):
    """LayerError in these words, before data are read or anything is changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(hs.LayerError, match=match):
        hs.initialize_(model, small(name), data=unread(), preserve=unread(), progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def unread():
    raise AssertionError("data were read")
    yield


def test_a_router_that_is_no_linear_layer_is_a_parameter():
    model = get_peft_model(tiny_mixtral(), LoraConfig(r=2, target_modules=["q_proj", "gate"]))
    report = hs.initialize_(model, "pissa", cache=False)
    assert "model.layers.0.mlp.gate" in {layer.name for layer in report.layers}


@pytest.mark.parametrize("name", ["lora", "pissa", "lora-one"])
@pytest.mark.parametrize("make", [tiny_tied, tiny_gpt2, tiny_t5])
def test_a_head_tied_to_the_embeddings_leaves_them_alone(make, name):
    """What it is beside stays the base model's, whatever the head's adapter learns; subtracted from, it wouldn't."""
    base = make()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    before = base.get_input_embeddings().weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of it
        model = wrap(base, target_modules=["lm_head"])
    subtracting = "'lm_head' shares its weight with .*tied weights.*residual weights would change both"
    with pytest.raises(hs.LayerError, match=subtracting):
        hs.initialize_(model, "pissa", form="residual", cache=False)
    report = hs.initialize_(model, small(name), data=[token_batch()], cache=False)
    assert [layer.name for layer in report.layers] == ["lm_head"]
    model(**token_batch()).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_routers_too_small_for_the_rank_are_named():
    """Of four experts, and so of at most rank four; the one that is never chosen leaves three."""
    gate = dict(target_modules=["q_proj", "gate"])
    refused(wrap(tiny_experts(), r=5, **gate), r"mlp\.gate': rank 5 is more than its smaller side, 4")
    for name, sentence in (("lora-ga", r"mlp\.gate'.*8"), ("lora-sb", r"mlp\.gate'.*rank below 4.*lower r")):
        model = wrap(tiny_experts(), **gate)
        with pytest.raises(hs.LayerError, match=sentence):
            hs.initialize_(model, small(name), data=[token_batch()], preserve=[token_batch()], progress=False)
