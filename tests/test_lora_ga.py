"""LoRA-GA's two conventions, in all directions and scales, against dense decompositions and PEFT's own arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from torch import nn

import headstart as hs
from conftest import all_factors, logits, tiny_llama, token_batch, wrap
from inputs import product
from known_layers import SHAPES, everything, from_spectrum, layer, normal
from oracles import relative

CONVENTIONS = ("authors", "peft")
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight", "gd", "unit")
ALL = list(itertools.product(CONVENTIONS, DIRECTIONS, SCALES))
R = 4


def known(d_out=48, d_in=30, r=R, s=2.0, **given):
    """A layer with a gradient of distinct singular values and a weight."""
    G = from_spectrum(d_out, d_in, torch.logspace(-2, -4, min(d_out, d_in)), seed=3).float()
    return layer(d_out, d_in, r, s=s, **({"gradient": G, "weight": normal(d_out, d_in, seed=5)} | given))


def places(directions, convention, at):
    """Which triplets, counted from 0, A and B take."""
    if directions == "random":
        drawn = torch.randperm(2 * at.r, generator=at.generator()).tolist()
        return drawn[: at.r], drawn[: at.r] if convention == "peft" else drawn[at.r :]
    of_A = {"ArB2r": range(at.r), "A2rBr": range(at.r, 2 * at.r), "ArBr": range(1, 2 * at.r, 2)}[directions]
    of_B = {"ArB2r": range(at.r, 2 * at.r), "A2rBr": range(at.r), "ArBr": range(0, 2 * at.r, 2)}[directions]
    return list(of_A), list(of_B)


def expected(at, convention, directions, scale, gamma=16.0):
    """What the published lines say, from dense decompositions, with each right vector's largest entry positive."""
    U, S, Vh = torch.linalg.svd(at.gradient.double(), full_matrices=False)
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    U, Vh = U * signs.T, Vh * signs
    of_A, of_B = places(directions, convention, at)
    A, B = Vh[of_A], U[:, of_B]
    sigma = torch.linalg.svdvals(at.weight.double())
    stable = at.d_out**0.25 / math.sqrt(gamma)
    if convention == "authors":
        size = {"stable": stable, "weight": (sigma[: at.r] / at.scaling).sqrt().mean(), "gd": 1 / at.scaling, "unit": 1}
        return A * size[scale], B * size[scale]
    B = B * S[of_B]
    size = {"stable": stable, "weight": sigma[0] / S[of_B[0]], "gd": 1 / at.scaling, "unit": 1}[scale]
    return A / at.scaling if scale == "gd" else A, B * size


@pytest.mark.parametrize(("convention", "directions", "scale"), ALL)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_every_published_start(convention, directions, scale, d_out, d_in):
    at = known(d_out, d_in)
    start = hs.LoRAGA(convention=convention, directions=directions, scale=scale, gamma=9.0).factors(at)
    A, B = expected(at, convention, directions, scale, gamma=9.0)
    assert relative(start.A, A) < 2e-5
    assert relative(start.B, B) < 2e-5


def pefts_own(at, directions, scale, monkeypatch):
    """The factors and the weight after PEFT's ``lora_ga_init`` of a layer whose gradient is given."""
    settings = LoraGAConfig(
        direction=directions, scale={"weight": "weight_svd", "gd": "gd_scale"}.get(scale, scale), stable_gamma=16
    )
    model = nn.Sequential(nn.Linear(at.d_in, at.d_out, bias=False))
    model.config = type("Config", (), {"model_type": "one"})()
    model = wrap(model, target_modules=["0"], r=at.r, lora_alpha=at.scaling * at.r)
    module = model.base_model.model[0]
    base = module.get_base_layer()
    base.weight.data, base._peft_loraga_grad = at.weight.clone(), at.gradient.clone()
    with monkeypatch.context() as patch:
        drawn = torch.randperm(2 * at.r, generator=at.generator())
        patch.setattr(torch, "randperm", lambda count: drawn)
        module.lora_ga_init("default", settings)
    return module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach(), base.weight.detach()


@pytest.mark.parametrize(("directions", "scale"), itertools.product(DIRECTIONS, SCALES))
def test_the_peft_convention_is_pefts_own(directions, scale, monkeypatch):
    """Of a gradient and a weight of low rank, whose randomised decompositions are exact but for rounding."""
    G = from_spectrum(40, 36, torch.linspace(2e-2, 1e-3, 2 * R), seed=3).float()
    W = from_spectrum(40, 36, torch.linspace(3.0, 1.0, R), seed=6).float()
    at = known(40, 36, gradient=G, weight=W)
    start = hs.LoRAGA(convention="peft", directions=directions, scale=scale).factors(at)
    A, B, left = pefts_own(at, directions, scale, monkeypatch)
    for one, other in (*zip(start.A, A, strict=True), *zip(start.B.T, B.T, strict=True)):
        # Its signs are what its random numbers make them.
        assert min(relative(one, other), relative(one, -other)) < 2e-4
    assert relative(W - left, at.scaling * B @ A) < 1e-4
    if directions == "random":
        # Vectors of one triplet: the product has no free signs.
        assert relative(product(start), B.double() @ A.double()) < 2e-4


