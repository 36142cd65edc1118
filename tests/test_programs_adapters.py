"""Several adapters on one model, and adapters in programs that never heard of headstart."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import headstart as hs
from conftest import logits, perturb, started, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.layers.core import core_of, form_of
from headstart.layers.find import lora_layers
from headstart.training.models import resolve_model
from test_models import gguf_file  # noqa: F401

# One method for each form that a layer can have.
FORMS = {"anchored": "pissa", "core": "lora-xs:std=0.5", "kept": "init-ab-plus"}
KINDS = {"anchored": "anchored", "core": "core", "kept": None}


@torch.no_grad()
def moved(model, form, adapter="default", seed=5):
    """Move what trains, as training would."""
    if form != "core":
        perturb(model, scale=0.05, seed=seed, adapter=adapter)
        return model
    generator = torch.Generator().manual_seed(seed)
    for target in lora_layers(model, adapter):
        core_of(target.module, adapter).add_(0.5 * torch.randn(target.r, target.r, generator=generator))
    return model


def trained(form, seed=5, base=tiny_llama, **changes):
    return moved(started(base(), FORMS[form], **changes), form, seed=seed)


def near(found, expected, tolerance=1e-5):
    return bool((found - expected).norm() <= tolerance * expected.norm())


def added(model, form, name, **changes):
    """Add a second adapter to a model and start it."""
    config = dict(r=4, lora_alpha=8, target_modules="all-linear") | changes
    model.add_adapter(name, LoraConfig(**config))
    hs.initialize_(model, FORMS[form], adapter=name, progress=False)
    return moved(model, form, name, seed=7)


@pytest.mark.parametrize(("first", "second"), [("anchored", "core"), ("core", "kept"), ("kept", "anchored")])
def test_adapters_of_two_forms_live_side_by_side(first, second, batch):
    alone = {"default": logits(trained(first), batch), "other": logits(trained(second, seed=7), batch)}
    base = logits(tiny_llama(), batch)
    model = added(trained(first), second, "other")
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), alone[name])
        assert not near(alone[name], base, 1e-3)
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trains and all(f".{name}" in n for n in trains)
        assert all("lora_core" in n for n in trains) == ((first if name == "default" else second) == "core")
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), alone["other"])
    assert not any("default" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("first", "second"), [("anchored", "core"), ("core", "kept"), ("kept", "anchored")])
def test_training_one_leaves_the_other(first, second, batch):
    model = added(trained(first), second, "other")
    before = logits(model, batch)
    model.set_adapter("other")
    start = logits(model, batch)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(model, batch), start)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(("first", "second"), [("anchored", "core"), ("core", "anchored")])
def test_one_of_two_is_saved_and_loaded_alone(first, second, batch, tmp_path):
    model = added(trained(first), second, "other")
    for name, seed, form in (("default", 5, first), ("other", 7, second)):
        hs.save_lora(model, tmp_path / name, adapter=name)
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        assert near(logits(plain, batch), logits(trained(form, seed=seed), batch))


def exported(form, path, seed=5, **changes):
    """Write a trained adapter as a plain one; return the model that it comes from."""
    model = trained(form, seed, **changes)
    hs.save_lora(model, path)
    return model


def test_exported_adapters_are_swapped_hot(tmp_path, batch):
    """An anchored adapter of rank 4, another, and a core of rank 8 all leave at rank 8."""
    models = {
        "a": exported("anchored", tmp_path / "a"),
        "b": exported("anchored", tmp_path / "b", seed=6),
        "c": exported("core", tmp_path / "c", r=8, lora_alpha=4),
    }
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    shapes = {name: p.shape for name, p in served.named_parameters()}
    for name in ("b", "c", "a"):
        hotswap_adapter(served, str(tmp_path / name), adapter_name="default", torch_device="cpu")
        assert near(logits(served, batch), logits(models[name], batch))
        assert {n: p.shape for n, p in served.named_parameters()} == shapes


def test_ranks_are_padded_for_compiled_swapping(tmp_path, batch):
    models = {"r": exported("kept", tmp_path / "r"), "2r": exported("anchored", tmp_path / "2r", use_rslora=True)}
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "r")
    prepare_model_for_compiled_hotswap(served, target_rank=8)
    served = torch.compile(served, backend="eager")
    for name in ("r", "2r", "r"):
        hotswap_adapter(served, str(tmp_path / name), adapter_name="default", torch_device="cpu")
        assert near(logits(served, batch), logits(models[name], batch))


@pytest.mark.parametrize("form", ["anchored", "core"])
def test_what_is_not_exported_is_not_swapped_in(form, tmp_path):
    trained(form).save_pretrained(tmp_path / "raw")
    exported(form, tmp_path / "plain")
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter(served, str(tmp_path / "raw"), adapter_name="default", torch_device="cpu")


@pytest.mark.parametrize("form", ["anchored", "core"])
@pytest.mark.parametrize("what", ["raw", "plain"])
def test_nothing_is_swapped_into_a_live_start(form, what, tmp_path, batch):
    """PEFT would set a core's R to zero without a word."""
    trained(form, seed=6).save_pretrained(tmp_path / "raw")
    exported(form, tmp_path / "plain", seed=6)
    live = trained(form)
    before = logits(live, batch)
    with pytest.raises(hs.LayerError, match=rf"'default' is {form} \(layer .*save_lora, load one of those, and swap"):
        hotswap_adapter(live, str(tmp_path / what), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(live, batch), before)


