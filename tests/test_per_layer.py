"""Different methods for different layers: which layer gets which, and that each start is the method's own."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import headstart as hs
from conftest import all_factors, tiny_llama, token_batch, wrap
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers
from headstart.layers.vera import principal_directions
from headstart.methods import parse_method
from headstart.statistics import collect
from test_processes import batches, together
from test_refusals import Unread, dora, frozen
from test_trainer_data import plain_trainer
from test_variants import vera

# Kinds of layers whole, as inilora's deviations are means over the layers of a kind.
PATTERN = "q_proj|v_proj|down_proj"
METHODS = [
    "lora",
    "init-ab",
    "pissa",
    "mica",
    "lora-xs",
    "inilora:solver=adam,steps=5",
    "lora-one:samples=4",
    "lora-sb:samples=6,lr=0.001",
    "lora-da:samples=10",
    "lora-da:samples=7,tokens=labels",
    "corda:samples=8",
    "eva:samples=8,rho=1",
]


def fits(pattern, name):
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def initialised(method, data=None, form="anchored", seed=3, **settings):
    model = wrap(tiny_llama(), **settings)
    return model, hs.initialize_(model, method, data=data or batches(), form=form, seed=seed, progress=False)


def state(model):
    """By layer, factors, core and what is frozen."""
    cores = {target.name: core_of(target.module, "default") for target in lora_layers(model, "default")}
    frozen = {target.name: target.module.frozen_peft_weight_names for target in lora_layers(model, "default")}
    return {
        name: (A, B, None if cores[name] is None else cores[name].detach(), frozen[name].get("default"))
        for name, (A, B) in all_factors(model).items()
    }


@functools.cache
def alone(method):
    model, report = initialised(method)
    return state(model), {layer.name: layer for layer in report.layers}


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


# Which layer gets which.

PARTS = st.sampled_from(["q_proj", "k_proj", "xq_proj", "layers", "0", "1", "10", "mlp"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)
PIECES = st.sampled_from(
    ["q_proj", "k_proj", r"layers\.\d+", ".*", r"1\.mlp", "[qk]_proj", "^layers.*", "mlp|q_proj", "0"]
)
PATTERNS = st.lists(st.lists(PIECES, min_size=1, max_size=2).map("|".join), min_size=1, max_size=4, unique=True)


@settings(max_examples=300, deadline=None)
@given(NAMES, PATTERNS, st.integers(0, 4))
def test_patterns_are_taken_as_peft_takes_those_of_ranks(names, patterns, place):
    expected = {name: get_pattern_key(patterns, name) for name in names}
    used = [pattern for pattern in patterns if pattern in expected.values()]
    assume(used)
    # What takes none is an error of its own; the rest may stand anywhere.
    keys = [*used[:place], "*", *used[place:]]
    by_pattern = {key: hs.InitAB(beta=1.0 + number) for number, key in enumerate(keys)}
    expected = {name: key if key in used else "*" for name, key in expected.items()}
    divided = hs.PerLayer(by_pattern).divided(names)
    assert [method for method, _ in divided] == [by_pattern[key] for key in keys if key in expected.values()]
    for method, own in divided:
        assert own == [name for name in names if by_pattern[expected[name]] == method]
    # Without the rest, what it took is named.
    del by_pattern["*"]
    left = [name for name in names if expected[name] == "*"]
    if left:
        with pytest.raises(hs.LayerError, match=re.escape(f"layer {left[0]!r} is taken by no pattern")):
            hs.PerLayer(by_pattern).divided(names)
    else:
        assert hs.PerLayer(by_pattern).divided(names) == divided


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["q_proj", 'a"b', "é|ü", "a: b", "[,]", "*"]), st.sampled_from(METHODS), min_size=1)
)
def test_its_text_is_read_as_it_was(by_pattern):
    method = hs.PerLayer(by_pattern)
    assert parse_method(str(method)) == method and hash(parse_method(str(method))) == hash(method)
    turned = hs.PerLayer(dict(reversed(by_pattern.items())))
    # The first that fits wins, so order matters.
    assert (turned == method) == (len(by_pattern) == 1)


BAD = {
    "nothing": ({}, "needs a pattern and its method"),
    "no method": ({"q_proj": 3}, "pattern 'q_proj' stands for 3, which is not a method"),
    "a class": ({"q_proj": hs.PiSSA}, "which is not a method: give one like hs.PiSSA"),
    "one within another": ({"*": hs.PerLayer({"*": hs.LoRA()})}, r"pattern '\*' stands for another 'per-layer'"),
    "an unknown name": ({"*": "pisa"}, "unknown method 'pisa'. Did you mean 'pissa'"),
    "an unknown setting": ({"*": "pissa:beta=1"}, "'pissa' has no setting 'beta'"),
    "no expression": ({"q_proj(": "lora"}, r"pattern 'q_proj\(' is no regular expression: .* at position 6"),
    "flags": ({"(?i)q_proj": "lora"}, "is no regular expression: global flags"),
    "no text": ({3: "lora"}, "3 is no pattern"),
    "an empty one": ({"": "lora"}, "'' is no pattern"),
    "twice": ([("q_proj", "lora"), ("q_proj", "pissa")], "pattern 'q_proj' is given twice"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_none_is_one_sentence(what):
    given, words = BAD[what]
    with pytest.raises(hs.MethodError, match=words) as error:
        hs.PerLayer(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("per-layer", "'per-layer:': after the colon comes a JSON object"),
        ("per-layer:q_proj=lora", "after the colon comes a JSON object"),
        ('per-layer:["lora"]', "after the colon comes a JSON object"),
        ("per-layer:{}", "needs a pattern"),
        ('per-layer:{"a": "lora", "a": "pissa"}', "pattern 'a' is given twice"),
        ('per-layer:{"a": {"b": "lora"}}', "pattern 'a' stands for"),
    ],
)
def test_text_that_is_none_is_one_sentence(text, words):
    with pytest.raises(hs.MethodError, match=words):
        parse_method(text)


@pytest.mark.parametrize(
    ("by_pattern", "error", "words"),
    [
        ({"q_proj": "lora-one"}, hs.LayerError, r"'model\.layers\.0\.self_attn\.k_proj' is taken by no .*\(q_proj\)"),
        ({"q_porj": "lora", "*": "lora-one"}, hs.MethodError, "'q_porj' takes no layer.* Did you mean 'q_proj'"),
        ({"proj": "lora", "*": "lora-one"}, hs.MethodError, "'proj' takes no layer of the adapter"),
        (
            {"mlp.*": "lora", "up_proj": "pissa", "*": "lora-one"},
            hs.MethodError,
            r"up_proj' takes no.*'mlp\.\*' before",
        ),
    ],
)
def test_patterns_that_do_not_fit_the_adapter_are_refused_before_data_are_read(by_pattern, error, words):
    model = wrap(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=words):
        hs.initialize_(model, hs.PerLayer(by_pattern), data=Unread(), progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_rest_may_be_none():
    _, report = initialised(hs.PerLayer({"q_proj": "pissa", "*": "lora-one"}), target_modules=["q_proj"])
    assert {layer.method for layer in report.layers} == {"pissa"} and report.samples == 0


# Each start is the method's own.


# Each in both places, beside two others.
PAIRS = [(METHODS[i], METHODS[(i + shift) % len(METHODS)]) for shift in (1, 5) for i in range(len(METHODS))]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_layer_starts_as_its_method_alone_would_start_it(first, second):
    model, report = initialised(hs.PerLayer({PATTERN: parse_method(first), "*": second}))
    layers = {layer.name: layer for layer in report.layers}
    made = state(model)
    assert list(layers) == list(alone(first)[1]) and made.keys() == layers.keys()
    for name, layer in layers.items():
        method = first if fits(PATTERN, name) else second
        assert same(made[name], alone(method)[0][name]), name
        own = alone(method)[1][name]
        assert (layer.method, layer.form, layer.info) == (own.method, own.form, own.info)
    assert report.samples == max(alone_samples(first), alone_samples(second))


@functools.cache
def alone_samples(method):
    return initialised(method)[1].samples


def test_residual_weights_are_those_of_the_layers_that_subtract():
    model, report = initialised(hs.PerLayer({PATTERN: "pissa", "*": "lora-one:samples=4"}), form="residual")
    expected, _ = initialised("pissa", form="residual")
    base = dict(wrap(tiny_llama()).named_parameters())
    subtracted = dict(expected.named_parameters())
    for target in lora_layers(model, "default"):
        key = f"base_model.model.{target.name}.base_layer.weight"
        own = subtracted if fits(PATTERN, target.name) else base
        assert torch.equal(target.module.get_base_layer().weight, own[key])
    assert report.form == "residual and kept"


def test_a_method_with_a_rule_across_layers_sees_those_of_its_own_pattern():
    names = ["q_proj", "up_proj", "down_proj"]
    method = hs.PerLayer({"|".join(names): "eva:samples=8,rho=3", "*": "init-ab"})
    model, report = initialised(method)
    expected, few = initialised("eva:samples=8,rho=3", target_modules=names)
    made, own = state(model), state(expected)
    drawn = alone("init-ab")[0]
    ranks = {layer.name: layer.r for layer in report.layers}
    assert {layer.name: layer.r for layer in few.layers}.items() <= ranks.items()
    assert len({ranks[name] for name in own}) > 1, "the ranks were shared out"
    for name in made:
        assert same(made[name], own[name] if name in own else drawn[name])
    assert all(ranks[name] == 4 for name in drawn.keys() - {layer.name for layer in few.layers})


def test_deviations_of_weights_are_those_of_the_own_pattern():
    """A pattern may divide a kind: the first layer's q_proj has another deviation than both have."""
    method = hs.PerLayer(
        {r"layers\.0\.self_attn\.q_proj": "inilora:solver=adam,steps=0", "*": "inilora:solver=adam,steps=0,lr=0.001"}
    )
    base = tiny_llama()
    base.model.layers[1].self_attn.q_proj.weight.data *= 3
    model = wrap(base)
    hs.initialize_(model, method, seed=3, progress=False)
    single = wrap(tiny_llama(), target_modules=r".*layers\.0\.self_attn\.q_proj")
    hs.initialize_(single, "inilora:solver=adam,steps=0", seed=3, progress=False)
    ((name, factors),) = all_factors(single).items()
    assert same(all_factors(model)[name], factors)


