"""Core layers, LoRA-XS and LoRA-SB: what the paper proves, and everything an adapter has to survive."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import headstart as hs
from conftest import ARCHITECTURES, logits, tiny_bert, tiny_llama, token_batch, wrap
from headstart.layers.core import core_of, form_of
from headstart.layers.find import lora_layers
from headstart.methods.base import Layer
from oracles import best, relative

METHODS = ["lora-xs", "lora-sb:samples=4,lr=1e-3"]


def start(base, method=METHODS[1], **changes):
    model = wrap(base, **changes)
    report = hs.initialize_(model, method, data=[token_batch()], progress=False)
    return model, report


def cores(model):
    return {target.name: core_of(target.module, "default") for target in lora_layers(model, "default")}


def train(model, steps=4, lr=1e-2, optimizer=torch.optim.AdamW):
    chosen = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        chosen.zero_grad()
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        chosen.step()
        losses.append(float(loss.detach()))
    return losses


def layer_of(G=None, W=None, r=3, s=1.0, **given):
    d_out, d_in = (G if G is not None else W).shape
    return Layer(name="q", d_out=d_out, d_in=d_in, r=r, scaling=s, gradient=G, weight=W, **given)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("split", ["orthonormal", "suboptimal"])
@pytest.mark.parametrize("s", [1.0, 2.5])
def test_the_start_is_the_best_image_of_the_first_step(optimizer, split, s):
    """Eckart-Young: s B R A is the best rank-r approximation of Delta."""
    G = draw(9, 7)
    found = hs.LoRASB(samples=1, lr=0.02, optimizer=optimizer, split=split).factors(layer_of(G, s=s))
    delta = -0.02 * (G.sign() if optimizer == "adamw" else G)
    assert relative(s * found.B @ found.core @ found.A, best(delta, 3)) < 1e-4
    gram_B, gram_A = found.B.T @ found.B, found.A @ found.A.T
    assert torch.allclose(gram_A, torch.eye(3), atol=1e-5)
    assert torch.allclose(gram_B, torch.eye(3), atol=1e-5) == (split == "orthonormal")


@pytest.mark.parametrize("scale", ["output", "input"])
def test_lora_xs_stands_on_the_weight(scale):
    W = draw(9, 7, seed=2)
    found = hs.LoRAXS(scale=scale).factors(layer_of(W=W))
    assert relative(found.B @ found.A, best(W, 3)) < 1e-4
    unit = found.A @ found.A.T if scale == "output" else found.B.T @ found.B
    assert torch.allclose(unit, torch.eye(3), atol=1e-5)
    many = torch.cat([hs.LoRAXS().factors(layer_of(W=W, seed=seed)).core.flatten() for seed in range(300)])
    assert float(many.std()) == pytest.approx(1e-5, rel=0.1)


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_theorem_3_the_best_gradient_of_the_core(seed, s, r):
    """g* = (B'B)^-1 g_R (AA')^-1 / s^2 minimises ||s B g A - G||_F: against least squares on the vectorised problem."""
    G, B, A = draw(6, 5, seed=seed).double(), draw(6, r, seed=seed + 1).double(), draw(r, 5, seed=seed + 2).double()
    g_R = s * B.T @ G @ A.T
    g_star = torch.linalg.inv(B.T @ B) @ g_R @ torch.linalg.inv(A @ A.T) / s**2
    design = s * torch.kron(B, A.T.contiguous())  # row-major vec(B g A) = (B (x) A') vec(g)
    brute = torch.linalg.lstsq(design, G.flatten()[:, None]).solution.reshape(r, r)
    assert relative(g_star, brute) < 1e-6


def test_lemma_2_and_theorem_3_on_the_layer():
    """The gradient that backward gives R is s B'GA', and within the block the best one."""
    base = tiny_llama()
    model, _ = start(base, "lora-xs")
    with torch.no_grad():
        for target in lora_layers(model, "default"):
            target.module.lora_A["default"].weight.mul_(3).add_(0.05)
    batch = token_batch()
    target = next(iter(lora_layers(model, "default")))
    weight = target.module.get_base_layer().weight
    weight.requires_grad_(True)
    model(**batch).loss.backward()
    G, R = weight.grad.double(), core_of(target.module, "default")
    A, B = (part["default"].weight.detach().double() for part in (target.module.lora_A, target.module.lora_B))
    s = target.scaling
    assert relative(R.grad, s * B.T @ G @ A.T) < 1e-4
    plain = R.grad.clone()
    model.zero_grad()
    with hs.optimal_gradient(model):
        model(**batch).loss.backward()
    expected = torch.linalg.inv(B.T @ B) @ plain.double() @ torch.linalg.inv(A @ A.T) / s**2
    assert relative(R.grad, expected) < 1e-4
    model.zero_grad()
    model(**batch).loss.backward()
    assert relative(R.grad, plain) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_theorem_4_the_loss_falls(method):
    """A small step along the best gradient lowers the loss by its squared norm's order."""
    model, _ = start(tiny_llama(), method)
    batch = token_batch()
    with hs.optimal_gradient(model):
        loss = model(**batch).loss
        loss.backward()
    expected = 0.0
    with torch.no_grad():
        for target in lora_layers(model, "default"):
            R = core_of(target.module, "default")
            A, B = (part["default"].weight.double() for part in (target.module.lora_A, target.module.lora_B))
            # dL = <G, s B dR A> = <s B'GA', dR>, with s B'GA' = s^2 B'B g* AA'.
            plain = target.scaling**2 * (B.T @ B) @ R.grad.double() @ (A @ A.T)
            expected -= 1e-3 * float((plain * R.grad).sum())
            R -= 1e-3 * R.grad
        after = float(model(**batch).loss)
    assert expected < 0
    assert after - float(loss.detach()) == pytest.approx(expected, rel=0.05, abs=2e-6)


