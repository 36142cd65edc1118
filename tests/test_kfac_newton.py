"""kfac-newton against dense powers in float64: its formula, what it is the best of, and what does not change it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import logits, started, tiny_llama, token_batch
from headstart.methods.base import Kronecker
from inputs import NAME, product
from known_layers import everything, layer, normal
from oracles import best, exact_factors, relative
from snapshots import targets_of

POWERS = (0.0, 0.25, 0.5, 0.8, 1.0)


def moment(n, *, decades=1.0, seed=0, scale=1.0):
    """A second moment (n, n) with eigenvalues over some decades."""
    Q = torch.linalg.qr(normal(n, n, seed=seed).double()).Q
    return scale * (Q * torch.logspace(0, -decades, n, dtype=torch.float64)) @ Q.T


def of(G, Z, Y, r, s=2.0, **given_facts):
    kronecker = Kronecker(Z, Y, torch.zeros(len(Z)), torch.zeros(len(Y)), 100)
    return layer(*G.shape, r, s=s, gradient=G, kronecker=kronecker, **given_facts)


def problem(d_out=14, d_in=11, r=3, seed=0, **changes):
    Z, Y = moment(d_in, seed=seed + 1), moment(d_out, seed=seed + 2, scale=1e-6)
    return of(normal(d_out, d_in, seed=seed, std=1e-3), Z, Y, r, **changes)


def damped(moment_, damping):
    moment_ = moment_.double().diag() if moment_.dim() == 1 else moment_.double()
    return moment_ + math.sqrt(damping) * moment_.diagonal().mean() * torch.eye(len(moment_), dtype=torch.float64)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def step(at, p, damping, rank=None):
    """D by its definition."""
    Z, Y = damped(at.kronecker.inputs, damping), damped(at.kronecker.outputs, damping)
    whitened = power(Y, -p) @ at.gradient.double() @ power(Z, -p)
    return -power(Y, -p) @ best(whitened, rank or at.r) @ power(Z, -p)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("damping", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("d_out", "d_in"), [(14, 11), (11, 14), (12, 12)])
@pytest.mark.parametrize("fisher", ["full", "diagonal"])
def test_the_product_is_the_definitions(p, damping, d_out, d_in, fisher):
    at = problem(d_out, d_in)
    if fisher == "diagonal":
        at = dataclasses.replace(
            at, kronecker=dataclasses.replace(at.kronecker, outputs=at.kronecker.outputs.diagonal().float())
        )
    D = step(at, p, damping)
    sigma = torch.linalg.svdvals(D)[0]
    normalised = hs.KFACNewton(p=p, damping=damping, fisher=fisher, gamma=8).factors(at)
    assert relative(product(normalised), D / sigma / 8) < 1e-5
    assert float(torch.linalg.svdvals(product(normalised, at.scaling))[0]) == pytest.approx(at.scaling / 8, rel=1e-5)
    plain = hs.KFACNewton(p=p, damping=damping, fisher=fisher, gamma=8, normalize=False).factors(at)
    assert relative(product(plain), D / 8) < 1e-5
    for start in (normalised, plain):
        B, A = start.B.double(), start.A.double()
        assert torch.allclose(B.T @ B, A @ A.T, atol=1e-6 * float(B.norm()) ** 2)
        assert start.info["sigma"] == pytest.approx(float(sigma), rel=1e-5)
        assert start.repair == "" and start.note == ""


def test_at_full_rank_it_is_newtons_step():
    at = problem(9, 12, r=9)
    Z, Y = damped(at.kronecker.inputs, 0.1), damped(at.kronecker.outputs, 0.1)
    start = hs.KFACNewton(normalize=False, gamma=1).factors(at)
    newton = -torch.linalg.solve(Y, at.gradient.double()) @ torch.linalg.inv(Z)
    assert relative(product(start), newton) < 1e-5


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_factors_that_are_multiples_of_the_identity_leave_lora_one(p, damping):
    G = normal(14, 11, std=1e-3)
    at = of(G, 3.0 * torch.eye(11), 1e-7 * torch.eye(14), 4)
    start, one = hs.KFACNewton(p=p, damping=damping).factors(at), hs.LoRAOne().factors(at)
    assert relative(start.A, one.A) < 1e-5 and relative(start.B, one.B) < 1e-5


@pytest.mark.parametrize("gamma", [1.0, 128.0])
def test_without_whitening_it_is_lora_one_itself(gamma):
    at = problem()
    method = hs.KFACNewton(p=0.0, gamma=gamma)
    start, one = method.factors(at), hs.LoRAOne(gamma=gamma).factors(at)
    assert torch.equal(start.A, one.A) and torch.equal(start.B, one.B)
    assert str(method.wants(at)) == "gradient"
    assert relative(product(method.factors(dataclasses.replace(at, kronecker=None))), product(one)) == 0


def model_value(at, D, damping):
    """K-FAC's quadratic model of the loss's change."""
    Z, Y = damped(at.kronecker.inputs, damping), damped(at.kronecker.outputs, damping)
    return float((at.gradient.double() * D).sum() + 0.5 * torch.trace(D.T @ Y @ D @ Z))


@settings(max_examples=80, deadline=None)
@given(
    d_out=st.integers(2, 10),
    d_in=st.integers(2, 10),
    damping=st.sampled_from([1e-3, 0.1, 1.0]),
    decades=st.floats(0, 3),
    near=st.floats(-6, 1),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_no_other_step_of_its_rank_is_better_in_the_model(d_out, d_in, damping, decades, near, seed, data):
    r = data.draw(st.integers(1, min(d_out, d_in)))
    Z, Y = moment(d_in, decades=decades, seed=seed), moment(d_out, decades=decades, seed=seed + 1)
    at = of(normal(d_out, d_in, seed=seed), Z, Y, r)
    start = hs.KFACNewton(damping=damping, normalize=False, gamma=1).factors(at)
    value = model_value(at, product(start), damping)
    # Beside it: its factors moved a little or much, and steps of other methods at their own best lengths.
    moved_B = start.B.double() + 10**near * normal(d_out, r, seed=seed + 2).double()
    moved_A = start.A.double() + 10**near * normal(r, d_in, seed=seed + 3).double()
    trials = [product(start) * (1 + near), moved_B @ moved_A, *(step(at, p, damping) for p in POWERS)]
    trials.append(best(-torch.linalg.solve(Y, at.gradient.double()) @ torch.linalg.inv(Z), r))
    for D in trials:
        curvature = model_value(at, D, damping) - float((at.gradient.double() * D).sum())
        length = -float((at.gradient.double() * D).sum()) / (2 * curvature) if curvature > 0 else 1.0
        for trial in (D, length * D):
            assert value <= model_value(at, trial, damping) + 1e-6 * abs(value)
    assert value < 0


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("units", [1e-6, 1e-3, 1e4])
@pytest.mark.parametrize("what", ["loss", "inputs"])
def test_units_change_the_size_alone(p, units, what):
    at = problem()
    kronecker = at.kronecker
    changed = (
        dataclasses.replace(kronecker, outputs=kronecker.outputs * units**2)
        if what == "loss"
        else dataclasses.replace(kronecker, inputs=kronecker.inputs * units**2)
    )
    other = dataclasses.replace(at, gradient=at.gradient.double() * units, kronecker=changed)
    start, again = (hs.KFACNewton(p=p).factors(each) for each in (at, other))
    assert relative(again.A, start.A) < 1e-5 and relative(again.B, start.B) < 1e-5
    plain, sized = (hs.KFACNewton(p=p, normalize=False).factors(each) for each in (at, other))
    assert relative(product(sized), product(plain) * units ** (1 - 4 * p)) < 1e-5


@pytest.mark.parametrize("fisher", ["full", "diagonal"])
def test_without_damping_a_factor_that_cant_be_inverted_is_repaired_and_reported(fisher):
    at = problem()
    outputs = at.kronecker.outputs.float()
    outputs[:2], outputs[:, :2] = 0, 0
    outputs = outputs.diagonal().clone() if fisher == "diagonal" else outputs
    at = dataclasses.replace(at, kronecker=dataclasses.replace(at.kronecker, outputs=outputs))
    start = hs.KFACNewton(damping=0.0, fisher=fisher).factors(at)
    assert bool(torch.isfinite(start.B).all() and torch.isfinite(start.A).all())
    assert start.repair.startswith("damping of output gradients to")


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_gradient_starts_as_lora_does_and_says_so(p):
    at = dataclasses.replace(problem(), gradient=torch.zeros(14, 11), kronecker=None)
    start = hs.KFACNewton(p=p).factors(at)
    assert torch.equal(start.A, hs.LoRA().factors(at).A)
    assert "no gradient" in start.note


def test_a_step_out_of_range_is_a_sentence():
    at = dataclasses.replace(problem(), gradient=torch.full((14, 11), 1e30))
    with pytest.raises(hs.LayerError, match=f"{NAME}.*out of the range of numbers; raise damping"):
        hs.KFACNewton(p=1.0, normalize=False).factors(at)
    assert bool(torch.isfinite(hs.KFACNewton(p=1.0).factors(at).A).all())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("p", -0.1), ("p", 1.1), ("p", math.nan), ("damping", -1.0), ("damping", math.inf), ("gamma", 0.0)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(hs.MethodError, match=setting):
        hs.KFACNewton(**{setting: value})


def test_layers_that_share_an_input_invert_it_once(monkeypatch):
    from headstart.methods import kfac_newton

    sizes, plain = [], kfac_newton.damped_inverse
    monkeypatch.setattr(kfac_newton, "damped_inverse", lambda m, d: sizes.append(len(m)) or plain(m, d))
    at = problem()
    other = dataclasses.replace(at, gradient=normal(14, 11, seed=9, std=1e-3), name="other")
    together = hs.KFACNewton().factors_batch([at, other])
    assert sizes == [11, 14, 14]
    for each, start in zip((at, other), together, strict=True):
        alone = hs.KFACNewton().factors(each)
        assert torch.equal(alone.A, start.A) and torch.equal(alone.B, start.B)


def test_needs_are_said():
    assert str(hs.KFACNewton().wants(everything())) == "gradient + Fisher factors"
    assert hs.KFACNewton(fisher="diagonal").wants(everything()).outputs == "diagonal"


@pytest.mark.parametrize("tokens", ["attention", "labels"])
@pytest.mark.parametrize("padded", [False, True])
def test_end_to_end_from_one_sample_at_a_time(tokens, padded):
    """Whatever the batches, their order and their padding."""
    base = tiny_llama().double()
    batch = token_batch(padded=padded)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(2, 4), slice(0, 2))]
    method = f"kfac-newton:samples=4,gamma=4,tokens={tokens}"
    for data in ([batch], halves):
        model = started(tiny_llama().double(), method, data=data)
        targets = targets_of(model)
        exact = exact_factors(base, [batch], list(targets), tokens=tokens)
        for name, target in targets.items():
            known = exact[name]
            at = of(known.gradient, known.Z, known.Y, 4)
            D = step(at, 0.5, 0.1)
            found = target.module.lora_B["default"].weight @ target.module.lora_A["default"].weight
            assert relative(found.detach(), D / torch.linalg.svdvals(D)[0] / 4) < 1e-3, name


def test_the_loss_falls():
    model, batch = tiny_llama(), token_batch()
    model.eval()
    before = float(model(**batch).loss.detach())
    model = started(model, "kfac-newton:samples=4", data=[batch]).eval()
    assert float(model(**batch).loss.detach()) < before
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
