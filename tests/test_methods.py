"""Every method against slow, dense float64 formulas written from METHODS.md, not from the code."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import factors_of, tiny_llama, wrap
from headstart.layers.find import lora_layers
from headstart.methods import Moments, method_class, parse_method, registry
from headstart.methods.base import ANY_LAYER, Factors, Kronecker, Layer, Method, Training
from oracles import best, relative, tail

NAME = "model.layers.0.self_attn.q_proj"

# A large layer, in which sampling errors are small: A has 16,384 entries, B 12,288.
D_OUT, D_IN, R = 768, 1024, 16

ZERO_PRODUCT = ("lora", "init-a", "init-b", "gaussian", "orthogonal")
DRAWN = (*ZERO_PRODUCT, "init-ab", "init-ab-plus", "inilora-alpha", "inilora-beta")
DRAWN_VARIANTS = (
    *DRAWN,
    "init-a:distribution=uniform",
    "init-b:distribution=uniform",
    "init-ab:distribution=uniform",
    *(f"inilora-beta:distribution={name}" for name in ("K-U", "xavier-normal", "xavier-uniform", "normal", "uniform")),
    "inilora-beta:distribution=orthogonal",
    "inilora-beta:distribution=sparse",
    "inilora:steps=0",
    "inilora:solver=svd,gauge=random",
    "inilora:solver=svd,gauge=aligned",
)


def normal(*shape, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).float()


def layer(d_out=D_OUT, d_in=D_IN, r=R, *, s=1.0, **given):
    return Layer(**(dict(name=NAME, d_out=d_out, d_in=d_in, r=r, scaling=s) | given))


def of_weight(W, r, *, s=1.0, **given):
    given = dict(moments=Moments(0.0, float(W.double().std(correction=0)))) | given
    return layer(*W.shape, r, s=s, weight=W, **given)


def of_gradient(G, r, **given):
    return layer(*G.shape, r, gradient=G, **given)


def everything(d_out=24, d_in=20, r=4, s=1.5, seed=0, name=NAME):
    """A layer of which all is known that any method asks for."""
    W, G = normal(d_out, d_in, seed=11), normal(d_out, d_in, seed=12, std=1e-3)
    x, g = normal(4 * d_in, d_in, seed=13), normal(4 * d_in, d_out, seed=14, std=1e-2)
    Z, Y = x.T @ x / len(x), g.square().mean(0)
    kronecker = Kronecker(inputs=Z, outputs=Y, mean_input=x.mean(0), mean_output=g.mean(0), tokens=len(x))
    original = W + normal(d_out, d_in, seed=15, std=0.05)
    known = dict(gradient=G, kronecker=kronecker, original=original, training=Training(1000, 1e-3))
    return of_weight(W, r, s=s, seed=seed, name=name, **known)


def product(found):
    return found.B.double() @ found.A.double()


def from_spectrum(d_out, d_in, S, seed=0):
    k = len(S)
    U = torch.linalg.qr(normal(d_out, k, seed=seed).double()).Q
    V = torch.linalg.qr(normal(d_in, k, seed=seed + 1).double()).Q
    return (U @ torch.diag(torch.as_tensor(S, dtype=torch.float64)) @ V.T).float()


def assert_drawn(matrix, std, shape="normal"):
    """Mean, deviation and fourth moment within five standard errors; for uniform draws the bounds as well."""
    x = matrix.double().flatten()
    n = len(x)
    kurtosis = {"normal": 3.0, "uniform": 1.8}[shape]
    assert abs(float(x.mean())) < 5 * std / math.sqrt(n)
    # Var(mean of x^2) = (kurtosis - 1) std^4 / n.
    assert float(x.square().mean()) / std**2 == pytest.approx(1, abs=5 * math.sqrt((kurtosis - 1) / n))
    # Var(mean of x^4) = (E x^8 - (E x^4)^2) / n: 105 - 9 for normal, 9 - 3.24 (in std^8) for uniform draws.
    spread = {"normal": 96.0, "uniform": 81 / 9 - 1.8**2}[shape]
    assert float(x.pow(4).mean()) / std**4 == pytest.approx(kurtosis, abs=5 * math.sqrt(spread / n))
    if shape == "uniform":
        bound = math.sqrt(3) * std
        assert float(x.abs().max()) <= bound * (1 + 1e-6)
        # Chance of no entry in the outer hundredth: 0.99^12288 = 2e-54.
        assert float(x.max()) > 0.98 * bound
        assert float(x.min()) < -0.98 * bound


def assert_uncorrelated(x, y):
    x, y = x.double().flatten(), y.double().flatten()
    n = min(len(x), len(y))
    assert abs(float(torch.corrcoef(torch.stack((x[:n], y[:n])))[0, 1])) < 5 / math.sqrt(n)


# What all methods promise.


OWN = hs.method_names()


@pytest.mark.parametrize("name", OWN)
def test_every_method_gives_finite_factors_of_the_right_shape(name):
    given_layer = everything()
    W, G = given_layer.weight.clone(), given_layer.gradient.clone()
    state = torch.random.get_rng_state()
    method = hs.get_method(name, **({"steps": 5} if name == "inilora" else {}))
    found = method.factors(given_layer)
    assert found.A.shape == (4, 20) and found.B.shape == (24, 4)
    assert found.A.dtype == found.B.dtype == torch.float32
    assert bool(torch.isfinite(found.A).all() and torch.isfinite(found.B).all())
    assert (found.core is not None) == (method.form == "core")
    assert found.note == ""
    # A pure function: the inputs are as they were, and so is torch's own generator.
    assert torch.equal(given_layer.weight, W) and torch.equal(given_layer.gradient, G)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = method.factors(given_layer)
    assert torch.equal(again.A, found.A) and torch.equal(again.B, found.B)


@pytest.mark.parametrize("name", OWN)
def test_a_batch_is_the_same_as_one_at_a_time(name):
    method = hs.get_method(name, **({"steps": 20} if name == "inilora" else {}))
    layers = [
        dataclasses.replace(
            everything(name=f"layer{i}"),
            weight=normal(24, 20, seed=i),
            original=normal(24, 20, seed=i) + normal(24, 20, seed=15, std=0.05),
            gradient=normal(24, 20, seed=i),
        )
        for i in range(3)
    ]
    for given_layer, together in zip(layers, method.factors_batch(layers), strict=True):
        alone = method.factors(given_layer)
        assert torch.allclose(alone.A, together.A, rtol=1e-5, atol=1e-6)
        assert torch.allclose(alone.B, together.B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", hs.method_names())
def test_every_method_is_exported_and_described(name):
    cls = method_class(name)
    assert cls.name == name
    assert getattr(hs, cls.__name__) is cls
    assert cls.__name__ in hs.__all__
    assert cls.source
    assert cls.cost
    assert cls.__doc__ and "Source:" in cls.__doc__
    assert [n for n in hs.method_names() if method_class(n) is cls] == [name]


def test_methods_of_the_three_tables_are_there():
    names = hs.method_names()
    assert len(names) == len(set(names))
    assert set(DRAWN) | {"inilora", "pissa", "milora", "olora", "lora-ga", "lora-one"} <= set(names)


def test_needs_are_those_of_the_table():
    expected = dict.fromkeys(DRAWN, "shapes") | dict.fromkeys(("pissa", "milora", "olora", "lora-xs"), "weight")
    expected |= dict.fromkeys(("lora-ga", "lora-one", "lora-sb"), "gradient")
    expected |= {"inilora": "weight + moments", "lora-da": "gradient + Fisher factors"}
    assert {name: str(method_class(name)().wants(ANY_LAYER)) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("init-ab", "anchored"),
        ("init-ab-plus", "kept"),
        ("inilora-alpha", "anchored"),
        ("inilora-beta", "anchored"),
        ("inilora:solver=svd", "anchored"),
        ("pissa", "anchored"),
        ("milora", "anchored"),
        ("olora", "anchored"),
        ("lora-ga", "anchored"),
        ("lora-one", "kept"),
        ("lora-da", "kept"),
        ("lora-xs", "core"),
        ("lora-sb", "core"),
    ],
)
def test_the_form_of_a_start_is_known_before_it_is_made(name, form):
    assert parse_method(name).form == form


@pytest.mark.parametrize("text", DRAWN_VARIANTS)
def test_draws_depend_on_seed_and_name_alone(text):
    method = parse_method(text)
    names = ["a.q_proj", "b.q_proj", "a.v_proj"]
    first = {name: method.factors(everything(name=name)) for name in names}
    second = {name: method.factors(everything(name=name)) for name in reversed(names)}
    for name in names:
        assert torch.equal(first[name].A, second[name].A) and torch.equal(first[name].B, second[name].B)
    other_seed = method.factors(everything(name=names[0], seed=1))
    for other in (other_seed, first[names[1]], first[names[2]]):
        mine = first[names[0]]
        assert not torch.equal(mine.A, other.A) or not torch.equal(mine.B, other.B)
        # Not merely another sign or scale: a drawn factor of another stream is another matrix.
        drawn = "A" if mine.A.count_nonzero() and not torch.equal(mine.A, other.A) else "B"
        x, y = getattr(mine, drawn).flatten(), getattr(other, drawn).flatten()
        if not text.startswith("inilora:solver"):  # there the draw only turns the factors
            assert abs(float(torch.cosine_similarity(x, y, dim=0))) < 0.6


@settings(max_examples=30, deadline=None)
@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40), st.text(max_size=20), st.text(max_size=20))
@example(1, 11, "1x", "x")
def test_any_two_streams_differ(seed, other_seed, name, other_name):
    method = hs.InitAB()
    mine = method.factors(layer(6, 8, 2, seed=seed, name=name))
    other = method.factors(layer(6, 8, 2, seed=other_seed, name=other_name))
    assert torch.equal(mine.A, other.A) == ((seed, name) == (other_seed, other_name))


# Random starts.


def test_lora_is_kaiming_uniform_with_a_sqrt_5():
    found = hs.LoRA().factors(layer())
    assert not found.B.any()
    assert_drawn(found.A, math.sqrt(1 / (3 * D_IN)), "uniform")
    # The same as torch's own: gain sqrt(2 / (1 + 5)), bound gain sqrt(3 / fan-in).
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(R, D_IN), a=math.sqrt(5))
    assert float(theirs.abs().max()) == pytest.approx(float(found.A.abs().max()), rel=0.01)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("beta", [0.25, 1.0, 16.0])
def test_init_a(beta, shape):
    found = hs.InitA(beta=beta, distribution=shape).factors(layer())
    assert not found.B.any()
    assert_drawn(found.A, beta / math.sqrt(D_IN), shape)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
def test_init_b(shape):
    found = hs.InitB(distribution=shape).factors(layer())
    assert not found.A.any()
    assert_drawn(found.B, math.sqrt(1 / R), shape)


def test_gaussian_is_pefts():
    found = hs.Gaussian().factors(layer())
    assert not found.B.any()
    assert_drawn(found.A, 1 / R)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("beta", [0.25, 1.0, 8.0])
@pytest.mark.parametrize(
    ("scheme", "exponent_A", "exponent_B"), [("adam", -0.5, -0.5), ("sgd", -0.75, -0.25), ("lora+", -1.0, 0.0)]
)
@pytest.mark.parametrize("cls", [hs.InitAB, hs.InitABPlus])
def test_init_ab(cls, scheme, exponent_A, exponent_B, beta, shape):
    found = cls(beta=beta, scheme=scheme, distribution=shape).factors(layer())
    assert_drawn(found.A, beta * D_IN**exponent_A, shape)
    assert_drawn(found.B, beta * D_IN**exponent_B, shape)
    assert_uncorrelated(found.A, found.B)


@pytest.mark.parametrize("text", ["", ":beta=4,scheme=sgd", ":distribution=uniform"])
def test_init_ab_plus_is_the_same_draw(text):
    mine, plus = (parse_method(name + text).factors(layer(40, 30, 4)) for name in ("init-ab", "init-ab-plus"))
    assert torch.equal(mine.A, plus.A) and torch.equal(mine.B, plus.B)


def test_the_width_is_d_in_not_d_out():
    tall, wide = (hs.InitAB().factors(layer(d_out, d_in, 16)) for d_out, d_in in ((4096, 256), (256, 4096)))
    for found, width in ((tall, 256), (wide, 4096)):
        assert_drawn(found.A, 1 / math.sqrt(width))
        assert_drawn(found.B, 1 / math.sqrt(width))


@pytest.mark.parametrize("std", [None, 1e-4, 1.5])
def test_inilora_alpha(std):
    found = (hs.IniLoRAAlpha() if std is None else hs.IniLoRAAlpha(std=std)).factors(layer())
    assert_drawn(found.A, std or 0.5)
    assert_drawn(found.B, std or 0.5)
    assert_uncorrelated(found.A, found.B)


# Standard deviations of A (r, d_in) and B (d_out, r), and their form, from torch's documentation.
BETA = {
    "kaiming-normal": (math.sqrt(2 / D_IN), math.sqrt(2 / R), "normal"),
    "kaiming-uniform": (math.sqrt(2 / D_IN), math.sqrt(2 / R), "uniform"),
    "xavier-normal": (math.sqrt(2 / (D_IN + R)), math.sqrt(2 / (R + D_OUT)), "normal"),
    "xavier-uniform": (math.sqrt(2 / (D_IN + R)), math.sqrt(2 / (R + D_OUT)), "uniform"),
    "normal": (0.01, 0.01, "normal"),
    "uniform": (0.1 / math.sqrt(3), 0.1 / math.sqrt(3), "uniform"),
}


@pytest.mark.parametrize("distribution", BETA)
def test_inilora_beta(distribution):
    std_A, std_B, shape = BETA[distribution]
    found = hs.IniLoRABeta(distribution=distribution).factors(layer())
    assert_drawn(found.A, std_A, shape)
    assert_drawn(found.B, std_B, shape)
    assert_uncorrelated(found.A, found.B)


@pytest.mark.parametrize(("short", "full"), [("K-N", "kaiming-normal"), ("K-U", "kaiming-uniform")])
def test_inilora_beta_has_the_papers_names(short, full):
    assert hs.IniLoRABeta(distribution=short) == hs.IniLoRABeta(distribution=full)
    assert hs.IniLoRABeta() == hs.IniLoRABeta(distribution="K-N")


def test_inilora_beta_orthogonal():
    found = hs.IniLoRABeta(distribution="orthogonal").factors(layer())
    assert torch.allclose(found.A @ found.A.T, torch.eye(R), atol=1e-5)
    assert torch.allclose(found.B.T @ found.B, torch.eye(R), atol=1e-5)


def test_inilora_beta_sparse():
    found = hs.IniLoRABeta(distribution="sparse").factors(layer())
    for matrix in (found.A, found.B):
        # Half of each column is zero, and not the same half.
        zero = matrix == 0
        assert torch.equal(zero.sum(0), torch.full((matrix.shape[1],), matrix.shape[0] // 2))
        assert not torch.equal(zero[:, 0], zero[:, 1])
        assert_drawn(matrix[~zero], 0.01)


def test_inilora_beta_constant():
    found = hs.IniLoRABeta(distribution="constant").factors(layer())
    assert torch.equal(found.A, torch.full((R, D_IN), 0.001))
    assert torch.equal(found.B, torch.full((D_OUT, R), 0.001))


def test_orthogonal_has_no_product_but_both_factors():
    found = hs.Orthogonal().factors(layer())
    size = float(found.A.norm() * found.B.norm())
    assert float(product(found).norm()) < 1e-6 * size
    # ||A||^2 = ||X||^2 / 100 for X of d_in x r/2 standard normal entries: 2/n is the relative variance.
    for matrix, n in ((found.A, D_IN * R // 2), (found.B, D_OUT * R // 2)):
        assert float(matrix.double().square().sum()) * 100 / n == pytest.approx(1, abs=5 * math.sqrt(2 / n))
        assert int((torch.linalg.svdvals(matrix.double()) > 1e-3).sum()) == R // 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 10), st.integers(0, 1000))
def test_orthogonal_of_any_shape(d_out, d_in, half, seed):
    found = hs.Orthogonal().factors(layer(d_out, d_in, 2 * half, seed=seed))
    assert float(product(found).norm()) <= 1e-6 * float(found.A.norm() * found.B.norm())
    assert found.A.norm() > 0 and found.B.norm() > 0


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_orthogonal_needs_an_even_rank(rank):
    with pytest.raises(hs.LayerError, match=rf"{NAME}.*even rank.*{rank}"):
        hs.Orthogonal().check(layer(40, 30, rank))


@pytest.mark.parametrize("text", ZERO_PRODUCT)
def test_zero_products_leave_nothing_to_subtract(text):
    found = parse_method(text).factors(layer(40, 30, 4, s=3.0))
    assert parse_method(text).form == "kept"
    assert float(product(found).norm()) <= 1e-6 * max(1.0, float(found.A.norm() * found.B.norm()))


# Spectral starts.

SHAPES = [(48, 30), (30, 48), (32, 32)]


@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_pissa(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    found = hs.PiSSA().factors(of_weight(W, 5, s=s))
    assert relative(s * product(found), best(W, 5)) < 1e-5
    root = (torch.linalg.svdvals(W.double())[:5] / s).diag()
    assert torch.allclose(found.B.double().T @ found.B.double(), root, atol=1e-6 * float(root.max()))
    assert torch.allclose(found.A.double() @ found.A.double().T, root, atol=1e-6 * float(root.max()))


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize(("d_out", "d_in"), [(400, 300), (300, 400)])
def test_pissa_of_a_weight_too_large_for_a_dense_decomposition(d_out, d_in, s):
    """Values fall by 0.8, so the iteration's residual of 1e-5 moves a singular vector by at most 1e-5 / 0.2."""
    W = from_spectrum(d_out, d_in, [0.8**i for i in range(60)])
    found = hs.PiSSA().factors(of_weight(W, 8, s=s))
    assert relative(s * product(found), best(W, 8)) < 5e-5