def test_theorem_5_the_equivalent_gradient_does_not_depend_on_s():
    equivalent = []
    for alpha in (2, 8, 32):
        model = wrap(tiny_llama(), lora_alpha=alpha)
        hs.initialize_(model, "lora-xs:std=1e-12", progress=False)
        with hs.optimal_gradient(model):
            model(**token_batch()).loss.backward()
        target = next(iter(lora_layers(model, "default")))
        A, B = (part["default"].weight.detach() for part in (target.module.lora_A, target.module.lora_B))
        equivalent.append(target.scaling * B @ core_of(target.module, "default").grad @ A)
    assert relative(equivalent[1], equivalent[0]) < 1e-4
    assert relative(equivalent[2], equivalent[0]) < 1e-4


def test_theorem_6_with_sgd_the_start_is_the_best_image_of_a_gradient_step():
    """What the core adds to W at the start is the rank-r image of full fine-tuning's own first step."""
    base = tiny_llama()
    batch = token_batch(4, padded=False)
    batch["labels"][:, :3] = -100
    model = wrap(copy.deepcopy(base))
    hs.initialize_(model, "lora-sb:samples=4,optimizer=sgd,lr=0.5", data=[batch], progress=False)
    full = copy.deepcopy(base).eval()
    full(**batch).loss.backward()
    for target in lora_layers(model, "default"):
        step = -0.5 * full.get_submodule(target.name).weight.grad
        delta = target.module.get_base_layer().weight.new_zeros(step.shape)
        delta = target.module.lora_variant["default"].merge_safe(target.module, "default", delta)
        assert relative(delta, best(step, 4)) < 1e-3


def test_the_loss_starts_lower_than_the_base_models():
    base = tiny_llama()
    model, _ = start(copy.deepcopy(base), "lora-sb:samples=4,lr=1e-3")
    with torch.no_grad():
        assert float(model(**token_batch()).loss) < float(base.eval()(**token_batch()).loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_all_architectures(architecture, method):
    make, batch_of, targets = ARCHITECTURES[architecture]
    model = wrap(make(), target_modules=targets)
    report = hs.initialize_(model, method, data=[batch_of()], progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert report.trainable == sum(p.numel() for p in trained) == 16 * len(report.layers)
    model(**batch_of()).loss.backward()
    assert all(R.grad is not None for R in cores(model).values())
    before = logits(model.eval(), batch_of())
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert torch.allclose(logits(merged, batch_of()), before, atol=1e-4)
    merged.unmerge_adapter()
    assert torch.allclose(logits(merged, batch_of()), before, atol=1e-4)


def test_only_the_core_trains_whatever_is_switched():
    model, _ = start(tiny_llama())
    model.set_adapter("default")
    model.enable_adapter_layers()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_core" in name for name in names)
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), token_batch()), logits(tiny_llama().eval(), token_batch()))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_core" in name for name in names)
    with torch.no_grad():
        before = float(model(**token_batch()).loss)
    train(model, 12)
    with torch.no_grad():
        assert float(model(**token_batch()).loss) < before


@pytest.mark.parametrize("method", METHODS)
def test_saved_as_a_plain_lora_of_rank_r(method, tmp_path):
    base = tiny_llama()
    model, _ = start(copy.deepcopy(base), method)
    train(model)
    assert hs.save_lora(model, tmp_path / "lora") == 0
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert plain.peft_config["default"].r == 4
    assert torch.allclose(logits(plain, token_batch()), logits(model.eval(), token_batch()), atol=1e-5)


