"""Starts of embeddings, as linear layers that read tokens: factors, gradients and forms, against dense oracles."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import ARCHITECTURES, factors_of, logits, perturb, quick, tiny_gpt2, tiny_t5, wrap
from embedded import (
    BESIDE,
    MODELS,
    apart,
    base_of,
    dense_answers,
    dense_weights,
    embeddings,
    exact_gradients,
    tiny_gemma,
    update,
)
from headstart.errors import LayerError
from headstart.layers.anchored import anchors
from headstart.layers.factors import both
from headstart.methods.gradient import LoRAOne
from headstart.methods.registry import method_names
from oracles import relative


def adapted(name, dtype=torch.float32, beside=True, **changes):
    """A base model, a PEFT model made of a copy of it, and its batch."""
    base = base_of(name, dtype)
    targets = [*MODELS[name][2], *([BESIDE[name]] if beside else [])]
    return base, wrap(copy.deepcopy(base), target_modules=targets, **changes), MODELS[name][1]()


def start_of(module):
    """A and B of a start, in float64."""
    held = anchors(module, "default") or both(module, "default")
    return tuple(part.detach().double() for part in held)


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_pissa_is_the_svd_of_the_rows(name, form):
    base, model, batch = adapted(name)
    before = logits(model, batch)
    report = hs.initialize_(model, "pissa", form=form, cache=False, progress=False)
    for layer, module in embeddings(model).items():
        rows = base.get_submodule(layer).weight.detach().double()
        if module.get_base_layer().padding_idx == 0:  # no part of a start
            assert "position" not in layer and rows[0].norm() > 1
            rows[0] = 0
        U, S, Vh = torch.linalg.svd(rows.T)
        A, B = start_of(module)
        torch.testing.assert_close(module.scaling["default"] * B @ A, (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-5, atol=1e-5)
        (line,) = [line for line in report.layers if line.name == layer]
        assert (line.d_out, line.d_in) == tuple(rows.T.shape) and line.form == form
    if form == "anchored":
        assert torch.equal(logits(model, batch), before)
    else:
        torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
        layer, module = next(iter(embeddings(model).items()))
        whole = module.get_base_layer().weight.double() + module.scaling["default"] * (B0A0(module)).T
        torch.testing.assert_close(whole, base.get_submodule(layer).weight.double(), rtol=1e-5, atol=1e-6)


def B0A0(module):
    A, B = start_of(module)
    return B @ A


@pytest.mark.parametrize(
    ("dtype", "method"),
    [
        *((torch.float32, method) for method in ("pissa", "milora", "init-ab", "rlpo", "lora-ga:samples=4")),
        *((torch.bfloat16, method) for method in ("pissa", "olora", "inilora", "lora-ga:samples=4")),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_an_anchored_start_is_the_base_model_bit_for_bit(name, dtype, method):
    base, model, batch = adapted(name, dtype)
    report = hs.initialize_(model, method, data=[batch], cache=False, progress=False)
    (embedded,) = {layer.form for layer in report.layers if "embed" in layer.name}
    if embedded == "anchored":
        assert all(float(B0A0(module).norm()) > 1e-4 for module in embeddings(model).values())
    assert torch.equal(logits(model, batch), logits(base, batch))
    perturb(model)
    assert not torch.equal(logits(model, batch), logits(base, batch))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=4"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_dense_weights(name, method):
    base, model, batch = adapted(name)
    hs.initialize_(model, method, data=[batch], cache=False, progress=False)
    perturb(model)
    wide = apart(base)
    weights = dense_weights(model, wide)
    expected, loss = dense_answers(wide, weights, batch)
    assert relative(logits(model, batch).double(), expected.detach()) < 1e-5
    loss.backward()
    model.eval()(**batch).loss.backward()
    for layer, module in embeddings(model).items():
        G = weights[f"{layer}.weight"].grad.T  # (d_out, tokens)
        s = module.scaling["default"]
        A, B = (part.detach().double() for part in both(module, "default"))
        if (held := anchors(module, "default")) is not None:
            A, B = A + held[0].double(), B + held[1].double()
        grad_A, grad_B = (part.grad for part in both(module, "default"))
        assert relative(grad_B.double(), s * G @ A.T) < 1e-4
        assert relative(grad_A.double(), s * B.T @ G) < 1e-4


@pytest.fixture
def seen(monkeypatch):
    """By layer, the gradient that lora-one was given."""
    gradients = {}

    def spied(self, layer, factors=LoRAOne.factors):
        gradients[layer.name] = layer.require_gradient().double()
        return factors(self, layer)

    monkeypatch.setattr(LoRAOne, "factors", spied)
    return gradients


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_mean_of_each_samples_own(name, seen):
    base, _, batch = adapted(name)
    for given in ({"batch_size": 4}, {"memory_budget": 14_000}):
        _, model, _ = adapted(name)
        report = hs.initialize_(model, "lora-one:samples=4", data=[batch], progress=False, **given)
        expected = exact_gradients(base, batch, embeddings(model))
        assert expected and set(expected) <= set(seen)
        for layer, rows in expected.items():
            assert relative(seen[layer], rows.T) < 1e-5, layer
        assert all(parameter.grad is None for parameter in model.parameters())
        seen.clear()
    assert not report.plan.startswith("1 pass")


@pytest.mark.parametrize(
    ("make", "architecture", "targets", "adapted_layers"),
    [
        (tiny_gpt2, "gpt2", ["wte", "wpe"], 2),
        (tiny_t5, "t5", ["embed_tokens"], 2),
        (tiny_t5, "t5", ["relative_attention_bias"], 2),
    ],
)
def test_the_gradient_of_positions_and_of_both_sides_of_an_encoder_decoder(
    make, architecture, targets, adapted_layers, seen
):
    """Whatever is looked up: tokens of either side, places, distances between places."""
    base, batch = make().eval(), ARCHITECTURES[architecture][1]()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets))
    hs.initialize_(model, "lora-one:samples=4", data=[batch], progress=False)
    expected = exact_gradients(base, batch, embeddings(model), two_sided=architecture == "t5")
    assert len(expected) == adapted_layers
    for layer, rows in expected.items():
        assert relative(seen[layer], rows.T) < 1e-5, layer


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_lora_one_is_the_best_of_the_gradient(name):
    base, model, batch = adapted(name)
    hs.initialize_(model, "lora-one:samples=4", data=[batch], progress=False)
    for layer, rows in exact_gradients(base, batch, embeddings(model)).items():
        U, S, Vh = torch.linalg.svd(-rows.T)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        A, B = start_of(embeddings(model)[layer])
        assert float((B @ A * best).sum() / (B @ A).norm() / best.norm()) > 1 - 1e-5


REFUSED = {"eva", "corda", "lora-da", "sc-lora", "lora-null", "gora", "lora-sb", "lora-xs", "loftq", "kfac-newton"}


@pytest.mark.parametrize("method", sorted(set(method_names()) - {"per-layer"}))
def test_every_method_starts_or_says_why_it_cannot(method):
    _, model, batch = adapted("bert")
    before = logits(model, batch)
    given = dict(data=[batch], preserve=[batch], cache=False, progress=False)
    try:
        report = hs.initialize_(model, quick(method), **given)
    except LayerError as error:
        assert "word_embeddings' is an embedding, which method" in str(error) and "can't start: it" in str(error)
        assert torch.equal(logits(model, batch), before)
        return
    assert method not in REFUSED
    forms = {layer.name: layer.form for layer in report.layers}
    for layer, module in embeddings(model).items():
        A, B = start_of(module)
        assert torch.isfinite(A).all() and torch.isfinite(B).all() and (A.norm() > 0 or B.norm() > 0)
        if "word" in layer:
            assert not A[:, 0].any()
        assert forms[layer] in ("kept", "anchored")
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), before)


def test_the_start_of_lora_is_pefts():
    _, model, _ = adapted("llama", beside=False)
    hs.initialize_(model, "lora", progress=False)
    (module,) = embeddings(model).values()
    A, B = (part.detach() for part in both(module, "default"))
    assert not A.any() and abs(float(B.std()) - 1) < 0.25 and abs(float(B.mean())) < 0.25
    model = wrap(base_of("llama"), target_modules=["embed_tokens"], r=4)
    (module,) = embeddings(model).values()
    A, B = (part.detach() for part in both(module, "default"))
    assert not A.any() and abs(float(B.std()) - 1) < 0.25


@pytest.mark.parametrize("method", ["init-ab", "gaussian", "pissa", "lora-one:samples=4"])
def test_the_padding_tokens_row_stays_as_it_is(method):
    _, model, batch = adapted("bert")
    hs.initialize_(model, method, data=[batch], cache=False, progress=False)
    module = embeddings(model)["bert.embeddings.word_embeddings"]
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # so that the padding token matters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    added = update(module)
    assert not added[0].any() and added[1:].norm() > 1e-3


class Small(nn.Module):
    """An embedding with settings of its own, and a head."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 12, **settings)
        self.head = nn.Linear(12, 5)

    def forward(self, input_ids, labels=None):
        scores = self.head(torch.tanh(self.embed(input_ids)).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return {"loss": loss, "logits": scores}


def small_batch():
    ids = torch.tensor([[1, 2, 2, 5], [5, 7, 2, 2], [9, 9, 9, 1]])
    return {"input_ids": ids, "labels": torch.tensor([0, 3, 1])}


def small(settings, **changes):
    return get_peft_model(Small(**settings), LoraConfig(r=3, target_modules=["embed"], **changes))


@pytest.mark.parametrize("setting", [{"scale_grad_by_freq": True}, {"padding_idx": 2}], ids=str)
@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=3"])
def test_settings_of_gradients_are_as_in_pefts_own_layer(setting, method):
    """The start is from the loss's own gradient, whatever the layer makes of its own; A's is as PEFT has it."""
    plain = small({key: value for key, value in setting.items() if key == "padding_idx"})
    hs.initialize_(plain, method, data=[small_batch()], cache=False, progress=False)
    model, reference = small(setting), small(setting)
    hs.initialize_(model, method, data=[small_batch()], cache=False, progress=False)
    (own,), (pefts,), (other,) = (embeddings(one).values() for one in (model, reference, plain))
    for part, expected in zip(start_of(own), start_of(other), strict=True):
        torch.testing.assert_close(part, expected)
    perturb(model)
    whole = factors_of(own)
    with torch.no_grad():
        for part, value in zip(both(pefts, "default"), whole, strict=True):
            part.copy_(value)
        if anchors(own, "default") is not None:
            pefts.get_base_layer().weight -= own.scaling["default"] * B0A0(own).T
    for one in (model, reference):
        one(**small_batch())["loss"].backward()
    for part, expected in zip(both(own, "default"), both(pefts, "default"), strict=True):
        assert part.grad.norm() > 0
        torch.testing.assert_close(part.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_an_embedding_of_sparse_gradients_is_named():
    """PEFT's own adapter of it can't be trained."""
    with pytest.raises(RuntimeError, match="sparse"):
        small({"sparse": True})(**small_batch())["loss"].backward()
    with pytest.raises(LayerError, match=r"'embed' is an embedding with sparse=True"):
        hs.initialize_(small({"sparse": True}), "pissa")


def test_an_embedding_that_cuts_its_rows_is_named():
    with pytest.raises(LayerError, match=r"'embed' is an embedding with max_norm=1.0"):
        hs.initialize_(small({"max_norm": 1.0}), "pissa")


def test_an_embedding_that_does_not_look_its_input_up_is_named():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(r=2, target_modules=["embed_positions"]))
    with pytest.raises(LayerError, match=r"embed_positions' is an OPTLearnedPositionalEmbedding, which does something"):
        hs.initialize_(model, "pissa")


def test_dora_is_refused():
    with pytest.raises(LayerError, match=r"'embed' is an embedding that uses DoRA"):
        hs.initialize_(small({}, use_dora=True), "lora")


@pytest.mark.parametrize("which", ["lora_embedding_A", "init_lora_weights"])
def test_a_trained_adapter_is_refused(which):
    model = small({}, **({"init_lora_weights": False} if which == "init_lora_weights" else {}))
    if which != "init_lora_weights":
        with torch.no_grad():
            model.base_model.model.embed.lora_embedding_A["default"][0, 0] = 1e-6
    with pytest.raises(LayerError, match=r"'embed': lora_embedding_A of adapter 'default' is not zero"):
        hs.initialize_(model, "pissa")


def test_a_rank_over_the_smaller_side_is_named():
    model = wrap(base_of("bert"), target_modules=["token_type_embeddings"])
    with pytest.raises(LayerError, match=r"token_type_embeddings': rank 4 .* 2 \(its weight is 32 x 2\)"):
        hs.initialize_(model, "pissa")


def test_frozen_factors_stay_frozen():
    """MiCA's B, and LoRA-FA's A, whatever adapter PEFT switches on."""
    _, model, _ = adapted("llama")
    hs.initialize_(model, "mica", cache=False, progress=False)
    A, B = both(embeddings(model)["model.embed_tokens"], "default")
    assert A.requires_grad and not B.requires_grad
    model.set_adapter("default")
    assert A.requires_grad and not B.requires_grad
    _, model, _ = adapted("llama")
    with pytest.raises(LayerError, match=r"embed_tokens': its A is zero"):
        hs.lora_fa_(model)
    hs.initialize_(model, "pissa", cache=False, progress=False)
    hs.lora_fa_(model)
    A, B = both(embeddings(model)["model.embed_tokens"], "default")
    assert B.requires_grad and not A.requires_grad


def test_a_batch_of_several_adapters_is_refused_where_peft_would_read_differences():
    _, model, batch = adapted("llama")
    hs.initialize_(model, "pissa", cache=False, progress=False)
    ids, model = batch["input_ids"], model.eval()
    with pytest.raises(LayerError, match=r"embed_tokens': PEFT computes batches of several adapters"):
        model(input_ids=ids, adapter_names=["default", "__base__", "__base__", "default"])
    assert torch.isfinite(model(input_ids=ids, adapter_names=["__base__"] * 4).logits).all()


def test_gemmas_scale_is_that_of_the_rows():
    """The update is one of the weight, before it is multiplied."""
    base, model, batch = adapted("gemma", beside=False)
    hs.initialize_(model, "pissa", cache=False, progress=False)
    perturb(model)
    (module,) = embeddings(model).values()
    tokens = batch["input_ids"]
    wide = tiny_gemma().model.embed_tokens.embed_scale
    expected = (base.get_input_embeddings().weight.double() + update(module))[tokens] * wide.double()
    assert float(wide) == pytest.approx(32**0.5)
    torch.testing.assert_close(module(tokens).double(), expected, rtol=1e-5, atol=1e-5)
