"""What every method promises: shapes, purity, batches, a place in the registry, needs, a form, streams of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from headstart.errors import HeadstartWarning
from headstart.layers.core import core_of
from headstart.methods import method_class, parse_method
from headstart.methods.alive import revived
from headstart.methods.base import ANY_LAYER, Factors
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


SIDE = 32
# The weight of the layer "poor", as shares of the rows of a drawn one that are there: none, half of them, and two.
POOR = {"zero": 0, "half": SIDE // 2, "rank 2": 2}
# Both ends of a spectrum, both solvers, and every scale that follows the weight.
AT_LIMITS = (
    *(name for name in OWN if name != "inilora"),
    "inilora:solver=svd",
    "inilora:solver=svd,gauge=balanced",
    "inilora:solver=adam,steps=50",
    "lora-xs:scale=input",
    "corda:mode=kpm",
    "astra:mode=kpm",
    "astra:ranks=chosen",
    "lora-null:version=v2",
    "lora-ga:scale=weight",
    "lora-ga:convention=peft,scale=weight",
    "lora-ga:norm_clip=true",
    "gora:ranks=given",
    "eva:whiten=true",
)
# What a core needs, or a quantised weight, is not there.
REFUSED = {"lora-xs": ("zero", "rank 2"), "lora-xs:scale=input": ("zero", "rank 2"), "loftq": tuple(POOR)}


class Poor(nn.Module):
    """Two layers, the second of which has few directions or none, but a gradient of full rank."""

    def __init__(self, rows):
        super().__init__()
        self.config = {"model_type": "poor"}
        self.rich, self.poor = nn.Linear(SIDE, SIDE, bias=False), nn.Linear(SIDE, SIDE, bias=False)
        with torch.no_grad():
            self.rich.weight.copy_(normal(SIDE, SIDE, seed=1, std=0.2))
            self.poor.weight.copy_(normal(SIDE, SIDE, seed=2, std=0.2)).mul_((torch.arange(SIDE) < rows)[:, None])

    def forward(self, x, labels):
        y = self.poor(torch.tanh(self.rich(x))) + x
        return {"loss": (y - labels).square().mean(), "logits": y}


def poorly_started(text, rows):
    """The model, its layer, the report and a batch."""
    name, _, rest = text.partition(":")
    fields = {field.name for field in dataclasses.fields(method_class(name))}
    given_settings = [rest, "samples=32" if "samples" in fields else "", "lr=1e-3" if name == "lora-sb" else ""]
    method = parse_method(f"{name}:{','.join(filter(None, given_settings))}".rstrip(":"))
    data = [{"x": normal(4, SIDE, seed=3 + k), "labels": normal(4, SIDE, seed=50 + k)} for k in range(8)]
    model = get_peft_model(Poor(rows), LoraConfig(r=4, lora_alpha=6, target_modules=["rich", "poor"]))
    report = hs.initialize_(model, method, data=data, preserve=data, cache=False, progress=False)
    return model, model.base_model.model.poor, report, data[0]


@pytest.mark.filterwarnings("ignore::headstart.errors.HeadstartWarning")
@pytest.mark.parametrize("kind", POOR)
@pytest.mark.parametrize("text", AT_LIMITS)
def test_every_direction_trains_whatever_the_weight_lacks(text, kind, monkeypatch):
    changes = []

    def watched(method, given_layer, before):
        after = revived(method, given_layer, before)
        changes.append((given_layer, before, after))
        return after

    monkeypatch.setattr("headstart.solve.revived", watched)
    if kind in REFUSED.get(text, ()):
        with pytest.raises(hs.LayerError, match=r"layer '(poor|rich)'"):
            poorly_started(text, POOR[kind])
        return
    model, module, report, batch = poorly_started(text, POOR[kind])
    (line,) = (line for line in report.layers if line.name == "poor")
    assert not any(value != value for value in line.info.values()), line.info
    # The product is the method's own, to rounding.
    for given_layer, before, after in changes:
        own, now = ((start.B.double() @ start.A.double()) for start in (before, after))
        size = 1.0 if given_layer.weight is None else float(given_layer.weight.norm())
        assert float((now - own).norm()) <= 1e-12 * size
    gradients = []

    def seen(_, x, y):
        y.register_hook(lambda g: gradients.append((x[0].detach(), g)))

    module.register_forward_hook(seen)
    loss = model(**batch)["loss"]
    if method_class(text.partition(":")[0]).form == "anchored":
        assert loss.item() == pytest.approx(Poor(POOR[kind])(**batch)["loss"].item(), rel=1e-6)
    loss.backward()
    ((x, g),) = gradients
    whole = 1.5 * float((g.T @ x).norm())
    core = core_of(module, "default")
    if core is not None:
        assert float(min(core.grad.norm(dim=0).min(), core.grad.norm(dim=1).min())) > 1e-6 * whole
        return
    moved = torch.zeros(line.r)
    for factor, dim in ((module.lora_A["default"].weight, 1), (module.lora_B["default"].weight, 0)):
        if factor.requires_grad:
            moved = torch.maximum(moved, factor.grad.norm(dim=dim))
    assert float(moved.min()) > 1e-6 * whole, moved


@pytest.mark.parametrize("text", ["pissa", "milora", "geora", "loram", "inilora", "corda", "corda:mode=kpm"])
def test_a_weight_of_zeros_starts_as_plain_lora_with_a_warning(text):
    with pytest.warns(HeadstartWarning, match="poor: .*it starts as 'lora' does"):
        _, module, report, _ = poorly_started(text, 0)
    with pytest.warns(HeadstartWarning, match="poor: .*it starts as 'lora' does"):
        _, other, _, _ = poorly_started("pissa", 0)
    start = "lora_start_A" if report.form == "anchored" else "lora_A"
    assert torch.equal(*(getattr(own, start)["default"].weight for own in (module, other)))
    assert not module.lora_start_B["default"].weight.count_nonzero()


def test_some_directions_start_as_plain_loras_and_the_others_stay():
    with pytest.warns(HeadstartWarning, match="poor: 2 of its 4 directions would be zero in A and B, and never train"):
        _, module, _, _ = poorly_started("pissa", 2)
    A, B = (getattr(module, f"lora_start_{name}")["default"].weight.double() for name in "AB")
    W = Poor(2).poor.weight.detach().double()
    assert float((1.5 * B @ A - W).norm() / W.norm()) < 1e-6
    assert float(A[2:].norm(dim=1).min()) > 0.3
    assert not B[:, 2:].count_nonzero()


def test_directions_that_frozen_factors_keep_from_training_are_refused():
    zeros, eye = torch.zeros(2, 6), torch.eye(5, 2)
    given_layer = layer(5, 6, 2, frozen=("lora_A",))
    # A column of B without a row of A trains A alone, which LoRA-FA has frozen.
    start = revived(hs.Astra(), given_layer, Factors(zeros, eye))
    assert start.A.count_nonzero() and not start.B.count_nonzero() and "lora" in start.note
    with pytest.raises(hs.LayerError, match="lora_B is frozen, so that they would never train"):
        revived(hs.MiCA(), layer(5, 6, 2), Factors(zeros, 0 * eye, frozen=("lora_B",)))
    assert revived(hs.MiCA(), layer(5, 6, 2), Factors(zeros, eye, frozen=("lora_B",))).note == ""


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_directions_are_left_as_they_are(scale):
    W = scale * normal(24, 20, seed=5)
    for name in ("milora", "pissa", "inilora", "corda"):
        given_layer = dataclasses.replace(everything(), weight=W)
        start = parse_method(name).factors(given_layer)
        assert revived(parse_method(name), given_layer, start) is start
