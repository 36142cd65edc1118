"""Code that computes past a layer's form is noticed, and nothing else is taken for it."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.nn.functional import linear

import headstart as hs
from conftest import logits, perturb, started, tiny_experts, tiny_llama, tiny_t5, token_batch, wrap
from headstart.layers.find import lora_layers

FORMED = {"anchored": "pissa", "core": "lora-xs:std=0.5"}
PAST = r"layer 'model\.layers\.\d\.[\w.]+': something else than the layer computes its output.*save_lora"


def fused(layer):
    """What a fused kernel computes, from what it reads of a layer."""

    def forward(x, *args, **kwargs):
        (name,) = layer.active_adapters
        A, B, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        return linear(x, layer.base_layer.weight) + scaling * linear(linear(x, A), B)

    return forward


def patch_layers(model):
    for target in lora_layers(model, "default"):
        target.module.forward = fused(target.module)


def patch_parents(model):
    """As programs do that replace the whole feed-forward part: no LoRA layer is called any more."""
    for layer in model.get_base_model().model.layers:
        gate, up, down = (fused(part) for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
        layer.mlp.forward = lambda x, gate=gate, up=up, down=down: down(torch.nn.functional.silu(gate(x)) * up(x))


@pytest.mark.parametrize("when", ["before the first pass", "later"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", FORMED)
def test_a_patched_layer_raises_when_it_is_called(form, grad, when, batch):
    model = started(tiny_llama(), FORMED[form])
    if when == "later":
        model(**batch).loss.backward()
    patch_layers(model)
    with torch.set_grad_enabled(grad), pytest.raises(hs.LayerError, match=PAST):
        model(**batch)


def test_a_patched_block_raises_when_its_factors_get_a_gradient(batch):
    model = started(tiny_llama(), "pissa", target_modules=["gate_proj", "up_proj", "down_proj"])
    patch_parents(model)
    loss = model(**batch).loss
    with pytest.raises(hs.LayerError, match=PAST):
        loss.backward()


def test_a_residual_layer_that_was_loaded_is_right_under_such_code(tmp_path, batch):
    """What trains there is A and B themselves, which is what such code reads."""
    model = started(tiny_llama(), "pissa", form="residual")
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    loaded = hs.load_checkpoint(tiny_llama(), tmp_path / "c")
    patch_layers(loaded)
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-5)


@pytest.mark.parametrize("patch", [patch_layers, patch_parents])
@pytest.mark.parametrize("method", ["lora", "init-ab-plus"])
def test_kept_starts_are_right_under_such_code(method, patch, batch):
    model = started(tiny_llama(), method, target_modules=["gate_proj", "up_proj", "down_proj"])
    expected = logits(model, batch)
    patch(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    model(**batch).loss.backward()


@pytest.mark.parametrize("form", FORMED)
def test_loaded_forms_are_watched_as_well(form, tmp_path, batch):
    from peft import PeftModel

    hs.save_checkpoint(started(tiny_llama(), FORMED[form]), tmp_path / "c")
    for load in (hs.load_checkpoint, PeftModel.from_pretrained):
        model = load(tiny_llama(), tmp_path / "c")
        patch_layers(model)
        with pytest.raises(hs.LayerError, match=PAST):
            model(**batch)


# No false alarm.


@pytest.mark.parametrize("form", FORMED)
def test_off_merged_mixed_and_inactive_adapters_are_nothing_to_report(form, batch):
    model = started(tiny_llama(), FORMED[form])
    base = logits(tiny_llama(), batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.eval()
    model(**batch, adapter_names=["__base__"] * 4)
    model.merge_adapter()
    model(**batch)
    model.unmerge_adapter()
    model.add_adapter("other", wrap(tiny_llama()).peft_config["default"])
    model.set_adapter("other")
    model(**batch).loss.backward()
    model.set_adapter("default")
    model(**batch).loss.backward()


@pytest.mark.parametrize("form", FORMED)
def test_experts_without_tokens_are_nothing_to_report(form, batch):
    """The last expert of each layer never gets any."""
    model = started(tiny_experts(), FORMED[form])
    for _ in range(2):
        model(**batch).loss.backward()


@pytest.mark.parametrize("form", FORMED)
def test_a_penalty_on_factors_comes_after_the_pass(form, batch):
    model = started(tiny_llama(), FORMED[form])
    penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    (model(**batch).loss + penalty).backward()


@pytest.mark.parametrize("form", FORMED)
def test_cached_cross_attention_is_nothing_to_report(form, batch):
    """Its keys and values are computed for the first token alone."""
    model = started(tiny_t5(), FORMED[form], target_modules=["q", "k", "v", "o"]).eval()
    model.generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMED)
def test_gradient_checkpointing_is_nothing_to_report(form, reentrant, batch):
    model = started(tiny_llama(), FORMED[form]).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()


@pytest.mark.parametrize("form", FORMED)
def test_compiled_from_the_first_pass(form, batch):
    model = started(tiny_llama(num_hidden_layers=1), FORMED[form], target_modules=["q_proj", "v_proj"]).eval()
    expected = logits(copy.deepcopy(model), batch)
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(**batch)
    assert torch.allclose(found.logits, expected, atol=1e-5)
    found.loss.backward()
    compiled(**batch).loss.backward()
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)  # and then as it is


@pytest.mark.parametrize("form", FORMED)
@pytest.mark.parametrize("broken", [False, True], ids=["whole", "with a graph break in the base layer"])
def test_a_compiled_layer_in_a_model_that_is_not(form, broken, batch):
    model = started(tiny_llama(), FORMED[form], target_modules=["q_proj"]).eval()
    expected = logits(model, batch)
    for target in lora_layers(model, "default"):
        base = target.module.get_base_layer()
        if broken:
            known = base.forward

            def forward(x, known=known):
                torch._dynamo.graph_break()
                return known(x)

            base.forward = forward
        target.module.forward = torch.compile(target.module.forward, backend="eager")
    for _ in range(2):
        assert torch.allclose(logits(model, batch), expected, atol=1e-5)
        model(**batch).loss.backward()


@pytest.mark.parametrize("form", FORMED)
def test_a_compiled_model_that_breaks_inside_its_layers(form, batch):
    model = started(tiny_llama(num_hidden_layers=1), FORMED[form], target_modules=["q_proj"]).eval()
    expected = logits(model, batch)
    for target in lora_layers(model, "default"):
        target.module.lora_dropout["default"].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMED)
def test_copies_and_threads(form, batch):
    """A copy is watched by itself; replicas in threads share what is noted, each its own call."""
    model = started(tiny_llama(), FORMED[form])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(**batch).loss.backward()
        patch_layers(twin)
        with pytest.raises(hs.LayerError, match=PAST):
            twin(**batch)
    errors = []

    def run():
        try:
            for _ in range(5):
                model(**batch)
        except hs.LayerError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_start_replaced_before_it_ran(tmp_path, batch):
    """Loading over a fresh start leaves no check of the one that is gone."""
    other = started(tiny_llama(), "pissa")
    perturb(other)
    hs.save_checkpoint(other, tmp_path / "c")
    model = started(tiny_llama(), "pissa", seed=3)
    hs.load_checkpoint(model, tmp_path / "c")
    model(**batch).loss.backward()
    model.delete_adapter("default")
    model.add_adapter("default", wrap(tiny_llama()).peft_config["default"])
    model.set_adapter("default")
    model(**batch).loss.backward()


def test_other_hooks_stay(batch):
    """The first call of a deleted adapter's check takes it off, and nothing else."""
    model = started(tiny_llama(), "pissa", target_modules=["q_proj"])
    layer = next(lora_layers(model, "default")).module
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    model.delete_adapter("default")
    model.add_adapter("plain", wrap(tiny_llama(), target_modules=["q_proj"]).peft_config["default"])
    model.set_adapter("plain")
    for _ in range(2):
        model(**token_batch())
    assert seen == [1, 1]
    assert len(layer._forward_hooks) == 1
