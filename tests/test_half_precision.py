"""float16 with a scaled loss, autocast, and coarse products: what is summed, and a start, stay exact."""

from __future__ import annotations

import copy

import pytest
import torch

import headstart as hs
from conftest import ANY_BASE, KINDS, all_factors, quick, started, tiny_llama, wrap
from headstart.errors import DataError
from headstart.methods import method_class
from headstart.methods.base import ANY_LAYER
from headstart.statistics.tap import LossScale, full_precision, tapped
from oracles import exact_factors, relative
from passes import assert_exact, collect


def faint():
    """A model with a large residual stream, as trained ones have, whose gradients float16 can't hold unscaled."""
    model = tiny_llama(hidden_size=64, vocab_size=500, max_position_embeddings=512)
    model.model.embed_tokens.weight.data.mul_(300)
    return model


def long_batch(size=2, length=300):
    ids = torch.randint(1, 500, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_small_gradients_survive_float16(checkpointed):
    base = faint().half().float()
    exact = exact_factors(base, [long_batch()], ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    model = wrap(copy.deepcopy(base).half())
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    found = collect(model, [long_batch()], outputs=None)
    unscaled = copy.deepcopy(base).half()
    unscaled(**long_batch()).loss.backward()
    for name in exact:
        lost = unscaled.get_submodule(name).weight.grad * 1.0
        assert relative(found.gradients[name], exact[name].gradient) < 0.02
        assert relative(lost, exact[name].gradient) > 0.05  # so that there was something to save


def test_float16_by_autocast_alone():
    base = faint()
    batch = long_batch()
    exact = exact_factors(base, [batch], ["model.layers.0.self_attn.q_proj"])
    with torch.autocast("cpu", dtype=torch.float16):
        found = collect(wrap(copy.deepcopy(base)), [batch], outputs=None)
    for name in exact:
        assert relative(found.gradients[name], exact[name].gradient) < 0.02


@pytest.mark.parametrize("gain", [1e-9, 1e-3, 1.0, 1e3])
def test_a_scale_is_found_where_gradients_neither_vanish_nor_overflow(gain):
    scale = LossScale()
    scale.notice(torch.float16)
    x = torch.ones(3, 4, dtype=torch.float16)
    layer = torch.nn.Linear(4, 4).half().requires_grad_(False)
    seen = []

    def watch(name, inputs):
        return lambda x, g: seen.append(g)

    with tapped({"layer": layer}, watch, scale):
        out = layer(x).float()
        total = (out * gain).sum()
        scale.backward(total, lambda factor: torch.full_like(total, factor))
    assert len(seen) == 1 and seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], torch.full((3, 4), gain), rtol=1e-3, atol=0)


def test_an_overflow_in_a_later_batch_lowers_the_scale():
    scale = LossScale()
    scale.notice(torch.float16)
    layer = torch.nn.Linear(4, 4).half().requires_grad_(False)
    seen = []

    def watch(name, inputs):
        return lambda x, g: seen.append(float(g.max()))

    with tapped({"layer": layer}, watch, scale):
        for gain in (1e-6, 1e3, 1e-6):
            total = (layer(torch.ones(1, 4, dtype=torch.float16)).float() * gain).sum()
            scale.backward(total, lambda factor, total=total: torch.full_like(total, factor))
    assert seen == pytest.approx([1e-6, 1e3, 1e-6], rel=2e-3)


def test_what_no_scale_helps_is_an_error():
    scale = LossScale()
    scale.notice(torch.float16)
    layer = torch.nn.Linear(4, 4).half().requires_grad_(False)
    with tapped({"layer": layer}, lambda *_: lambda *_: None, scale):
        total = layer(torch.ones(1, 4, dtype=torch.float16)).float().sum()
        with pytest.raises(DataError, match="overflow float16"):
            scale.backward(total, lambda factor: torch.full_like(total, float("inf")))


def test_other_precisions_are_not_scaled():
    scale = LossScale()
    scale.notice(torch.bfloat16)
    gradient = torch.ones(2)
    assert scale.value == 1 and scale.undone(gradient) is gradient


def test_autocast_is_for_the_model_alone():
    """bfloat16 rounds what layers see, and nothing that is summed: the sums are those of the rounded numbers."""
    base, batch = faint(), long_batch(2, 40)
    plain = collect(wrap(copy.deepcopy(base)), [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collect(wrap(copy.deepcopy(base)), [batch])
        assert torch.is_autocast_enabled("cpu")
    name = "model.layers.0.self_attn.q_proj"
    assert relative(found.gradients[name], plain.gradients[name].double()) < 0.05
    # The first layer's input is a normed embedding: rounded once by autocast, summed exactly.
    assert relative(found.kronecker[name].inputs, plain.kronecker[name].inputs.double()) < 1e-5


def test_sums_are_computed_in_full_precision():
    seen = []

    def watch(name, inputs):
        def sink(x, g):
            backend = torch.backends.mkldnn.matmul
            seen.append((torch.is_autocast_enabled("cpu"), backend.fp32_precision))

        return sink

    layer = torch.nn.Linear(4, 4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), tapped({"layer": layer}, watch, LossScale()):
            layer(torch.ones(2, 4)).sum().backward()
        assert seen == [(False, "ieee")]
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        with pytest.raises(KeyError), full_precision([torch.device("cpu")]):
            raise KeyError
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_change_no_way_of_reading(precision):
    base, batch = tiny_llama(), long_batch(3, 40) | {"input_ids": torch.randint(1, 97, (3, 40))}
    batch["labels"] = batch["input_ids"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = collect(wrap(copy.deepcopy(base)), [batch])
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.notes == []
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)), tolerance=0.05)


def test_a_base_prepared_for_training_in_four_bits():
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = long_batch(4, 20) | {"input_ids": torch.randint(1, 97, (4, 20))}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :15] = -100
    singles = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    model = wrap(model)
    together, apart = collect(model, [batch], outputs=None), collect(model, singles, 4, outputs=None)
    assert together.notes == apart.notes == []
    for name, gradient in together.gradients.items():
        assert relative(gradient, apart.gradients[name].double()) < 0.05
    assert hs.initialize_(model, "lora-one:samples=4", data=[batch], progress=False).warnings == []


WEIGHT_ALONE = [name for name in ANY_BASE if not method_class(name)().wants(ANY_LAYER).data]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in WEIGHT_ALONE]
    + [(name, torch.float16) for name in WEIGHT_ALONE if name in KINDS],
)
def test_a_start_is_computed_in_float32_whatever_the_models_precision(name, dtype):
    torch.manual_seed(0)
    rounded = tiny_llama().to(dtype)
    exact = copy.deepcopy(rounded).float()
    half, full = (all_factors(started(model, quick(name))) for model in (rounded, exact))
    for layer, factors in full.items():
        for found, expected in zip(half[layer], factors, strict=True):
            # PEFT keeps an adapter of a half-precision model in float32.
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