@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_milora(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    found = hs.MiLoRA().factors(of_weight(W, 5, s=s))
    rest = W.double() - best(W, min(d_out, d_in) - 5)
    # Rounding of the vectors to float32 acts on the smallest values only: 1e-5 of them.
    assert relative(s * product(found), rest) < 1e-5
    gram_B, gram_A = found.B.double().T @ found.B.double(), found.A.double() @ found.A.double().T
    assert torch.allclose(gram_A, gram_B, atol=1e-6 * float(gram_A.max()))


@pytest.mark.parametrize("s", [1.0, 3.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_olora(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    found = hs.OLoRA().factors(of_weight(W, 5, s=s))
    Q, triangle = torch.linalg.qr(W.double())
    # s plays no part: B and A are Q and R themselves.
    assert relative(product(found), Q[:, :5] @ triangle[:5]) < 1e-5
    assert torch.allclose(found.B.double().T @ found.B.double(), torch.eye(5, dtype=torch.float64), atol=1e-6)
    signs = (Q[:, :5] * found.B.double()).sum(0)
    assert torch.allclose(signs.abs(), torch.ones(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(found.A.double(), signs.sign()[:, None] * triangle[:5], atol=1e-5 * float(W.norm()))
    assert torch.allclose(found.A[:, :5].tril(-1), torch.zeros(5, 5), atol=1e-6 * float(W.norm()))


sizes = st.integers(1, 24)


@st.composite
def problems(draw, twice=False):
    d_out, d_in = draw(sizes.filter(lambda n: n > 1) if twice else sizes), draw(sizes)
    d_in = max(d_in, 2) if twice else d_in
    rank = draw(st.integers(1, min(d_out, d_in) // (2 if twice else 1)))
    scale = 10.0 ** draw(st.integers(-12, 6))
    rank_of_W = draw(st.integers(1, min(d_out, d_in)))
    seed = draw(st.integers(0, 10_000))
    W = scale * normal(d_out, rank_of_W, seed=seed) @ normal(rank_of_W, d_in, seed=seed + 1)
    return W, rank, 2.0 ** draw(st.integers(-6, 6))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_pissa_is_optimal_and_balanced_whatever_the_weight(problem):
    """Without gaps in the spectrum the factors are not unique: their norms and the error are."""
    W, r, s = problem
    found = hs.PiSSA().factors(of_weight(W, r, s=s))
    S = torch.linalg.svdvals(W.double())
    total = float(S.square().sum())
    error = float((W.double() - s * product(found)).square().sum())
    assert error == pytest.approx(tail(W, r), abs=1e-6 * total)
    expected = (S[:r] / s).diag()
    for gram in (found.B.double().T @ found.B.double(), found.A.double() @ found.A.double().T):
        assert torch.allclose(gram, expected, rtol=0, atol=2e-6 * float(expected.max()))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_milora_takes_out_the_smallest_whatever_the_weight(problem):
    W, r, s = problem
    found = hs.MiLoRA().factors(of_weight(W, r, s=s))
    S = torch.linalg.svdvals(W.double())
    left = torch.linalg.svdvals(W.double() - s * product(found))
    expected = torch.cat((S[: len(S) - r], torch.zeros(r, dtype=torch.float64)))
    assert torch.allclose(left, expected, rtol=0, atol=1e-5 * float(S[0]))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.data())
def test_olora_whatever_the_shape(d_out, d_in, data):
    r = data.draw(st.integers(1, min(d_out, d_in)))
    W = normal(d_out, d_in, seed=data.draw(st.integers(0, 10_000)))
    found = hs.OLoRA().factors(of_weight(W, r, s=2.0))
    Q, triangle = torch.linalg.qr(W.double())
    # Q's span is that of r columns, which rounding moves in proportion to their condition number.
    condition = float(torch.linalg.cond(W[:, :r].double()))
    assert relative(product(found), Q[:, :r] @ triangle[:r]) < 1e-6 * condition
    assert torch.allclose(found.B.T @ found.B, torch.eye(r), atol=5e-6)


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora:solver=svd"])
@pytest.mark.parametrize(("d_out", "d_in"), [(6, 9), (9, 6), (1, 7), (7, 1), (1, 1)])
def test_full_rank_is_the_whole_weight(name, d_out, d_in):
    W = normal(d_out, d_in)
    s = 1.0 if name == "olora" else 2.5
    found = parse_method(name).factors(of_weight(W, min(d_out, d_in), s=s))
    assert relative(s * product(found), W) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "inilora:solver=svd"])
def test_a_weight_of_lower_rank_is_fitted_whole(name):
    W = (normal(20, 3) @ normal(3, 30, seed=1)).double()
    found = parse_method(name).factors(of_weight(W.float(), 6, s=2.0))
    assert relative(2.0 * product(found), W) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora:solver=svd", "inilora:steps=3"])
def test_a_zero_weight_gives_finite_factors(name):
    found = parse_method(name).factors(of_weight(torch.zeros(12, 9), 3, moments=Moments(0.0, 0.1)))
    assert bool(torch.isfinite(found.A).all() and torch.isfinite(found.B).all())


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora:solver=svd", "inilora:steps=30"])
def test_a_transposed_view_is_as_good_as_a_matrix(name):
    """GPT-2 stores its weights the other way round, and they come as views."""
    W = normal(20, 30)
    method = parse_method(name)
    plain, view = method.factors(of_weight(W, 4)), method.factors(of_weight(W.T.contiguous().T, 4))
    assert relative(product(view), product(plain)) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "inilora", "lora-ga", "lora-one"])
def test_what_was_not_collected_is_asked_for(name):
    with pytest.raises(hs.LayerError, match=NAME):
        hs.get_method(name).factors(layer(12, 9, 3))


# IniLoRA.


def the_draw(given_layer):
    start = hs.IniLoRA(steps=0).factors(given_layer)
    return start.A, start.B


def dense_error(W, found, s=1.0):
    return float((W.double() / s - product(found)).square().sum())


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize("gauge", ["aligned", "random", "balanced"])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_inilora_closed_form_is_the_best_product(d_out, d_in, gauge, s):
    W = normal(d_out, d_in, std=0.05)
    found = hs.IniLoRA(solver="svd", gauge=gauge).factors(of_weight(W, 5, s=s))
    assert relative(s * product(found), best(W, 5)) < 1e-5
    assert relative(W.double() - s * product(found), W.double() - best(W, 5)) < 1e-5
    assert found.info["bound"] == pytest.approx(tail(W, 5) / s**2, rel=1e-5)
    assert found.info["error"] == pytest.approx(dense_error(W, found, s), rel=1e-9)
    assert found.info["error"] >= found.info["bound"] * (1 - 1e-6)
    # All three gauges are rotations: the same norms, B'B and AA' with the same eigenvalues.
    S = torch.linalg.svdvals(W.double())[:5].flip(0) / s
    for gram in (found.B.double().T @ found.B.double(), found.A.double() @ found.A.double().T):
        assert torch.allclose(torch.linalg.eigvalsh(gram), S, rtol=1e-5)


def test_inilora_balanced_is_pissa():
    W = normal(40, 25)
    mine = hs.IniLoRA(solver="svd", gauge="balanced").factors(of_weight(W, 6, s=1.5))
    theirs = hs.PiSSA().factors(of_weight(W, 6, s=1.5))
    for i in range(6):
        sign = torch.sign(mine.A[i] @ theirs.A[i])
        assert torch.allclose(mine.A[i], sign * theirs.A[i], atol=1e-5)
        assert torch.allclose(mine.B[:, i], sign * theirs.B[:, i], atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_inilora_aligned_is_the_rotation_nearest_to_the_draw(d_out, d_in):
    W = normal(d_out, d_in, std=0.3)
    given_layer = of_weight(W, 5)
    A0, B0 = the_draw(given_layer)
    found = {g: hs.IniLoRA(solver="svd", gauge=g).factors(given_layer) for g in ("aligned", "random", "balanced")}

    def distance(A, B):
        return float((A.double() - A0.double()).square().sum() + (B.double() - B0.double()).square().sum())

    aligned = found["aligned"]
    least = distance(aligned.A, aligned.B)
    assert least < distance(found["random"].A, found["random"].B)
    assert least < distance(found["balanced"].A, found["balanced"].B)
    for seed in range(50):
        Q = torch.linalg.qr(normal(5, 5, seed=seed)).Q
        assert least < distance(Q.T @ aligned.A, aligned.B @ Q)
    # Procrustes: at the optimum B'B0 + A A0' is symmetric and positive semidefinite.
    M = aligned.B.double().T @ B0.double() + aligned.A.double() @ A0.double().T
    assert torch.allclose(M, M.T, atol=1e-5 * float(M.norm()))
    assert float(torch.linalg.eigvalsh((M + M.T) / 2).min()) > -1e-5 * float(M.norm())


def test_inilora_random_gauge_is_no_other_gauge():
    W = normal(40, 25)
    found = {g: hs.IniLoRA(solver="svd", gauge=g).factors(of_weight(W, 6)).A for g in ("aligned", "random", "balanced")}
    for one, other in (("random", "balanced"), ("random", "aligned"), ("aligned", "balanced")):
        assert relative(found[one], found[other]) > 0.1


@pytest.mark.parametrize("s", [1.0, 4.0])
def test_inilora_without_steps_is_the_draw(s):
    W = normal(D_OUT, D_IN, std=0.02)
    found = hs.IniLoRA(steps=0).factors(of_weight(W, R, s=s, moments=Moments(mean=0.3, std=0.037)))
    # The published code uses mean 0 and the averaged sigma.
    assert_drawn(found.A, 0.037)
    assert_drawn(found.B, 0.037)
    assert_uncorrelated(found.A, found.B)
    assert found.info["steps"] == 0
    assert found.info["error"] == pytest.approx(dense_error(W, found, s), rel=1e-9)
    own = hs.IniLoRA(steps=0, std=0.5).factors(of_weight(W, R, s=s, moments=Moments(mean=0.3, std=0.037)))
    assert_drawn(own.A, 0.5)


def torch_adam(W, A0, B0, s, steps, lr, decay, decay_every):
    """The published loop, in float64, with autograd and torch's own optimizer."""
    target = W.double() / s
    A, B = A0.double().clone().requires_grad_(), B0.double().clone().requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, decay_every, gamma=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        ((target - B @ A) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    return A.detach(), B.detach()


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize(("d_out", "d_in"), [(40, 24), (24, 40)])
def test_inilora_adam_is_the_published_loop(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.1)
    given_layer = of_weight(W, 4, s=s)
    A0, B0 = the_draw(given_layer)
    found = hs.IniLoRA(steps=150, lr=2e-3, decay=0.7, decay_every=40).factors(given_layer)
    A, B = torch_adam(W, A0, B0, s, 150, 2e-3, 0.7, 40)
    # 150 steps in float32: rounding of 1e-7 a step, grown by Adam's division by small roots.
    assert relative(found.A, A) < 2e-5
    assert relative(found.B, B) < 2e-5
    assert relative(found.A, A0) > 0.1
    assert found.info["steps"] == 150
    assert found.info["error"] == pytest.approx(dense_error(W, found, s), rel=1e-6)
    assert found.info["bound"] == pytest.approx(tail(W, 4) / s**2, rel=1e-5)
    assert found.info["bound"] <= found.info["error"] < dense_error(W, Factors(A0, B0), s)


def test_inilora_defaults_are_the_published_ones():
    method = hs.IniLoRA()
    assert (method.solver, method.steps, method.lr, method.decay, method.decay_every) == (
        "adam",
        20_000,
        5e-4,
        0.9,
        5_000,
    )
    assert method.tolerance is None


def test_inilora_default_rate_and_schedule_are_used():
    """One step of Adam moves every entry by the rate (bias correction cancels), up to eps."""
    W = normal(30, 20)
    given_layer = of_weight(W, 3)
    A0, _ = the_draw(given_layer)
    one = hs.IniLoRA(steps=1).factors(given_layer)
    assert torch.allclose((one.A - A0).abs(), torch.full_like(A0, 5e-4), rtol=1e-2)


def test_inilora_adam_reaches_the_closed_form_and_stops():
    W = from_spectrum(24, 18, [3.0, 2.0, 1.5, 0.3, 0.2, 0.1])
    found = hs.IniLoRA(steps=20_000, lr=5e-3, tolerance=1e-3).factors(of_weight(W, 3, s=2.0))
    assert 0 < found.info["steps"] < 20_000
    least = tail(W, 3) / 4
    assert least * (1 - 1e-6) <= dense_error(W, found, 2.0) <= least * (1 + 1.1e-3)
    assert relative(2.0 * product(found), best(W, 3)) < 0.02


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(["svd", "adam"]), st.sampled_from(["aligned", "random", "balanced"]))
def test_inilora_reports_the_dense_error(problem, solver, gauge):
    W, r, s = problem
    found = hs.IniLoRA(solver=solver, gauge=gauge, steps=5).factors(of_weight(W, r, s=s))
    total = float((W.double() / s).square().sum())
    assert found.info["error"] == pytest.approx(dense_error(W, found, s), rel=1e-6, abs=1e-13 * total + 1e-300)
    # The bound is a difference of sums of float32 values: good to 1e-7 of the total, as the package says.
    assert found.info["bound"] == pytest.approx(tail(W, r) / s**2, abs=3e-7 * total)
    assert found.info["error"] >= found.info["bound"] - 3e-7 * total


# Gradient starts.


@pytest.mark.parametrize("gamma", [16.0, 64.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_lora_ga(d_out, d_in, gamma):
    G = normal(d_out, d_in, std=1e-4)
    r = 4
    found = hs.LoRAGA(gamma=gamma).factors(of_gradient(G, r, s=2.0))
    U, _, Vh = torch.linalg.svd(G.double())
    c = d_out**0.25 / math.sqrt(gamma)
    for i in range(r):
        # A singular vector's sign is free.
        right, left = Vh[i] * c, U[:, r + i] * c
        assert min(relative(found.A[i], right), relative(found.A[i], -right)) < 1e-5
        assert min(relative(found.B[:, i], left), relative(found.B[:, i], -left)) < 1e-5


def test_gradient_defaults_are_the_published_ones():
    assert hs.LoRAGA().gamma == 16
    assert hs.LoRAOne().gamma == 128


@settings(max_examples=60, deadline=None)
@given(problems(twice=True))
def test_lora_ga_whatever_the_gradient(problem):
    """In terms that need no gap in the spectrum; a gradient of low rank still gives orthonormal factors."""
    G, r, s = problem
    found = hs.LoRAGA().factors(of_gradient(G, r, s=s))
    S = torch.linalg.svdvals(G.double())
    c2 = math.sqrt(G.shape[0]) / 16
    A, B = found.A.double(), found.B.double()
    identity = torch.eye(r, dtype=torch.float64)
    assert torch.allclose(A @ A.T, c2 * identity, atol=5e-6 * c2)
    assert torch.allclose(B.T @ B, c2 * identity, atol=5e-6 * c2)
    total = float(S.square().sum())
    assert float((G.double() @ A.T).square().sum()) == pytest.approx(c2 * float(S[:r].square().sum()), rel=1e-5)
    second = float(S[r : 2 * r].square().sum())
    assert float((B.T @ G.double()).square().sum()) == pytest.approx(c2 * second, abs=1e-5 * c2 * total)


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 40, 7), (40, 12, 7), (9, 9, 5), (1, 30, 1), (30, 1, 1)])
def test_lora_ga_needs_twice_the_rank(d_out, d_in, r):
    with pytest.raises(hs.LayerError, match=rf"{NAME}.*2 r = {2 * r}.*at most {min(d_out, d_in) // 2}"):
        hs.LoRAGA().check(layer(d_out, d_in, r))


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 40, 6), (40, 12, 6), (2, 30, 1)])
def test_lora_ga_takes_half_the_side(d_out, d_in, r):
    found = hs.LoRAGA().factors(of_gradient(normal(d_out, d_in), r))
    assert torch.linalg.matrix_rank(product(found)) == r


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize("gamma", [1.0, 128.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_lora_one(d_out, d_in, gamma, s):
    G = normal(d_out, d_in, std=1e-4)
    found = hs.LoRAOne(gamma=gamma).factors(of_gradient(G, 5, s=s))
    S = torch.linalg.svdvals(G.double())
    assert relative(product(found), -best(G, 5) / (float(S[0]) * gamma)) < 1e-5
    root = (S[:5] / S[0] / gamma).diag()
    for gram in (found.B.double().T @ found.B.double(), found.A.double() @ found.A.double().T):
        assert torch.allclose(gram, root, atol=1e-6 * float(root.max()))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1.0, 16.0, 128.0]))
