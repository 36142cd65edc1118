"""LoRA-DA's settings: the published ones, those refused, their text, and what each has collected."""

from __future__ import annotations

import math

import pytest
import torch

import headstart as hs
from fisher import ATTENTION, layer_named
from headstart.methods import parse_method
from headstart.methods.base import ANY_LAYER, Layer


def test_published_settings_are_the_defaults():
    method = hs.LoRADA()
    assert (method.samples, method.gamma, method.preset) == (256, 1024, "published")
    assert (method.bias, method.normalize, method.fisher) == (1, True, "diagonal")
    assert (method.population, method.iterations, method.layers, method.tokens) == (None, None, "all", "attention")
    assert str(method.wants(ANY_LAYER)) == "gradient + Fisher factors"


OUT_OF_RANGE = [
    *(("gamma", value) for value in (0, -1.0, math.nan, math.inf)),
    *((name, value) for name in ("damping", "variance", "bias") for value in (-1e-9, math.nan, math.inf)),
    *((name, value) for name in ("samples", "population", "iterations", "tol") for value in (0, -4)),
    ("fisher", "k-fac"),
    ("tokens", "all"),
    ("layers", "mlp"),
    ("samples", 2.5),
    ("population", 2.5),
    ("iterations", 2.5),
    ("iterations", "ten"),
    ("normalize", 1),
    ("damping", "1e-6x"),
    ("tol", None),
    ("preset", "ours"),
    ("preset", None),
    ("noise", "samples"),
    ("variance", "tokens"),
]


@pytest.mark.parametrize(("setting", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_names_the_setting(setting, value):
    with pytest.raises(hs.MethodError, match=rf"'lora-da'.*{setting}"):
        hs.get_method("lora-da", **{setting: value})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(variance=0, bias=0), "variance and bias"),
        (dict(fisher="none"), "variance=0"),
        (dict(fisher="none", variance=0, bias=0), "variance and bias"),
    ],
)
def test_settings_that_contradict_each_other(options, match):
    with pytest.raises(hs.MethodError, match=match):
        hs.LoRADA(**options)


@pytest.mark.parametrize(
    "method",
    [
        hs.LoRADA(),
        hs.LoRADA(samples=16, damping=0, population=7473, fisher="full", tokens="labels", normalize=False),
        hs.LoRADA(variance=0.0, gamma=1, tol=1e-3, iterations=10, layers="feed-forward"),
        hs.LoRADA(bias=0, layers="attention"),
        hs.LoRADA(preset="scale-free", damping=1.0, noise="tokens"),
        hs.LoRADA(preset="scale-free", variance=0, noise="published"),
        # None and "none" look the same as text.
        hs.LoRADA(variance=0, fisher="none"),
    ],
)
def test_round_trip_through_text(method):
    assert parse_method(str(method)) == method
    assert parse_method("lora-da:" + ",".join(f"{k}={v}" for k, v in method.settings().items())) == method
    assert hs.get_method("lora-da", **method.settings()) == method


def test_what_is_collected():
    assert hs.LoRADA().wants(layer_named(ATTENTION)).outputs == "diagonal"
    assert hs.LoRADA(fisher="full", tokens="labels").wants(layer_named(ATTENTION)).outputs == "full"
    assert hs.LoRADA(tokens="labels").wants(layer_named(ATTENTION)).tokens == "labels"
    assert hs.LoRADA(fisher="none", variance=0).wants(layer_named(ATTENTION)).outputs is None
    assert hs.LoRADA(fisher="none", variance=0).wants(layer_named(ATTENTION)).gradient


def test_missing_statistics_name_the_layer():
    bare = Layer(name=ATTENTION, d_out=6, d_in=8, r=2, scaling=1.0)
    with pytest.raises(hs.LayerError, match=rf"{ATTENTION}.*gradient"):
        hs.LoRADA().factors(bare)
    bare = Layer(name=ATTENTION, d_out=6, d_in=8, r=2, scaling=1.0, gradient=torch.ones(6, 8))
    with pytest.raises(hs.LayerError, match=rf"{ATTENTION}.*moments of its inputs"):
        hs.LoRADA().factors(bare)