@torch.no_grad()
def updates(model, adapter="default"):
    """Each layer's B A in float64, and s."""
    return {
        target.name: (
            target.module.lora_A[adapter].weight.double(),
            target.module.lora_B[adapter].weight.double(),
            target.scaling,
        )
        for target in lora_layers(model, adapter)
    }


WEIGHTS = [0.7, -0.4]


@pytest.fixture
def pair(tmp_path):
    """A plain model with an exported anchored and an exported core adapter, both of rank 8, and their updates."""
    exported("anchored", tmp_path / "a")
    exported("core", tmp_path / "b", r=8, lora_alpha=4)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    return model, updates(model, "a"), updates(model, "b")


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_exported_adapters_are_combined(kind, pair):
    model, first, second = pair
    settings = {"svd_rank": 16} if kind == "svd" else {}
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "both", combination_type=kind, **settings)
    for name, (A, B, s) in updates(model, "both").items():
        (A1, B1, s1), (A2, B2, s2) = first[name], second[name]
        w1, w2 = WEIGHTS[0] * s1, WEIGHTS[1] * s2
        expected = w1 * B1 @ A1 + w2 * B2 @ A2
        if kind == "linear":  # the factors are summed, not the updates, so that crossed products come in
            roots = abs(w1) ** 0.5, abs(w2) ** 0.5
            expected = (roots[0] * B1 + roots[1] * B2) @ (roots[0] * A1 - roots[1] * A2)
        assert near(s * B @ A, expected), name


def test_a_combination_does_what_its_parts_do_together(pair, batch, tmp_path):
    """Cut to rank 8, the combination of two of rank 8 is the best of that rank."""
    model, first, second = pair
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "both", combination_type="svd", svd_rank=8)
    for name, (A, B, s) in updates(model, "both").items():
        (A1, B1, s1), (A2, B2, s2) = first[name], second[name]
        whole = WEIGHTS[0] * s1 * B1 @ A1 + WEIGHTS[1] * s2 * B2 @ A2
        least = torch.linalg.svdvals(whole)[8:].norm()
        assert float((s * B @ A - whole).norm()) == pytest.approx(float(least), rel=1e-3)
    model.set_adapter("both")
    model.save_pretrained(tmp_path / "out", selected_adapters=["both"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "both")
    assert near(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("form", ["anchored", "core"])
def test_what_is_not_exported_is_not_combined(form):
    model = added(trained("kept"), form, "other")
    with pytest.raises(hs.LayerError, match=rf"'other' is {form} \(layer .*save_lora, load that, and combine it"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type="cat")
    assert "both" not in model.peft_config


SERVING = """
import sys
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for base, adapter, case in {cases}:
    batch = load_file(case)
    expected = batch.pop("expected")
    model = AutoModelForCausalLM.from_pretrained(base)
    untouched = model(**batch).logits
    assert (untouched - expected).norm() > 1e-3 * expected.norm(), adapter
    model = PeftModel.from_pretrained(model, adapter).eval()
    for each in (model, model.merge_and_unload()):
        found = each(**batch).logits
        assert (found - expected).norm() <= 1e-5 * expected.norm(), adapter
    assert not any("lora" in name for name, _ in each.named_modules())
    print(adapter)
assert "headstart" not in sys.modules
"""


def test_a_process_without_headstart_serves_and_merges(tmp_path, fresh):
    batch = token_batch(padded=False)
    cases = []
    for make in (tiny_llama, tiny_gpt2):
        base = tmp_path / make.__name__
        make().save_pretrained(base)
        targets = ["c_attn", "c_proj"] if make is tiny_gpt2 else "all-linear"
        for form in FORMS:
            path = tmp_path / f"{make.__name__}-{form}"
            model = exported(form, path, base=make, target_modules=targets)
            save_file({**batch, "expected": logits(model, batch)}, path.with_suffix(".safetensors"))
            cases.append([str(base), str(path), str(path.with_suffix(".safetensors"))])
    out, _ = fresh.run(SERVING.format(cases=cases))
    assert out.split() == [adapter for _, adapter, _ in cases]


@pytest.mark.parametrize("form", ["anchored", "core"])
def test_a_gguf_base_is_its_safetensors_copy(form, request, tmp_path, monkeypatch):
    """The same start on a GGUF file read by Transformers, and on the copy in safetensors that headstart makes of it."""
    file = request.getfixturevalue("gguf_file")
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    bases = [
        resolve_model(str(file), progress=False)[0],
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32),
    ]
    (copy,) = (path.parent for path in (tmp_path / "cache").rglob("config.json"))
    bases.append(AutoModelForCausalLM.from_pretrained(copy))
    batch = {"input_ids": torch.tensor([[1, 5, 9, 200, 31]])}
    found = []
    for index, base in enumerate(bases):
        model = wrap(base)
        hs.initialize_(model, FORMS[form], progress=False)
        moved(model, form)
        hs.save_lora(model, tmp_path / str(index))
        found.append((load_file(tmp_path / str(index) / "adapter_model.safetensors"), logits(model, batch)))
    for tensors, scores in found[1:]:
        assert torch.equal(scores, found[0][1])
        assert tensors.keys() == found[0][0].keys()
        for name, value in tensors.items():
            assert torch.equal(value, found[0][0][name]), name
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(copy), tmp_path / "0")
    assert near(logits(plain, batch), found[0][1])
    assert json.loads((tmp_path / "0" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    assert form_of(next(lora_layers(model, "default")).module, "default") == KINDS[form]