def test_resumed_bit_for_bit(tmp_path):
    base = tiny_llama()
    model, _ = start(copy.deepcopy(base))
    train(model, 3)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    again = hs.load_checkpoint(copy.deepcopy(base), tmp_path / "checkpoint")
    assert torch.equal(logits(again.eval(), token_batch()), logits(model.eval(), token_batch()))
    names = [name for name, p in again.named_parameters() if p.requires_grad]
    assert names and all("lora_core" in name for name in names)
    assert train(again, 3) == train(model, 3)
    hs.load_checkpoint(again, tmp_path / "checkpoint")
    assert not torch.equal(logits(again.eval(), token_batch()), logits(model.eval(), token_batch()))
    frozen = hs.load_checkpoint(copy.deepcopy(base), tmp_path / "checkpoint", trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_pefts_own_loading_finds_a_place_for_the_core(tmp_path):
    """What a Trainer does when it resumes, on a prepared and on a fresh model."""
    base = tiny_llama()
    model, _ = start(copy.deepcopy(base))
    train(model, 3)
    model.save_pretrained(tmp_path / "peft")
    expected = logits(model.eval(), token_batch())
    prepared, _ = start(copy.deepcopy(base), "lora-xs")
    fresh = wrap(copy.deepcopy(base))
    for found in (prepared, fresh):
        found.load_adapter(tmp_path / "peft", "default", is_trainable=True)
        assert torch.equal(logits(found.eval(), token_batch()), expected)
        names = [name for name, p in found.named_parameters() if p.requires_grad]
        assert names and all("lora_core" in name for name in names)


def test_deleted_with_the_adapter():
    model, _ = start(tiny_llama())
    model.add_adapter("other", copy.deepcopy(wrap(tiny_llama()).peft_config["default"]))
    model.delete_adapter("default")
    target = next(iter(lora_layers(model, "other")))
    assert form_of(target.module, "other") is None
    assert core_of(target.module, "default") is None


def test_failed_initialisation_leaves_a_plain_lora(monkeypatch):
    model = wrap(tiny_llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    import headstart.layers.install as installing

    real, calls = installing.set_core, []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(installing, "set_core", sometimes)
    with pytest.raises(KeyboardInterrupt):
        hs.initialize_(model, "lora-xs", progress=False)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(p.requires_grad for name, p in after.items() if "lora_A" in name)


def test_half_precision_dropout_checkpointing_and_compile():
    model, _ = start(tiny_llama().bfloat16(), lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert math.isfinite(train(model, 2)[-1])
    model, _ = start(tiny_llama())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert math.isfinite(train(model, 1)[-1])
    expected = logits(model.eval(), token_batch())
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**token_batch()).logits.detach(), expected, atol=1e-5)


@pytest.mark.parametrize("source", ["noise", "kaiming"])
def test_ablations_keep_the_norm(source):
    G = draw(40, 30)
    found = hs.LoRASB(samples=1, lr=0.1, source_matrix=source, noise=0.01).factors(layer_of(G, r=30))
    delta = -0.1 * G.sign()
    product = found.B @ found.core @ found.A
    assert float(product.norm()) == pytest.approx(float(delta.norm()), rel=0.02)
    assert (relative(product, delta) < 0.02) == (source == "noise")


def test_a_share_of_the_training_set():
    assert hs.LoRASB().sample_count(50_000) == 50
    assert hs.LoRASB(share=0.5).sample_count(7) == 4
    assert hs.LoRASB(samples=3).sample_count(None) == 3
    with pytest.raises(hs.MethodError, match="give samples"):
        hs.LoRASB().sample_count(None)


def test_the_rate_is_needed():
    with pytest.raises(hs.MethodError, match="rate of the first optimizer step"):
        hs.initialize_(wrap(tiny_llama()), "lora-sb:samples=4", data=[token_batch()], progress=False)
    model = wrap(tiny_llama())
    hs.initialize_(
        model,
        "lora-sb:samples=4",
        data=hs.TrainingData([token_batch()], training=hs.Training(first_lr=1e-3)),
        progress=False,
    )
    same, _ = start(tiny_llama())
    for name, R in cores(model).items():
        assert torch.equal(R, cores(same)[name])


def test_dora_and_core_exclude_each_other():
    with pytest.raises(hs.LayerError, match="DoRA, which trains A and B"):
        hs.initialize_(wrap(tiny_llama(), use_dora=True), "lora-xs", progress=False)


def test_layers_without_gradient_can_still_train():
    model = wrap(tiny_bert(), target_modules=["query", "dense"])
    batch = {k: v for k, v in token_batch().items() if k != "labels"} | {"labels": torch.arange(4) % 3}
    hs.initialize_(model, "lora-sb:samples=4,lr=1e-3", data=[batch], progress=False)
    found = hs.LoRASB(samples=1, lr=1.0).factors(layer_of(torch.zeros(9, 7)))
    assert "no gradient" in found.note
    assert not found.core.any() and found.A.any() and found.B.any()


def test_the_report_speaks_of_what_is_added():
    _, xs = start(tiny_llama(), "lora-xs")
    assert all(layer.relative_product < 1e-3 for layer in xs.layers)


def test_a_core_is_asked_for():
    with pytest.raises(hs.LayerError, match="has no core layer"), hs.optimal_gradient(wrap(tiny_llama())):
        pass


def test_an_interrupted_core_leaves_no_trace(monkeypatch):
    import headstart.layers.core as cores_file

    model = wrap(tiny_llama())
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    def fail(self, adapter):
        raise MemoryError

    monkeypatch.setattr(cores_file.LoraLayer, "_freeze_non_trainable_peft_weights", fail)
    with pytest.raises(MemoryError):
        hs.initialize_(model, "lora-xs", progress=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_combining_is_refused():
    model, _ = start(tiny_llama())
    with pytest.raises(hs.LayerError, match="is core"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