def test_only_layers_whose_method_wants_them_are_read(monkeypatch):
    wanted, prepare = [], collect.prepare

    def noticed(model, layers, read_for, *rest, **more):
        wanted.append((set(read_for), rest[1]))
        return prepare(model, layers, read_for, *rest, **more)

    monkeypatch.setattr(collect, "prepare", noticed)
    initialised(hs.PerLayer({"q_proj": "lora-one:samples=4", "k_proj": "eva:samples=6", "*": "pissa"}))
    assert [samples for _, samples in wanted] == [4, 6]
    assert all(
        fits(kind, name) for kind, (names, _) in zip(("q_proj", "k_proj"), wanted, strict=True) for name in names
    )
    wanted.clear()
    initialised(hs.PerLayer({"q_proj": "pissa", "*": "lora"}))
    assert not wanted


def test_data_that_can_be_iterated_once_are_enough():
    method = hs.PerLayer({"q_proj": "lora-one:samples=9", "k_proj": "lora-da:samples=10", "*": "eva:samples=4"})
    once, report = initialised(method, data=iter(batches()))
    again, _ = initialised(method)
    assert report.samples == 10 and all(same(own, state(again)[name]) for name, own in state(once).items())


def test_a_trainers_samples_are_those_of_each_method_alone(tmp_path):
    def of_trainer(method):
        model = wrap(tiny_llama())
        report = hs.initialize_(model, method, data=plain_trainer(tmp_path, model), seed=2, progress=False)
        return state(model), report

    first, second = "lora-da:samples=4,layers=feed-forward", "lora-sb:share=0.6"
    made, report = of_trainer(hs.PerLayer({PATTERN: first, "*": second}))
    assert report.samples == 7
    for name, own in made.items():
        assert same(own, of_trainer(first if fits(PATTERN, name) else second)[0][name])