@pytest.mark.parametrize(("convention", "directions", "scale"), ALL)
def test_the_gradient_does_not_pair_the_factors(convention, directions, scale):
    """B'G A' is zero, as A and B take different triplets; of PEFT's random ones it is diagonal."""
    at = known()
    start = hs.LoRAGA(convention=convention, directions=directions, scale=scale).factors(at)
    between = start.B.double().T @ at.gradient.double() @ start.A.double().T
    largest = float(start.B.norm() * start.A.norm() * torch.linalg.svdvals(at.gradient)[0])
    if convention == "peft" and directions == "random":
        assert float(between.diagonal().abs().min()) > 0
        between = between - between.diagonal().diag()
    assert float(between.abs().max()) < 1e-5 * largest


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_is_drawn_depends_on_seed_and_name_alone(convention):
    method = hs.LoRAGA(convention=convention, directions="random")
    at = known(60, 60, r=12)
    first = method.factors(at)
    torch.manual_seed(123)
    again = method.factors(dataclasses.replace(at))
    assert torch.equal(first.A, again.A) and torch.equal(first.B, again.B)
    for other in (dataclasses.replace(at, seed=1), dataclasses.replace(at, name="another")):
        assert not torch.equal(first.A, method.factors(other).A)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_the_authors_product_has_equal_singular_values(directions):
    at = known(s=0.5)
    for scale, value in (("unit", 0.5), ("stable", 0.5 * math.sqrt(48) / 16), ("gd", 2.0)):
        start = hs.LoRAGA(directions=directions, scale=scale).factors(at)
        S = torch.linalg.svdvals(product(start, 0.5))[:R]
        assert torch.allclose(S, torch.full_like(S, value), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_holds_the_product_below_the_weight(size):
    at = known(weight=normal(48, 30, seed=5) * size)
    plain, clipped = (hs.LoRAGA(scale="unit", norm_clip=clip).factors(at) for clip in (False, True))
    before, after = (float(product(start, at.scaling).abs().max()) for start in (plain, clipped))
    limit = float(at.weight.abs().max())
    assert after == pytest.approx(min(before, limit), rel=1e-5)
    ratio = min(1.0, limit / before)
    assert relative(clipped.A, plain.A * math.sqrt(ratio)) < 1e-5
    assert relative(clipped.B, plain.B * math.sqrt(ratio)) < 1e-5
    assert clipped.info["clipped"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("settings", [{"scale": "weight"}, {"norm_clip": True}, {"scale": "weight", "norm_clip": True}])
def test_a_weight_of_zeros_starts_as_lora_does_and_says_so(settings):
    at = known(weight=torch.zeros(48, 30))
    start = hs.LoRAGA(**settings).factors(at)
    assert torch.equal(start.A, hs.LoRA().factors(at).A)
    assert "its weight is zero" in start.note


def test_pefts_first_singular_value_of_zero_leaves_B_as_it_is():
    at = known(gradient=from_spectrum(48, 30, [1e-2] * 3, seed=3).float())
    start = hs.LoRAGA(convention="peft", scale="weight").factors(at)
    assert bool(torch.isfinite(start.B).all())


def test_the_weight_is_read_where_it_is_needed_and_only_there():
    at = everything()
    for settings, needed in (
        ({}, False),
        ({"scale": "gd"}, False),
        ({"scale": "weight"}, True),
        ({"norm_clip": True}, True),
    ):
        method = hs.LoRAGA(**settings)
        assert method.wants(at).weight == needed and method.wants(at).gradient
        if needed:
            with pytest.raises(hs.LayerError, match="the layer's weight"):
                method.factors(dataclasses.replace(at, weight=None))
        else:
            assert method.factors(dataclasses.replace(at, weight=None)).note == ""


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(hs.MethodError, match="norm_clip is of the authors' convention"):
        hs.LoRAGA(convention="peft", norm_clip=True)
    for setting in ("convention", "directions", "scale"):
        with pytest.raises(hs.MethodError, match=setting):
            hs.LoRAGA(**{setting: "other"})


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("text", ["convention=peft", "scale=weight,norm_clip=True", "directions=random"])
def test_the_model_starts_where_it_was(text, form):
    model, batch = wrap(tiny_llama()), token_batch()
    before = logits(model, batch)
    hs.initialize_(model, f"lora-ga:samples=4,{text}", data=[batch], form=form)
    assert torch.allclose(logits(model, batch), before, atol=1e-5)
    factors = all_factors(model)
    assert all(bool(A.count_nonzero()) and bool(B.count_nonzero()) for A, B in factors.values())
