"""What every method promises: shapes, purity, batches, a place in the registry, needs, a form, streams of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import headstart as hs
from headstart.methods import method_class, parse_method
from headstart.methods.base import ANY_LAYER
from inputs import NAME
from known_layers import DRAWN, everything, layer, normal

DRAWN_VARIANTS = (
    *DRAWN,
    "init-a:distribution=uniform",
    "init-b:distribution=uniform",
    "init-ab:distribution=uniform",
    *(f"inilora-beta:distribution={name}" for name in ("K-U", "xavier-normal", "xavier-uniform", "normal", "uniform")),
    "inilora-beta:distribution=orthogonal",
    "inilora-beta:distribution=sparse",
    "inilora:solver=adam,steps=0",
    "inilora:solver=svd,gauge=random",
    "inilora:solver=svd,gauge=aligned",
)
OWN = hs.method_names()
SPECTRAL = ("pissa", "milora", "olora", "olora-tail", "rlpo", "rlmo", "mica", "geora", "loram", "lora-xs")


@pytest.mark.parametrize("name", OWN)
def test_every_method_gives_finite_factors_of_the_right_shape(name):
    given_layer = everything()
    W, G = given_layer.weight.clone(), given_layer.gradient.clone()
    state = torch.random.get_rng_state()
    method = hs.get_method(name, **({"solver": "adam", "steps": 5} if name == "inilora" else {}))
    start = method.factors(given_layer)
    assert start.A.shape == (4, 20) and start.B.shape == (24, 4)
    assert start.A.dtype == start.B.dtype == torch.float32
    assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())
    assert (start.core is not None) == (method.form == "core")
    assert start.note == ""
    # A pure function: the inputs are as they were, and so is torch's own generator.
    assert torch.equal(given_layer.weight, W) and torch.equal(given_layer.gradient, G)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = method.factors(given_layer)
    assert torch.equal(again.A, start.A) and torch.equal(again.B, start.B)


@pytest.mark.parametrize("name", OWN)
def test_a_batch_is_the_same_as_one_at_a_time(name):
    method = hs.get_method(name, **({"solver": "adam", "steps": 20} if name == "inilora" else {}))
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


def test_needs_are_those_of_the_table():
    expected = dict.fromkeys(DRAWN, "shapes") | dict.fromkeys(SPECTRAL, "weight")
    expected |= dict.fromkeys(("lora-ga", "lora-one", "lora-sb"), "gradient")
    expected |= {"inilora": "weight + moments"}
    expected |= dict.fromkeys(("lora-da", "kfac-newton"), "gradient + Fisher factors")
    assert {name: str(method_class(name)().wants(ANY_LAYER)) for name in expected} == expected


@pytest.mark.parametrize("name", [*SPECTRAL, "inilora", "lora-ga", "lora-one"])
def test_what_was_not_collected_is_asked_for(name):
    with pytest.raises(hs.LayerError, match=NAME):
        hs.get_method(name).factors(layer(12, 9, 3))


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
        ("olora-tail", "anchored"),
        ("rlpo", "kept"),
        ("rlmo", "kept"),
        ("geora", "anchored"),
        ("loram", "anchored"),
        ("lora-ga", "anchored"),
        ("lora-one", "kept"),
        ("lora-da", "kept"),
        ("kfac-newton", "kept"),
        ("gora", "kept"),
        ("keeplora", "anchored"),
        ("keeplora-plus", "kept"),
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
        one = first[names[0]]
        assert not torch.equal(one.A, other.A) or not torch.equal(one.B, other.B)
        # Not merely another sign or scale: a drawn factor of another stream is another matrix.
        drawn = "A" if one.A.count_nonzero() and not torch.equal(one.A, other.A) else "B"
        x, y = getattr(one, drawn).flatten(), getattr(other, drawn).flatten()
        if not text.startswith("inilora:solver"):  # there the draw only turns the factors
            assert abs(float(torch.cosine_similarity(x, y, dim=0))) < 0.6


@settings(max_examples=30, deadline=None)
@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40), st.text(max_size=20), st.text(max_size=20))
@example(1, 11, "1x", "x")
def test_any_two_streams_differ(seed, other_seed, name, other_name):
    method = hs.InitAB()
    one = method.factors(layer(6, 8, 2, seed=seed, name=name))
    other = method.factors(layer(6, 8, 2, seed=other_seed, name=other_name))
    assert torch.equal(one.A, other.A) == ((seed, name) == (other_seed, other_name))
