"""GoRA against least squares in float64: its step downhill, its size, and the ranks that layers get."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import tiny_llama, token_batch, wrap
from inputs import product
from known_layers import everything, layer, normal, of_gradient, problems
from oracles import exact_gradients, relative
from snapshots import targets_of

GIVEN = hs.GoRA(ranks="given")


def projector(A):
    return torch.linalg.pinv(A.double()) @ A.double()


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1e-3, 0.05, 2.0]))
def test_the_product_is_the_projected_step_whatever_the_scaling(problem, step):
    G, r, s = problem
    at = of_gradient(G, r, s=s)
    start = dataclasses.replace(GIVEN, step=step).factors(at)
    expected = -step * math.sqrt(at.d_in / r) * G.double() @ projector(start.A)
    assert relative(product(start, s), expected) < 1e-4
    # A is plain LoRA's.
    assert float(start.A.abs().max()) <= 1 / math.sqrt(at.d_in)
    assert float(start.A.norm()) > 0


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(30, 20, 4), (20, 30, 7), (12, 12, 12)])
def test_no_other_B_is_nearer_to_the_step(d_out, d_in, r):
    G = normal(d_out, d_in, std=1e-3)
    start = GIVEN.factors(of_gradient(G, r, s=1.5))
    c = 0.05 * math.sqrt(d_in / r)
    solved = torch.linalg.lstsq(start.A.double().T, -c * G.double().T).solution.T / 1.5
    assert relative(start.B, solved) < 1e-5
    least = float((product(start, 1.5) + c * G.double()).norm())
    for seed in range(20):
        moved = start.B.double() + 1e-3 * float(start.B.norm()) * normal(d_out, r, seed=seed).double()
        assert float((1.5 * moved @ start.A.double() + c * G.double()).norm()) > least


def test_at_full_rank_it_is_the_step_itself():
    G = normal(15, 9, std=1e-3)
    start = GIVEN.factors(of_gradient(G, 9, s=0.7))
    assert relative(product(start, 0.7), -0.05 * G.double()) < 1e-4


def test_over_draws_the_product_is_as_long_as_the_step():
    G = normal(24, 64, std=1e-3)
    squares = torch.tensor(
        [float(product(GIVEN.factors(of_gradient(G, 4, s=2.0, seed=seed)), 2.0).square().sum()) for seed in range(300)]
    )
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - float((0.05 * G.double()).square().sum())) < 4 * error


@pytest.mark.parametrize("ranks", ["given", "chosen"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_loss_falls(ranks, rslora):
    model, batch = wrap(tiny_llama(), use_rslora=rslora).eval(), token_batch()
    before = float(model(**batch).loss.detach())
    hs.initialize_(model, f"gora:samples=4,ranks={ranks}", data=[batch])
    after = float(model(**batch).loss.detach())
    # To first order by the step times the squared norm of the gradient's part in A's rows.
    assert after < before - 1e-4


@pytest.mark.parametrize("ranks", ["given", "chosen"])
def test_end_to_end_from_one_sample_at_a_time(ranks):
    model, batch = wrap(tiny_llama().double()), token_batch()
    scaling = {name: target.scaling for name, target in targets_of(model).items()}
    report = hs.initialize_(model, hs.GoRA(samples=4, ranks=ranks), data=[batch])
    shares = {line.name: line.info["share"] for line in report.layers}
    found = targets_of(model)
    exact = exact_gradients(tiny_llama().double(), [batch], list(found))
    if ranks == "chosen":
        importance = {
            name: float((target.module.get_base_layer().weight * exact[name]).abs().mean().detach())
            for name, target in found.items()
        }
        budget = sum(4 * (target.d_out + target.d_in) for target in found.values())
        for name, target in found.items():
            share = importance[name] / sum(importance.values())
            rank = round(budget * share) // (target.d_out + target.d_in)
            assert target.r == min(max(rank, 2), 16), name
        assert len({target.r for target in found.values()}) > 2
    for name, target in found.items():
        A, B = (part["default"].weight.detach() for part in (target.module.lora_A, target.module.lora_B))
        assert len(A) == target.r and target.scaling == pytest.approx(scaling[name])
        expected = -0.05 * math.sqrt(target.d_in / target.r) * exact[name] @ projector(A)
        assert relative(target.scaling * B.double() @ A.double(), expected) < 1e-4, name
        inside = float((exact[name] @ projector(A)).square().sum() / exact[name].square().sum())
        assert shares[name] == pytest.approx(inside, rel=1e-4), name


def shared(importances, ranks, d_out=40, d_in=30, **method):
    """The starts of layers of these importances, before ranks are shared out."""
    G = normal(d_out, d_in, std=1e-3)
    W = torch.full((d_out, d_in), 1 / float(G.abs().mean()))
    return {
        name: hs.GoRA(**method).factors(
            layer(d_out, d_in, ranks[name], gradient=G, weight=W * importances[name], name=name)
        )
        for name in importances
    }


def test_ranks_follow_importance():
    ranks = dict.fromkeys("abcd", 6)
    settled = hs.GoRA().settle(shared({"a": 1.0, "b": 2.0, "c": 3.0, "d": 2.0}, ranks), ranks)
    assert {name: len(start.A) for name, start in settled.items()} == {"a": 3, "b": 6, "c": 9, "d": 6}
    assert all(start.spare is None and start.spare_B is None for start in settled.values())


@pytest.mark.parametrize(("rank_cost", "cost"), [("parameters", float), ("root", math.sqrt)])
def test_what_a_rank_costs(rank_cost, cost):
    method, shapes = (
        hs.GoRA(rank_cost=rank_cost, smallest=0.1),
        {"wide": (40, 200), "high": (60, 30), "small": (16, 12)},
    )
    importances, ranks, starts = {"wide": 2.0, "high": 3.0, "small": 2.5}, {"wide": 6, "high": 7, "small": 8}, {}
    for name, shape in shapes.items():
        starts |= shared({name: importances[name]}, ranks, *shape, rank_cost=rank_cost, smallest=0.1)
    settled = method.settle(starts, ranks)
    budget = sum(ranks[name] * cost(sum(shape)) for name, shape in shapes.items())
    for name, shape in shapes.items():
        rank = math.floor(round(budget * importances[name] / 7.5) / cost(sum(shape)))
        most = min(4 * ranks[name], *shape)
        assert len(settled[name].A) == settled[name].B.shape[1] == min(rank, most), name


def test_a_rank_rounded_down_never_pays_more_than_there_is():
    ranks = dict.fromkeys("abc", 4)
    settled = hs.GoRA().settle(shared({"a": 1.0, "b": 1.3, "c": 1.7}, ranks), ranks)
    assert sum(len(start.A) for start in settled.values()) <= 12
    assert {name: len(start.A) for name, start in settled.items()} == {"a": 3, "b": 3, "c": 5}


@settings(max_examples=60, deadline=None)
@given(
    importances=st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 1e6), min_size=1),
    smallest=st.floats(0, 1),
    largest=st.floats(1, 8),
    data=st.data(),
)
def test_ranks_stay_within_their_bounds(importances, smallest, largest, data):
    ranks = {name: data.draw(st.integers(1, 12)) for name in importances}
    method = hs.GoRA(smallest=smallest, largest=largest)
    starts = shared(importances, ranks, d_out=20, d_in=16, smallest=smallest, largest=largest)
    settled = method.settle(starts, ranks)
    for name, start in settled.items():
        r = ranks[name]
        assert max(1, math.floor(smallest * r)) <= len(start.A) <= max(r, min(math.floor(largest * r), 16))
        assert start.B.shape == (20, len(start.A))
        expected = -0.05 * math.sqrt(16 / len(start.A)) * normal(20, 16, std=1e-3).double() @ projector(start.A)
        assert relative(product(start), expected) < 1e-3


def test_a_layer_without_a_gradient_keeps_its_rank_and_takes_none_from_others():
    ranks = dict.fromkeys("ab", 4)
    starts = shared({"a": 1.0, "b": 2.0}, ranks)
    unreached = layer(40, 30, 5, gradient=torch.zeros(40, 30), name="unreached")
    lone = hs.GoRA().factors(unreached)
    assert "no gradient" in lone.note and torch.equal(lone.A, hs.LoRA().factors(unreached).A)
    settled = hs.GoRA().settle({**starts, "unreached": lone}, {**ranks, "unreached": 5})
    alone = hs.GoRA().settle(starts, ranks)
    assert len(settled["unreached"].A) == 5
    assert all(len(settled[name].A) == len(alone[name].A) for name in "ab")


def test_where_nothing_is_important_ranks_stay():
    ranks = dict.fromkeys("ab", 4)
    starts = shared({"a": 0.0, "b": 0.0}, ranks)
    assert all(len(start.A) == 4 for start in hs.GoRA().settle(starts, ranks).values())


def test_the_losss_normalisation_changes_no_rank():
    ranks = dict.fromkeys("abcd", 6)
    one, other = (
        hs.GoRA().settle(shared({"a": size, "b": 2 * size, "c": 3.5 * size, "d": size}, ranks), ranks)
        for size in (1.0, 1e-5)
    )
    assert [len(start.A) for start in one.values()] == [len(start.A) for start in other.values()]


def test_the_weight_is_read_where_ranks_are_chosen_alone():
    at = everything()
    assert str(hs.GoRA().wants(at)) == "weight + gradient" and hs.GoRA().shares_ranks
    assert str(GIVEN.wants(at)) == "gradient" and not GIVEN.shares_ranks
    assert GIVEN.factors(dataclasses.replace(at, weight=None)).spare is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("step", 0.0),
        ("step", math.nan),
        ("smallest", 1.5),
        ("smallest", -0.1),
        ("largest", 0.5),
        ("ranks", "shared"),
        ("rank_cost", "cubic"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(hs.MethodError, match=setting):
        hs.GoRA(**{setting: value})