def test_lora_one_whatever_the_gradient(problem, gamma):
    """A matrix with these singular values and this inner product with -G has its singular vectors (von Neumann)."""
    G, r, s = problem
    found = hs.LoRAOne(gamma=gamma).factors(of_gradient(G, r, s=s))
    S = torch.linalg.svdvals(G.double())
    expected = S[:r] / S[0] / gamma
    assert torch.allclose(torch.linalg.svdvals(product(found))[:r], expected, rtol=0, atol=2e-6 / gamma)
    inner = float(-(product(found) * G.double()).sum())
    assert inner == pytest.approx(float((expected * S[:r]).sum()), rel=1e-5)
    assert relative(found.A.norm(), found.B.norm()) < 1e-5


@pytest.mark.parametrize("cls", [hs.LoRAGA, hs.LoRAOne])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_gradients_scale_does_not_matter(cls, scale):
    G = normal(20, 16)
    plain, scaled = cls().factors(of_gradient(G, 3)), cls().factors(of_gradient(G * scale, 3))
    # Scaling by a power of ten rounds each entry.
    assert relative(scaled.A.abs(), plain.A.abs()) < 1e-5
    assert relative(scaled.B.abs(), plain.B.abs()) < 1e-5


@pytest.mark.parametrize("cls", [hs.LoRAGA, hs.LoRAOne])
def test_no_gradient_starts_as_lora_does_and_says_so(cls):
    given_layer = of_gradient(torch.zeros(24, 20), 4)
    found, plain = cls().factors(given_layer), hs.LoRA().factors(given_layer)
    assert torch.equal(found.A, plain.A) and torch.equal(found.B, plain.B)
    assert "no gradient" in found.note and "lora" in found.note


