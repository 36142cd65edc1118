"""Starts on bases whose weights bitsandbytes holds in 4 or 8 bits."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch.nn import functional

import headstart as hs
from conftest import KINDS, factors_of, perturb, quick, tiny_llama, token_batch, wrap
from headstart.errors import HeadstartWarning, LayerError
from headstart.layers.find import lora_layers
from headstart.layers.weights import dense

pytest.importorskip("bitsandbytes")

BITS = ("4-bit", "8-bit")
# bitsandbytes' blocks want widths of their own size.
WIDE = dict(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(**WIDE).save_pretrained(path)
    return path


def quantised(folder, bits="4-bit", dtype=torch.float32):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if bits == "4-bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype)


def dense_copy(model):
    """A float32 model with the weights that the quantised ones stand for."""
    twin = tiny_llama(**WIDE)
    twin.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if value.dtype == torch.float32
            and name in twin.state_dict()
            and value.shape == twin.state_dict()[name].shape
        },
        strict=False,
    )
    found = dict(model.named_modules())
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(dense(found[name]))
    return twin


def trained_logits(model, batch):
    """Of a model in training mode, in which bitsandbytes computes what has a gradient; there is no dropout."""
    model.train()
    with torch.no_grad():
        return model(**batch).logits


# One of each family; they all read the same weights and gradients.
FAMILIES = ("lora", "init-ab-plus", "pissa", "loftq", "corda", "lora-one", "lora-da", "lora-xs")


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, "4-bit") for name in ("loftq", *KINDS)), *((name, "8-bit") for name in FAMILIES)]
)
def test_every_start_leaves_or_moves_the_quantised_base_as_it_says(folder, bits, name):
    base, batch = quantised(folder, bits), token_batch()
    before, held = trained_logits(base, batch), {n: p.clone() for n, p in base.named_parameters()}
    model = wrap(base)
    report = hs.initialize_(model, quick(name), data=[batch], preserve=[batch])
    after = trained_logits(model, batch)
    kept = {layer.name for layer in report.layers if layer.norm_product > 0}
    starts = [target.module.headstart_record["default"]["form"] for target in lora_layers(model, "default")]
    if kept and starts[0] in ("kept", "core"):
        assert not torch.equal(before, after)
    else:
        assert torch.equal(before, after)
    for target in lora_layers(model, "default"):
        weight = target.module.get_base_layer().weight
        assert torch.equal(weight, held[f"{target.name}.weight"]), target.name
    model(**batch).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "method",
    [
        "pissa",
        "olora",
        "inilora:solver=svd",
        "lora-xs",
        "lora-one:samples=4",
        "lora-da:samples=4",
        "lora-sb:samples=4,lr=0.001",
    ],
)
def test_the_factors_are_those_of_the_dequantised_model(folder, bits, method):
    base, batch = quantised(folder, bits), token_batch()
    twin = wrap(dense_copy(base))
    model = wrap(base)
    for each in (model, twin):
        hs.initialize_(each, method, data=[batch])
    assert torch.allclose(trained_logits(model, batch), trained_logits(twin, batch), atol=2e-3)
    for mine, theirs in zip(lora_layers(model, "default"), lora_layers(twin, "default"), strict=True):
        ours, plain = (
            torch.matmul(*reversed(factors_of(each.module)))
            if method[:7] not in ("lora-xs", "lora-sb")
            else each.module.lora_variant["default"].delta(each.module, "default")
            for each in (mine, theirs)
        )
        assert functional.cosine_similarity(ours.flatten(), plain.flatten(), dim=0) > 0.98, mine.name


def test_a_model_that_has_served_in_evaluation_mode_can_still_be_read(folder):
    base, batch = quantised(folder, "4-bit", torch.bfloat16), token_batch()
    base.eval()
    with torch.no_grad():
        base(**batch)
    model = wrap(base)
    report = hs.initialize_(model, "lora-one:samples=4", data=[batch])
    assert all(layer.norm_B > 0 for layer in report.layers)
    assert not report.warnings


@pytest.mark.parametrize("bits", BITS)
def test_residual_weights_are_refused(folder, bits):
    model = wrap(quantised(folder, bits))
    with pytest.raises(LayerError, match=f"is quantised \\({bits}\\).*anchored"):
        hs.initialize_(model, "pissa", form="residual")


def moved(folder, bits, method):
    """A started model, a little away from its start."""
    model = wrap(quantised(folder, bits))
    hs.initialize_(model, method)
    perturb(model)
    return model


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["pissa", "lora-xs", "init-ab-plus"])
def test_an_exported_adapter_does_the_same_on_the_quantised_base(folder, bits, method, tmp_path):
    batch = token_batch()
    model = moved(folder, bits, method)
    hs.save_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(quantised(folder, bits), tmp_path / "out")
    assert torch.allclose(trained_logits(model, batch), trained_logits(loaded, batch), atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["pissa", "lora-xs"])
def test_a_checkpoint_comes_back_on_the_quantised_base(folder, bits, method, tmp_path):
    batch = token_batch()
    model = moved(folder, bits, method)
    hs.save_checkpoint(model, tmp_path / "out")
    loaded = hs.load_checkpoint(quantised(folder, bits), tmp_path / "out")
    assert torch.equal(trained_logits(model, batch), trained_logits(loaded, batch))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["pissa", "lora-xs"])
def test_merging_requantises_base_and_adapter_together(folder, bits, method):
    model = moved(folder, bits, method)
    wanted = {}
    for target in lora_layers(model, "default"):
        variant = target.module.lora_variant["default"]
        wanted[target.name] = dense(target.module.get_base_layer()) + variant.delta(target.module, "default")
    model.merge_adapter()
    for target in lora_layers(model, "default"):
        found, exact = dense(target.module.get_base_layer()), wanted[target.name]
        # Half of NF4's widest gap, or of a step of 1/127 of the half-precision number that is quantised; of a block's
        # largest entry, bounded by the whole matrix's.
        step = 0.155 if bits == "4-bit" else 0.5 / 127 + 2**-11
        assert (found - exact).abs().max() <= step * exact.abs().max(), target.name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("to", ["unquantised", "quantised"])
def test_a_checkpoint_of_a_quantised_base_goes_on_the_other_one_with_a_warning(to, bits, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    def plain():
        return AutoModelForCausalLM.from_pretrained(folder)

    here, there = (quantised(folder, bits), plain()) if to == "unquantised" else (plain(), quantised(folder, bits))
    model = wrap(here, target_modules=["q_proj", "v_proj"])
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    words = [f"held in {bits[0]} bits", "not quantised"]
    made, found = words if to == "unquantised" else reversed(words)
    with pytest.warns(HeadstartWarning, match=f"made on a base model that is {made}, and this one is {found}") as seen:
        loaded = hs.load_checkpoint(there, tmp_path / "c")
    assert len([each for each in seen if issubclass(each.category, HeadstartWarning)]) == 1
    assert seen[0].filename == __file__
    for expected, target in zip(lora_layers(model, "default"), lora_layers(loaded, "default"), strict=True):
        for which in ("lora_A", "lora_B"):
            factors = [getattr(each.module, which)["default"].weight for each in (expected, target)]
            assert torch.equal(*factors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        hs.load_checkpoint(loaded, tmp_path / "c", check_base=False)
        hs.load_checkpoint(plain() if to == "quantised" else quantised(folder, bits), tmp_path / "c")


@pytest.mark.parametrize("bits", BITS)
def test_another_base_is_refused_quantised_or_not(bits, folder, tmp_path):
    model = wrap(quantised(folder, bits), target_modules=["q_proj", "v_proj"])
    hs.save_checkpoint(model, tmp_path / "c")
    other = tiny_llama(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    with pytest.raises(hs.CheckpointError, match="but other weights"):
        hs.load_checkpoint(other, tmp_path / "c")
    hs.load_checkpoint(other, tmp_path / "c", check_base=False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["pissa", "lora-xs:std=0.5"])
def test_forms_are_built_from_the_config_on_bitsandbytes_layers(folder, bits, method, tmp_path):
    """Whose classes find a layer's variant in a way of their own."""
    batch = token_batch()
    model = wrap(quantised(folder, bits))
    hs.initialize_(model, method, progress=False)
    expected = trained_logits(model, batch)
    hs.save_checkpoint(model, tmp_path / "c")
    found = PeftModel.from_pretrained(quantised(folder, bits), tmp_path / "c", is_trainable=True)
    torch.testing.assert_close(trained_logits(found, batch), expected)
    model.add_adapter("ref", model.peft_config["default"])
    for name, value in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(value.data)
    model.set_adapter("ref")
    torch.testing.assert_close(trained_logits(model, batch), expected)


@pytest.mark.parametrize("method", ["pissa", "lora-xs:std=0.5"])
def test_qlora_with_factors_in_half_precision(folder, method, tmp_path):
    """What trains is cast after the start, as TRL does; base, anchors and frozen factors stay as they are."""
    batch = token_batch()
    model = wrap(quantised(folder, "4-bit"))
    hs.initialize_(model, method, progress=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    hs.save_lora(model, tmp_path / "a")
    plain = PeftModel.from_pretrained(quantised(folder, "4-bit"), tmp_path / "a")
    found, expected = trained_logits(plain, batch), trained_logits(model, batch)
    base = trained_logits(quantised(folder, "4-bit"), batch)
    # The model rounds its activations to bfloat16, the plain adapter is computed in float32.
    assert (found - expected).norm() < 0.02 * (expected - base).norm()
