"""Methods by name and settings: text there and back, what is refused and with which hint, a method of one's own."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch

import headstart as hs
from conftest import factors_of, tiny_llama, wrap
from headstart.layers.find import lora_layers
from headstart.methods import method_class, parse_method, registry
from headstart.methods.base import Factors, Layer, Method


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
        ("kfac-newton", "dampin", "damping"),
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
    *(("inilora", setting, 3) for setting in ("steps", "decay_every")),  # of the descent, which isn't asked for
    ("inilora", "gauge", "balance"),
    ("inilora", "steps", -1),
    *(("inilora", setting, 0) for setting in ("lr", "decay", "decay_every", "tolerance", "std")),
    *((name, setting, v) for name in ("lora-ga", "lora-one") for setting in ("gamma", "samples") for v in (0, -4)),
    ("lora-ga", "gamma", math.inf),
    *(("geora", "rho", v) for v in (0, -0.1, 1.001, math.nan, math.inf)),
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
    *(("geora", "rho", v) for v in ("x", None)),
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
        (
            "inilora:solver=adam,tolerance=1e-3",
            hs.IniLoRA(solver="adam", tolerance=1e-3),
            "inilora:solver=adam,tolerance=0.001",
        ),
        (
            "inilora:solver=adam,tolerance=None,steps=7",
            hs.IniLoRA(solver="adam", steps=7),
            "inilora:solver=adam,steps=7",
        ),
        ("inilora-beta:distribution=K-U", hs.IniLoRABeta("kaiming-uniform"), None),
        ("lora-one:samples=64", hs.LoRAOne(samples=64), "lora-one:samples=64"),
    ],
)
def test_a_method_read_from_text(text, method, shown):
    parsed = parse_method(text)
    assert parsed == method and type(parsed) is type(method)
    assert shown is None or str(parsed) == shown
    # And back again, through the settings.
    again = parse_method(f"{parsed.name}:" + ",".join(f"{k}={v}" for k, v in parsed.settings().items()))
    assert again == parsed
    assert hs.get_method(parsed.name, **parsed.settings()) == parsed


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