def test_lora_one_of_one_output():
    G = normal(1, 12)
    found = hs.LoRAOne().factors(of_gradient(G, 1))
    assert relative(product(found), -G.double() / float(G.double().norm()) / 128) < 1e-6


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(("d_out", "d_in"), [(2, 9), (9, 2)])
def test_draws_of_the_smallest_layers(name, d_out, d_in):
    found = hs.get_method(name).factors(layer(d_out, d_in, 2))
    assert found.A.shape == (2, d_in) and found.B.shape == (d_out, 2)
    assert found.A.count_nonzero() or found.B.count_nonzero()


@pytest.mark.parametrize("d_out", [1, 2])
def test_sparse_leaves_something_to_train(d_out):
    """Half zero, not all: where both factors are zero, neither ever gets a gradient."""
    found = hs.IniLoRABeta(distribution="sparse").factors(layer(d_out, 8, 1))
    assert found.A.count_nonzero() or found.B.count_nonzero()


# Names and settings.


@pytest.mark.parametrize(
    ("text", "near"),
    [("lora-on", "lora-one"), ("pisa", "pissa"), ("init_ab", "init-ab"), ("Inilora", "inilora"), ("olra", "olora")],
)
def test_an_unknown_method_names_the_nearest(text, near):
    for make in (hs.get_method, parse_method, method_class):
        with pytest.raises(hs.MethodError, match=rf"unknown method {text!r}.*{near!r}"):
            make(text)