def test_what_was_computed_alone_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT")

    def cached(method):
        return hs.initialize_(wrap(tiny_llama()), method, cache=tmp_path, progress=False).cached

    assert cached("pissa") == 0 and cached("inilora:solver=adam,steps=5") == 0
    # Four layers are q_proj or v_proj, ten are others.
    assert cached(hs.PerLayer({"q_proj|v_proj": "pissa", "*": "inilora:solver=adam,steps=5"})) == 14
    assert cached(hs.PerLayer({"q_proj|v_proj": "pissa", "*": "lora"})) == 4
    assert cached(hs.PerLayer({"q_proj|v_proj": "milora", "*": "pissa"})) == 10
    assert cached("milora") == 4


def test_the_layers_of_vera_share_what_the_methods_find():
    method = hs.PerLayer({"q_proj|v_proj": "lora-one:samples=4", "*": "pissa"})
    found, _ = initialised(method, r=6, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    expected = principal_directions([A for A, _ in all_factors(found).values()], torch.ones(6, 48))
    model = vera(tiny_llama())
    report = hs.initialize_(model, method, data=batches(), seed=3, progress=False)
    shared = next(module for module in model.modules() if hasattr(module, "vera_lambda_b")).vera_A["default"]
    assert torch.allclose(shared / shared.norm(), expected / expected.norm(), atol=1e-5)
    assert report.form == "shared dictionary" and len({layer.method for layer in report.layers}) == 2


# Refusals come before the first sample.

REFUSED = {
    "DoRA": (dora, {"q_proj": "lora-one", "up_proj": "pissa", "*": "lora"}, r"up_proj' uses DoRA, whose norms"),
    "DoRA and a core": (dora, {"q_proj": "lora-one", "up_proj": "lora-xs", "*": "lora"}, r"up_proj' uses DoRA, which"),
    "LoRA-FA": (frozen, {"q_proj": "lora-one", "v_proj": "init-b", "*": "lora"}, r"v_proj': LoRA-FA has frozen its A"),
    "no rate": (None, {"q_proj": "lora-one", "*": "lora-sb:samples=4"}, "needs the rate of the first optimizer step"),
    "no size": (None, {"q_proj": "lora-one", "*": "lora-sb:lr=0.1"}, "whose size these data don't tell"),
    "not quantised": (None, {"q_proj": "lora-one", "up_proj": "loftq", "*": "lora"}, "up_proj' is not quantised"),
    "twice the rank": (
        lambda: wrap(tiny_llama(), r=10),
        {"q_proj": "lora-one", "k_proj": "lora-ga", "*": "lora"},
        r"k_proj': method 'lora-ga' takes 2 r = 20",
    ),
    "none left": (None, {"up_proj": "lora-da:layers=attention", "*": "lora-one"}, "leaves out every layer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_come_before_the_first_sample(what):
    make, by_pattern, words = REFUSED[what]
    model = make() if make else wrap(tiny_llama())
    with pytest.raises(hs.HeadstartError, match=words):
        hs.initialize_(model, hs.PerLayer(by_pattern), data=Unread(), progress=False)
    assert not any(hasattr(target.module, "headstart_record") for target in lora_layers(model, "default"))


def test_no_data_is_said_of_the_method_that_reads_them():
    with pytest.raises(hs.HeadstartError, match="method 'lora-one' needs data"):
        hs.initialize_(wrap(tiny_llama()), hs.PerLayer({"q_proj": "pissa", "*": "lora-one"}), progress=False)


@pytest.mark.parametrize(("method", "words"), [("lora-xs", "adds a parameter"), ("eva", "parameters of other ranks")])
def test_new_parameters_come_before_the_optimizer_and_the_wrapper(method, words, tmp_path, process_group):
    method = hs.PerLayer({"q_proj": "lora", "*": method})
    model = wrap(tiny_llama())
    trainer = plain_trainer(tmp_path, model)
    trainer.create_optimizer()
    with pytest.raises(hs.LayerError, match=words):
        hs.initialize_(model, method, data=trainer, progress=False)
    with pytest.raises(hs.LayerError, match=words):
        wrapped = torch.nn.parallel.DistributedDataParallel(wrap(tiny_llama()))
        hs.initialize_(wrapped, method, data=[token_batch()], progress=False)


# Several processes.


def in_a_process(rank, text):
    model, report = initialised(text)
    return state(model), report.samples, report.form


def sharded(rank, text):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = wrap(tiny_llama()), init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    report = hs.initialize_(model, text, data=batches(), seed=3, progress=False)
    return state(model), report.samples, report.form


@pytest.mark.parametrize(("how", "last"), [(in_a_process, "lora-xs"), (sharded, "olora")])
def test_two_processes_give_the_factors_of_one(tmp_path, how, last):
    by_pattern = {"q_proj": "lora-one:samples=10", "v_proj": "pissa", "up_proj": "eva:samples=6,rho=1", "*": last}
    text = str(hs.PerLayer(by_pattern))
    model, report = initialised(text)
    for made, samples, form in together(tmp_path, how, text):
        assert (samples, form) == (report.samples, report.form)
        for name, (A, B, core, _) in state(model).items():
            A1, B1, core1, _ = made[name]
            assert torch.allclose(A.T @ A, A1.T @ A1, atol=1e-4) and torch.allclose(B @ A, B1 @ A1, atol=1e-4)
            assert (core is None) == (core1 is None) and (core is None or torch.equal(core, core1))
