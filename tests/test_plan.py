"""Plans for a memory budget: what they promise, and that several passes find what one does."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import all_factors, tiny_llama, tiny_t5, token_batch, wrap
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers
from headstart.methods import method_class
from headstart.methods.base import Wants
from headstart.methods.gradient import GradientMethod
from headstart.statistics.plan import Need, Plan, free_memory, make_plan, parse_bytes
from headstart.statistics.prepare import prepare
from oracles import relative

CPU = torch.device("cpu")
# The machine may be busy with other things.
PATIENT = settings(deadline=None)
FEWER = settings(deadline=None, max_examples=60)
UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


# Budgets in words.


@PATIENT
@given(
    st.integers(1, 4000),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from([str.lower, str.upper, str.title, str.capitalize]),
    st.tuples(*[st.sampled_from(["", " ", "  ", "\t"])] * 3),
)
def test_a_size_in_words(number, unit, case, spaces):
    before, between, after = spaces
    assert parse_bytes(f"{before}{number}{between}{case(unit)}{after}", CPU) == number * UNITS[unit]


@PATIENT
@given(st.integers(0, 999), st.integers(1, 999), st.sampled_from([unit for unit in sorted(UNITS) if len(unit) > 1]))
def test_a_size_with_a_fraction(whole, thousandths, unit):
    exact = (whole * 1000 + thousandths) * UNITS[unit] / 1000
    assert abs(parse_bytes(f"{whole}.{thousandths:03d}{unit}", CPU) - exact) <= 1


@PATIENT
@given(st.integers(1, 2**70))
def test_a_number_of_bytes(number):
    assert parse_bytes(number, CPU) == number


NOT_SIZES = ["", " ", "GiB", "6 GiBs", "6XB", "-6GiB", "+6GiB", "6,5GiB", "1e9", "0x10", "6GiB8", "6 6", ".5g", "5.g"]
NOT_SIZES += ["nan", "inf", "0", "0GiB", "0.4b", 0, -1, 6.5, True, False, [6], b"6GiB"]


@pytest.mark.parametrize("budget", NOT_SIZES)
def test_what_is_no_size_is_refused(budget):
    with pytest.raises(hs.MethodError, match="memory_budget="):
        parse_bytes(budget, CPU)


@PATIENT
@given(st.text(max_size=8))
def test_any_text_is_a_size_or_refused(text):
    try:
        found = parse_bytes(text, CPU)
    except hs.MethodError:
        return
    assert isinstance(found, int) and found > 0


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GiB", "0." + "0" * 400 + "1GiB", "9" * 5000])
def test_a_number_too_long_for_a_float(text):
    with pytest.raises(hs.MethodError, match="memory_budget="):
        parse_bytes(text, CPU)


def test_by_default_half_of_what_is_free():
    free = free_memory(CPU)
    assert 0.4 * free < parse_bytes(None, CPU) < 0.6 * free


def test_the_verb_refuses_what_is_no_size_before_it_reads():
    def data():
        raise AssertionError("read")
        yield

    with pytest.raises(hs.MethodError, match="memory_budget="):
        hs.initialize_(wrap(tiny_llama()), "lora-da:samples=2", data=data(), memory_budget="much")


# Plans.


@st.composite
def problems(draw, most=40):
    sizes = draw(st.lists(st.integers(0, 120), min_size=1, max_size=most))
    needs = []
    for number, size in enumerate(sizes):
        layers = draw(st.integers(1, 3))
        needs.append(Need(tuple(f"{number}.{layer}" for layer in range(layers)), size))
    return needs, draw(st.integers(1, 150))


def sizes_of(plan, needs):
    by_name = {need.names[0]: need.bytes for need in needs}
    return [[by_name[name] for name in names if name in by_name] for names in plan.passes]


@PATIENT
@given(problems())
def test_every_layer_once_and_no_pass_over_the_budget(problem):
    needs, budget = problem
    plan = make_plan(needs, budget)
    assert sorted(name for names in plan.passes for name in names) == sorted(n for need in needs for n in need.names)
    for need in needs:  # in one pass, what shares sums
        assert sum(set(need.names) <= set(names) for names in plan.passes) == 1
    passes = sizes_of(plan, needs)
    for sizes in passes:
        assert sum(sizes) <= budget or len(sizes) == 1
    assert plan.bytes == max(map(sum, passes))
    assert plan.budget == budget


@PATIENT
@given(problems())
def test_the_largest_come_first(problem):
    needs, budget = problem
    passes = sizes_of(make_plan(needs, budget), needs)
    assert passes[0][0] == max(need.bytes for need in needs)
    assert [sizes[0] for sizes in passes] == sorted((sizes[0] for sizes in passes), reverse=True)
    for sizes in passes:
        assert sizes == sorted(sizes, reverse=True)
    # First fit: nothing would have fitted into an earlier pass.
    for later, sizes in enumerate(passes):
        for size in sizes:
            for earlier in passes[:later]:
                assert sum(other for other in earlier if other >= size) + size > budget


def fewest(sizes, budget):
    """The smallest number of passes there is, by trying all subsets."""
    best = [(0, 0)] + [(len(sizes) + 1, 0)] * (2 ** len(sizes) - 1)  # passes, bytes in the last one
    for chosen in range(2 ** len(sizes)):
        passes, last = best[chosen]
        for place, size in enumerate(sizes):
            if chosen >> place & 1:
                continue
            one_more = (passes, last + size) if passes and last + size <= budget else (passes + 1, size)
            best[chosen | 1 << place] = min(best[chosen | 1 << place], one_more)
    return best[-1][0]


@FEWER
@given(problems(most=8))
def test_few_passes(problem):
    """First fit decreasing needs at most 11/9 of the fewest passes, plus 6/9 (Dosa 2007)."""
    needs, budget = problem
    fitting = [need for need in needs if need.bytes <= budget]
    if not fitting:
        return
    count = len(make_plan(fitting, budget).passes)
    assert 9 * count <= 11 * fewest([need.bytes for need in fitting], budget) + 6
    # What is too large by itself costs a pass each, and no more than that.
    assert len(make_plan(needs, budget).passes) == count + len(needs) - len(fitting)


@PATIENT
@given(problems(), st.integers(0, 50))
def test_a_plan_is_the_same_each_time(problem, shift):
    needs, budget = problem
    assert make_plan(needs, budget) == make_plan(list(needs), budget)
    # And needs no more passes with more room, where all of it fits.
    if sum(need.bytes for need in needs) <= budget + shift:
        assert len(make_plan(needs, budget + shift).passes) == 1


def test_a_plan_of_nothing():
    plan = make_plan([], 5)
    assert plan.passes == () and plan.bytes == 0


@pytest.mark.parametrize(
    "count, seconds, size, text",
    [
        (1, None, 2**30, "1 pass, 1.00 GiB"),
        (2, None, 2**29, "2 passes, 0.50 GiB"),
        (3, 10.0, 2**31, "3 passes, 2.00 GiB, about 30 s"),
        (1, 119.0, 2**30, "1 pass, 1.00 GiB, about 119 s"),
        (6, 60.0, 2**30, "6 passes, 1.00 GiB, about 6 min"),
    ],
)
def test_a_plan_in_words(count, seconds, size, text):
    needs = [Need((str(number),), size) for number in range(count)]
    plan = make_plan(needs, size, seconds=seconds)
    assert isinstance(plan, Plan)
    assert str(plan) == text
    assert len(plan.passes) == count
    assert plan.seconds == (None if seconds is None else pytest.approx(seconds * count))


# Passes.


def collector(model, wanted, **kwargs):
    layers = {target.name: target.module for target in lora_layers(model, "default")}
    data = [token_batch(5), token_batch(4, 9, 7)]
    return prepare(model, layers, dict.fromkeys(layers, wanted), data, 8, **kwargs)


def bytes_of(passed):
    """Return what a pass holds, counting a tensor that layers share once."""
    held = [*passed.gradients.values(), *(half.gradient for half in passed.halves.values())]
    for factors in passed.kronecker.values():
        held += [factors.inputs, factors.outputs, factors.mean_input, factors.mean_output]
    return 4 * sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in held}.values())


@pytest.mark.parametrize(
    ("outputs", "budget", "offload"),
    [
        ("diagonal", 1, None),
        ("diagonal", "20KB", "cpu"),
        ("full", "40KiB", None),
        ("full", "80KB", None),
        ("full", 1, "cpu"),
    ],
)
def test_several_passes_find_what_one_does(outputs, budget, offload):
    base = tiny_llama()
    wanted = Wants(gradient=True, outputs=outputs)
    (whole,) = collector(wrap(copy.deepcopy(base)), wanted).passes()
    several = collector(wrap(copy.deepcopy(base)), wanted, memory_budget=budget, offload=offload)
    seen = []
    count = 0
    for passed in several.passes():
        count += 1
        assert passed.samples == 8 and passed.tokens == whole.tokens
        assert set(passed.kronecker) == set(passed.gradients) == set(passed.layers)
        seen += passed.layers
        # What was planned is what is held.
        assert bytes_of(passed) <= several.plan.bytes
        assert bytes_of(passed) <= several.plan.budget or len(set(passed.groups.values())) == 1
        for name in passed.layers:
            mine, theirs = passed.kronecker[name], whole.kronecker[name]
            assert mine.tokens == theirs.tokens
            for part in ("inputs", "outputs", "mean_input", "mean_output"):
                torch.testing.assert_close(getattr(mine, part), getattr(theirs, part), rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(passed.gradients[name], whole.gradients[name], rtol=1e-5, atol=1e-8)
            for other in passed.layers:
                if whole.groups[name] == whole.groups[other]:
                    assert mine.inputs is passed.kronecker[other].inputs
    assert sorted(seen) == sorted(whole.layers) and len(seen) == len(set(seen))
    assert count == len(several.plan.passes) > 1


def test_what_is_planned_is_what_is_held():
    for outputs, halves in (("diagonal", False), ("full", False), ("diagonal", True), (None, True)):
        one = collector(wrap(tiny_llama()), Wants(gradient=True, outputs=outputs, halves=halves))
        (passed,) = one.passes()
        assert bytes_of(passed) == one.plan.bytes


def test_layers_of_one_input_are_never_divided():
    several = collector(wrap(tiny_llama()), Wants(gradient=True, outputs="diagonal"), memory_budget=1)
    assert len(several.plan.passes) == 8
    assert all(len({name.rpartition(".")[0] for name in names}) == 1 for names in several.plan.passes)


def test_the_encoders_states_are_planned_once():
    """All cross-attentions read them, so that they are one need, however small the budget."""
    model = wrap(tiny_t5(), target_modules=["k", "v"])
    layers = {target.name: target.module for target in lora_layers(model, "default")}
    batch = token_batch(4, 12)
    wanted = dict.fromkeys(layers, Wants(gradient=True, outputs="diagonal"))
    plan = prepare(model, layers, wanted, [batch], 4, memory_budget=1).plan
    cross = [names for names in plan.passes if any("EncDec" in name for name in names)]
    assert len(cross) == 1 and len(cross[0]) == 4


def test_gradients_alone_can_be_divided():
    largest = 4 * 48 * 32
    plan = collector(wrap(tiny_llama()), Wants(gradient=True), memory_budget=largest).plan
    assert plan.bytes <= largest


@pytest.mark.parametrize("budget", [1, 4 * 48 * 32, "20KB"])
def test_several_passes_find_the_gradients_of_one(budget):
    """Layers of one input among them, which no longer are in one pass."""
    base = tiny_llama()
    (whole,) = collector(wrap(copy.deepcopy(base)), Wants(gradient=True)).passes()
    several = collector(wrap(copy.deepcopy(base)), Wants(gradient=True), memory_budget=budget)
    seen = []
    for passed in several.passes():
        assert bytes_of(passed) <= several.plan.bytes and not passed.kronecker
        assert set(passed.gradients) == set(passed.layers)
        seen += passed.layers
        for name, gradient in passed.gradients.items():
            torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-5, atol=1e-8)
    assert sorted(seen) == sorted(whole.layers) and len(several.plan.passes) > 1
    if budget == 1:
        assert all(len(names) == 1 for names in several.plan.passes)


def test_progress_counts_all_passes():
    told = []
    several = collector(wrap(tiny_llama()), Wants(gradient=True, outputs="diagonal"), memory_budget="20KB")
    assert len(list(several.passes(lambda *what: told.append(what)))) == len(several.plan.passes)
    labels, done, total = zip(*told, strict=True)
    assert set(labels) == {f"data: {several.plan}"}
    assert set(total) == {8 * len(several.plan.passes)}
    assert list(done) == sorted(done) and done[0] == 0 and done[-1] == total[0]


def test_notes_come_once():
    base = tiny_llama()
    model = wrap(base)
    layers = {target.name: target.module for target in lora_layers(model, "default")}
    wanted = dict.fromkeys(layers, Wants(gradient=True, outputs="diagonal"))
    passes = list(prepare(model, layers, wanted, [token_batch()], 9, memory_budget=1).passes())
    over, short = (note for passed in passes for note in passed.notes)
    assert "q_proj' alone needs more than memory_budget" in over
    assert short == "the data held 4 samples, 9 were asked for"


# Through the verb.


@pytest.mark.parametrize(
    ("settings_", "given_"),
    [
        ("", dict(memory_budget="20KB")),
        ("", dict(offload="cpu")),
        ("", dict(memory_budget=1, offload="cpu")),
        (",fisher=full", dict(memory_budget=1, offload="cpu")),
        (",tokens=labels", dict(memory_budget="20KB")),
        (",layers=attention", dict(memory_budget="20KB")),
    ],
)
def test_the_verb_in_several_passes(settings_, given_):
    data = [token_batch(5), token_batch(4, 9, 7)]
    plain, several = wrap(tiny_llama()), wrap(tiny_llama())
    method = "lora-da:samples=8" + settings_
    first = hs.initialize_(plain, method, data=data)
    report = hs.initialize_(several, method, data=data, **given_)
    assert re.fullmatch(r"1 pass, \d+\.\d\d GiB, about \d+ (s|min)", first.plan)
    if "memory_budget" in given_:
        count = re.fullmatch(r"(\d+) passes, \d+\.\d\d GiB, about \d+ (s|min)", report.plan)[1]
        assert int(count) > 2
        assert report.plan in str(report)
    else:
        assert report.plan.startswith("1 pass,")
    assert (report.samples, report.tokens) == (first.samples, first.tokens) == (8, first.tokens)
    for name, (A, B) in all_factors(several).items():
        exact_A, exact_B = all_factors(plain)[name]
        # Delta passes through inverses of Z, whose condition number is large: products are what agrees best.
        assert torch.allclose(A, exact_A, atol=1e-5), name
        assert torch.allclose(B, exact_B, atol=1e-5), name
        assert A.isfinite().all() and B.isfinite().all()


GRADIENT_METHODS = [
    "lora-one:samples=8",
    "lora-ga:samples=8",
    "lora-ga:samples=8,scale=weight,norm_clip=true",
    "keeplora-plus:samples=8",
    "lora-sb:samples=8,lr=0.1",
    # Not normalised.
    "kfac-newton:samples=8,p=0,normalize=false",
    "keeplora:samples=8",
    "gora:samples=8",
    "lora-sb:samples=8,lr=0.1,optimizer=sgd,split=suboptimal",
    "lora-da:samples=8,fisher=none,variance=0,normalize=false",
]


def test_every_method_of_the_gradient_is_tried_in_several_passes():
    named = {name for name in hs.method_names() if issubclass(method_class(name), GradientMethod)}
    assert {method.partition(":")[0] for method in GRADIENT_METHODS} == named


def all_parts(model):
    """A, B and the core, where there is one, of every layer."""
    cores = {target.name: core_of(target.module, "default") for target in lora_layers(model, "default")}
    return {
        name: (*pair, *([] if cores[name] is None else [cores[name].detach()]))
        for name, pair in all_factors(model).items()
    }


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_the_start_is_the_same_whatever_gradients_there_is_room_for(method):
    """Only one layer's gradient at a time, and all of them."""
    data = [token_batch(5), token_batch(4, 9, 7)]
    models = [wrap(tiny_llama(), r=2) for _ in range(2)]
    for model, budget, count in zip(models, (None, 1), ("1 pass,", "14 passes,"), strict=True):
        report = hs.initialize_(model, method, data=data, memory_budget=budget, progress=False)
        assert report.plan.startswith(count)
    whole, divided = map(all_parts, models)
    assert whole.keys() == divided.keys()
    for name, parts in whole.items():
        for part, other in zip(parts, divided[name], strict=True):
            assert relative(other, part) < 1e-5 if part.any() else not other.any(), name
        assert parts[0].any() and (parts[1].any() or method.startswith("keeplora-plus")), name


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("method", GRADIENT_METHODS[-5:])
def test_sizes_do_not_depend_on_how_many_samples_there_are(method, budget):
    """Where nothing is normalised, the factors would show a sum in place of a mean, over samples or over passes."""
    once = token_batch(2, 5, padded=False)
    norms = []
    for times in (1, 3):
        model = wrap(tiny_llama(), r=2, target_modules=["q_proj", "down_proj"])
        changed = method.replace("samples=8", f"samples={2 * times}")
        report = hs.initialize_(model, changed, data=[once] * times, memory_budget=budget, progress=False)
        norms.append([(layer.norm_A, layer.norm_B) for layer in report.layers])
    assert norms[1] == [pytest.approx(norm, rel=1e-3) for norm in norms[0]]
    assert min(map(min, norms[0])) > 0


def test_the_data_are_read_once():
    """A generator serves as well as a list, however many passes there are."""
    data = [token_batch(5), token_batch(4, 9, 7)]
    listed, generated = wrap(tiny_llama()), wrap(tiny_llama())
    hs.initialize_(listed, "lora-da:samples=8,population=9", data=data, memory_budget="20KB")
    hs.initialize_(generated, "lora-da:samples=8,population=9", data=(batch for batch in data), memory_budget="20KB")
    for name, (A, B) in all_factors(listed).items():
        assert torch.equal(A, all_factors(generated)[name][0]) and torch.equal(B, all_factors(generated)[name][1])


def test_the_expected_seconds_are_a_number():
    once = collector(wrap(tiny_llama()), Wants(gradient=True, outputs="diagonal")).plan
    assert once.seconds is not None and 0 < once.seconds < 60
    assert math.isfinite(once.seconds)