def test_a_name_like_no_other_suggests_none():
    with pytest.raises(hs.MethodError) as caught:
        hs.get_method("xyzzy")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "setting", "near"),
    [
        ("init-ab", "bta", "beta"),
        ("inilora", "step", "steps"),
        ("lora-ga", "gama", "gamma"),
        ("init-a", "beat", "beta"),
    ],
)
def test_an_unknown_setting_names_the_nearest(name, setting, near):
    with pytest.raises(hs.MethodError, match=rf"{name!r}.*{setting!r}.*{near!r}"):
        hs.get_method(name, **{setting: 1})
    with pytest.raises(hs.MethodError, match=rf"{name!r}.*{setting!r}.*{near!r}"):
        parse_method(f"{name}:{setting}=1")


def test_a_method_without_settings_says_so():
    with pytest.raises(hs.MethodError, match="none"):
        hs.get_method("pissa", beta=1)


OUT_OF_RANGE = [
    *((name, "beta", v) for name in ("init-a", "init-ab", "init-ab-plus") for v in (0, -1.0, math.nan, math.inf)),
    *((name, "distribution", "cauchy") for name in ("init-a", "init-b", "init-ab", "init-ab-plus", "inilora-beta")),
    ("init-ab", "scheme", "adamw"),
    ("init-ab-plus", "scheme", "LORA+"),
    *(("inilora-alpha", "std", v) for v in (0, -0.5, math.nan)),
    ("inilora", "solver", "lbfgs"),
    ("inilora", "gauge", "balance"),
    ("inilora", "steps", -1),
    *(("inilora", setting, 0) for setting in ("lr", "decay", "decay_every", "tolerance", "std")),
    *((name, setting, v) for name in ("lora-ga", "lora-one") for setting in ("gamma", "samples") for v in (0, -4)),
    ("lora-ga", "gamma", math.inf),
]
# What the command line can also hand over: text, a fraction, or nothing, where a number or a whole number is due.
WRONG_TYPE = [
    *((name, "beta", v) for name in ("init-a", "init-ab") for v in ("two", None)),
    ("inilora-alpha", "std", None),
    ("inilora-alpha", "std", "x"),
    ("inilora", "steps", "many"),
    ("inilora", "steps", None),
    ("inilora", "steps", 2.5),
    ("inilora", "decay_every", 2.5),
    ("inilora", "decay_every", None),
    ("inilora", "lr", None),
    ("inilora", "decay", None),
    ("inilora", "tolerance", "x"),
    ("inilora", "solver", None),
    *((name, "gamma", v) for name in ("lora-ga", "lora-one") for v in ("x", None)),
    *((name, "samples", v) for name in ("lora-ga", "lora-one") for v in (2.5, "all", None)),
]


