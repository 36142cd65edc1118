"""LoRA-DA's starts on PEFT's own DoRA and VeRA layers (its appendix E)."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model

import headstart as hs
from conftest import ARCHITECTURES, factors_of, logits, tiny_llama, token_batch, wrap
from headstart.layers.find import lora_layers
from headstart.layers.vera import principal_directions

DORA_METHODS = ["lora-da:samples=4", "lora-one:samples=4", "lora", "init-ab-plus"]


def assert_it_trains(model, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**token_batch()).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def dora(base, **changes):
    return wrap(base, use_dora=True, **changes)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("method", DORA_METHODS)
def test_dora_starts_at_the_weight_with_the_product_in_it(architecture, method):
    """Magnitude = row norms of W + s B A, so that nothing is rescaled: the layer is (W + s B A) x."""
    make, batch_of, targets = ARCHITECTURES[architecture]
    base = make().eval()
    plain, split = wrap(copy.deepcopy(base), target_modules=targets), dora(copy.deepcopy(base), target_modules=targets)
    data = [batch_of()]
    for model in (plain, split):
        hs.initialize_(model, method, data=data, progress=False)
    for mine, theirs in zip(lora_layers(split, "default"), lora_layers(plain, "default"), strict=True):
        assert torch.allclose(mine.module.lora_A["default"].weight, theirs.module.lora_A["default"].weight, atol=1e-6)
        assert torch.allclose(mine.module.lora_B["default"].weight, theirs.module.lora_B["default"].weight, atol=1e-6)
        delta = mine.module.get_delta_weight("default")
        weight = mine.module.get_base_layer().weight.detach() + delta
        norms = (weight.T if mine.module.fan_in_fan_out else weight).norm(dim=1)
        assert torch.allclose(mine.module.lora_magnitude_vector["default"].weight.detach(), norms.detach(), rtol=1e-5)
    assert torch.allclose(logits(split.eval(), data[0]), logits(plain.eval(), data[0]), atol=2e-5)


def test_dora_trains_and_is_read_by_plain_peft(tmp_path):
    base = tiny_llama().eval()
    model = dora(copy.deepcopy(base))
    report = hs.initialize_(model, "lora-da:samples=4", data=[token_batch()], progress=False)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert_it_trains(model, lr=1e-2)
    expected = logits(model.eval(), token_batch())
    hs.save_lora(model, tmp_path / "lora")
    model.save_pretrained(tmp_path / "peft")
    for folder in ("lora", "peft"):
        found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert torch.allclose(logits(found, token_batch()), expected, atol=1e-5), folder


def test_dora_refuses_what_is_subtracted_and_stays_as_it_was():
    model = dora(tiny_llama())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(hs.LayerError, match=r"q_proj' uses DoRA.*subtracted"):
        hs.initialize_(model, "pissa", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def vera(base, r=6, **changes):
    torch.manual_seed(1)
    settings = dict(r=r, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], save_projection=True)
    return get_peft_model(base, VeraConfig(**(settings | changes)))


def vera_layers(model):
    return [module for module in model.modules() if hasattr(module, "vera_lambda_b") and hasattr(module, "r")]


@pytest.mark.parametrize("method", ["lora-da:samples=4", "lora-one:samples=4", "pissa"])
def test_vera_gets_the_principal_directions_of_all_layers(method):
    base = tiny_llama().eval()
    expected_logits = logits(copy.deepcopy(base), token_batch())
    model = vera(copy.deepcopy(base))
    old = {side: getattr(vera_layers(model)[0], side)["default"].clone() for side in ("vera_A", "vera_B")}
    report = hs.initialize_(model, method, data=[token_batch()], progress=False)
    assert report.form == "shared dictionary"
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # b is zero: the model starts where it was.
    assert torch.equal(logits(model.eval(), token_batch()), expected_logits)
    lora = wrap(copy.deepcopy(base), r=6, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    hs.initialize_(lora, method, data=[token_batch()], progress=False)
    first = vera_layers(model)[0]
    for place, side in enumerate(("vera_A", "vera_B")):
        found = getattr(first, side)["default"].double()
        assert all(getattr(layer, side)["default"] is getattr(first, side)["default"] for layer in vera_layers(model))
        assert found.shape == old[side].shape
        assert float(found.norm()) == pytest.approx(float(old[side].double().norm()), rel=1e-5)
        rows = found if side == "vera_A" else found.T
        projectors = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for target in lora_layers(lora, "default"):
            weight = factors_of(target.module)[place].detach().double()
            basis = torch.linalg.qr(weight.T if side == "vera_A" else weight).Q
            projectors[: len(basis), : len(basis)] += basis @ basis.T
        values, vectors = torch.linalg.eigh(projectors)
        gap = float(values[-6] - values[-7])
        overlap = torch.linalg.svdvals(torch.nn.functional.normalize(rows, dim=1) @ vectors[:, -6:])
        assert float(overlap.min()) > 1 - 1e-3 / max(gap, 1e-3)


def test_vera_trains_and_is_read_by_plain_peft(tmp_path):
    base = tiny_llama().eval()
    model = vera(copy.deepcopy(base))
    hs.initialize_(model, "lora-da:samples=4", data=[token_batch()], progress=False)
    assert_it_trains(model, lr=1e-1)
    model.save_pretrained(tmp_path / "vera")
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "vera").eval()
    assert torch.allclose(logits(found, token_batch()), logits(model.eval(), token_batch()), atol=1e-5)


def test_a_dictionary_larger_than_the_space_is_filled_up():
    model = vera(tiny_llama(), r=60)
    hs.initialize_(model, "lora-da:samples=4", data=[token_batch()], progress=False)
    A = vera_layers(model)[0].vera_A["default"]
    assert A.shape[0] == 60 and bool(torch.isfinite(A).all())
    assert int(torch.linalg.matrix_rank(A)) == A.shape[1]


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [("lora", {}, "zero factor"), ("lora-da:samples=4", {"save_projection": False}, "save_projection=True")],
)
def test_vera_refuses_what_would_be_lost(method, changes, words):
    with pytest.raises(hs.LayerError, match=words):
        hs.initialize_(vera(tiny_llama(), **changes), method, data=[token_batch()], progress=False)


def test_vera_that_is_trained_already():
    model = vera(tiny_llama())
    with torch.no_grad():
        vera_layers(model)[1].vera_lambda_b["default"].fill_(0.5)
    with pytest.raises(hs.LayerError, match="already trained"):
        hs.initialize_(model, "lora-da:samples=4", data=[token_batch()], progress=False)


def test_principal_directions_of_one_space_are_the_space():
    generator = torch.Generator().manual_seed(0)
    space, random = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    found = principal_directions([space, 5 * space], random)
    overlap = torch.linalg.svdvals(torch.nn.functional.normalize(found, dim=1) @ torch.linalg.qr(space.T).Q)
    assert float(overlap.min()) == pytest.approx(1, abs=1e-5)