@pytest.mark.parametrize(("name", "setting", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_names_the_setting(name, setting, value):
    with pytest.raises(hs.MethodError, match=rf"{name!r}.*{setting}"):
        hs.get_method(name, **{setting: value})


@pytest.mark.parametrize(("name", "setting", "value"), WRONG_TYPE)
def test_a_value_of_the_wrong_type_names_the_setting(name, setting, value):
    with pytest.raises(hs.MethodError, match=rf"{name!r}.*{setting}"):
        parse_method(f"{name}:{setting}={value}")


@pytest.mark.parametrize(
    ("text", "method", "shown"),
    [
        ("init-ab:beta=2,scheme=sgd", hs.InitAB(beta=2, scheme="sgd"), "init-ab:beta=2,scheme=sgd"),
        (" init-ab : beta = 2 , scheme = sgd ", hs.InitAB(beta=2, scheme="sgd"), "init-ab:beta=2,scheme=sgd"),
        ("init-ab:scheme=lora+", hs.InitAB(scheme="lora+"), "init-ab:scheme=lora+"),
        ("init-ab:", hs.InitAB(), "init-ab"),
        ("init-ab:beta=1.0", hs.InitAB(), "init-ab"),
        ("pissa", hs.PiSSA(), "pissa"),
        ("inilora:tolerance=1e-3", hs.IniLoRA(tolerance=1e-3), "inilora:tolerance=0.001"),
        ("inilora:tolerance=None,steps=7", hs.IniLoRA(steps=7), "inilora:steps=7"),
        ("inilora-beta:distribution=K-U", hs.IniLoRABeta("kaiming-uniform"), None),
        ("lora-one:samples=64", hs.LoRAOne(samples=64), "lora-one:samples=64"),
    ],
)
def test_a_method_read_from_text(text, method, shown):
    found = parse_method(text)
    assert found == method and type(found) is type(method)
    assert shown is None or str(found) == shown
    # And back again, through the settings.
    again = parse_method(f"{found.name}:" + ",".join(f"{k}={v}" for k, v in found.settings().items()))
    assert again == found
    assert hs.get_method(found.name, **found.settings()) == found


@pytest.mark.parametrize("text", ["init-ab:beta", "init-ab:2", "init-ab:beta=2,sgd", "init-ab:=2", ":beta=2", ""])
def test_malformed_text(text):
    with pytest.raises(hs.MethodError):
        parse_method(text)


@pytest.mark.parametrize("name", hs.method_names())
def test_methods_are_frozen_values(name):
    method = hs.get_method(name)
    assert method == hs.get_method(name) and hash(method) == hash(hs.get_method(name))
    assert str(method) == name
    assert parse_method(name) == method
    assert list(method.settings()) == [f.name for f in dataclasses.fields(method)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1
    for setting in method.settings():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, setting, 1)


@pytest.fixture
def halves():
    """A method of the user's own, registered for the length of a test."""

    @hs.register("halves")
    @dataclasses.dataclass(frozen=True)
    class Halves(Method):
        """All entries the same.

        Source: this test.
        """

        source: ClassVar[str] = "this test"

        value: float = 0.5

        def factors(self, given_layer: Layer) -> Factors:
            A = torch.full((given_layer.r, given_layer.d_in), self.value)
            return Factors(A, torch.full((given_layer.d_out, given_layer.r), self.value))

    yield Halves
    registry._METHODS.pop("halves")


def test_a_new_method_is_found_and_used_by_name(halves):
    assert hs.method_names()[-1] == "halves"
    assert hs.get_method("halves", value=2.0) == halves(value=2.0)
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    report = hs.initialize_(model, "halves:value=0.25")
    assert report.method == "halves:value=0.25"
    for target in lora_layers(model, "default"):
        assert bool((factors_of(target.module)[0] == 0.25).all())
        assert bool((factors_of(target.module)[1] == 0.25).all())
    with pytest.raises(hs.MethodError, match="'halves'"):
        hs.get_method("halfs")


def test_a_taken_name_is_refused_and_changes_nothing(halves):
    with pytest.raises(hs.MethodError, match="two methods are named 'pissa'"):
        hs.register("pissa")(halves)
    assert method_class("pissa") is hs.PiSSA
    assert halves.name == "halves"
