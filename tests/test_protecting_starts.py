"""Starts in subspaces of outputs and inputs, and data whose ability is to stay: astra, sc-lora, lora-null, corda."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import all_factors, logits, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.errors import DataError, MethodError
from headstart.layers.find import lora_layers
from headstart.statistics.training import TrainingData
from inputs import inputs_of, layer_of, normal, product
from oracles import exact_factors, relative

SHAPES = st.tuples(st.integers(2, 18), st.integers(2, 18), st.floats(0.2, 9), st.integers(0, 999))


def case(d_out=18, d_in=14, r=4, s=1.5, *, seed=0, keep_seed=50, **how):
    """Return a layer with the moments of two sets of inputs, and these inputs."""
    W, x = normal(d_out, d_in, seed=seed), inputs_of(200, d_in, seed=seed + 5, **how)
    kept = inputs_of(150, d_in, seed=keep_seed, **how)
    layer = layer_of(x, W, r, s=s)
    return replace(layer, preserved=layer_of(kept, W, r, s=s).kronecker), x, kept


def outputs_moment(W, moments):
    return W.double() @ moments.inputs.double() @ W.double().T


def top(M, r):
    return torch.linalg.eigh(M).eigenvectors[:, -r:]


def low(M, r):
    return torch.linalg.eigh(M).eigenvectors[:, :r]


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.data())
def test_astra_is_the_projection_on_the_outputs_leading_space(shape, data):
    d_out, d_in, s, seed = shape
    r = data.draw(st.integers(1, min(d_out, d_in)))
    layer, x, _ = case(d_out, d_in, r, s, seed=seed)
    start = hs.Astra().factors(layer)
    W, B = layer.weight.double(), start.B.double()
    assert torch.allclose(B.T @ B, torch.eye(r, dtype=torch.float64), atol=1e-5)
    M = product(start, s)
    assert float((M - B @ B.T @ W).norm()) < 1e-5 * float(W.norm())
    assert float(((W - M).T @ B).norm()) < 1e-4 * float(W.norm())
    # The least mean of |W x - M x|^2 at this rank is what the smaller eigenvalues sum up to.
    values = torch.linalg.eigvalsh(outputs_moment(layer.weight, layer.kronecker))
    lost = ((W - M) @ x.double().T).square().sum(0).mean()
    assert float(lost) == pytest.approx(float(values[:-r].sum()), rel=1e-3, abs=1e-4 * float(values.sum()))
    assert start.info["share"] == pytest.approx(float(values[-r:].sum() / values.sum()), rel=1e-4)


def test_astra_keeps_the_smallest_in_the_other_mode():
    layer, _, _ = case(10, 14, 3)
    start = hs.Astra(mode="kpm").factors(layer)
    Q = low(outputs_moment(layer.weight, layer.kronecker), 3)
    assert relative(start.B.double() @ start.B.double().T, Q @ Q.T) < 1e-4
    # Of more outputs than inputs the smallest are null, and so is their part of W.
    layer, _, _ = case(14, 5, 3)
    start = hs.Astra(mode="kpm").factors(layer)
    assert float(start.A.abs().max()) < 1e-4
    assert start.caution.startswith("3 of 3 chosen directions hold nothing of the weight")
    assert hs.Astra().factors(layer).caution == ""


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.floats(0, 1), st.data())
def test_sc_lora_is_the_leading_space_of_the_difference(shape, beta, data):
    d_out, d_in, s, seed = shape
    r = data.draw(st.integers(1, min(d_out, d_in)))
    layer, _, _ = case(d_out, d_in, r, s, seed=seed)
    start = hs.SCLoRA(beta=beta).factors(layer)
    W, B = layer.weight.double(), start.B.double()
    assert torch.allclose(B.T @ B, torch.eye(r, dtype=torch.float64), atol=1e-5)
    assert float((product(start, s) - B @ B.T @ W).norm()) < 1e-5 * float(W.norm())
    C, C_keep = (outputs_moment(layer.weight, moments) for moments in (layer.kronecker, layer.preserved))
    M = (1 - beta) * C - beta * C_keep
    # By what it maximises, which is the same where eigenvalues are equal.
    best = torch.linalg.eigvalsh(M)[-r:].sum()
    scale = float(torch.linalg.eigvalsh(M).abs().max())
    assert float((B * (M @ B)).sum()) == pytest.approx(float(best), abs=2e-4 * scale * r)


def test_sc_lora_at_its_ends():
    layer, _, _ = case()
    assert relative(product(hs.SCLoRA(beta=0.0).factors(layer), 1.5), product(hs.Astra().factors(layer), 1.5)) < 1e-4
    Q = low(outputs_moment(layer.weight, layer.preserved), 4)
    B = hs.SCLoRA(beta=1.0).factors(layer).B.double()
    assert float((B * (outputs_moment(layer.weight, layer.preserved) @ B)).sum()) == pytest.approx(
        float((Q * (outputs_moment(layer.weight, layer.preserved) @ Q)).sum()), abs=1e-3
    )
    # The same data in both roles: its leading space below one half, its last above.
    same = replace(layer, preserved=layer.kronecker)
    assert relative(product(hs.SCLoRA(beta=0.4).factors(same), 1.5), product(hs.Astra().factors(same), 1.5)) < 1e-3
    kept = hs.SCLoRA(beta=0.6).factors(same).info["kept"]
    assert kept < hs.SCLoRA(beta=0.4).factors(same).info["kept"]


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.data())
def test_lora_null_takes_the_part_that_is_excited_least(shape, data):
    d_out, d_in, s, seed = shape
    r = data.draw(st.integers(1, min(d_out, d_in)))
    layer, _, kept = case(d_out, d_in, r, s, seed=seed)
    start = hs.LoRANull().factors(layer)
    W, Z = layer.weight.double(), layer.preserved.inputs.double()
    values, vectors = torch.linalg.eigh(Z)
    N = vectors[:, :r]
    P = N @ N.T
    M = product(start, s)
    gap = values[r] - values[r - 1] if r < d_in else values[-1]
    if float(gap) > 1e-3 * float(values[-1]):
        assert relative(M, W @ P) < 1e-4
    # Whatever the directions: rows in a space of r, and no more energy of the data than the smallest eigenvalues have.
    moved = (M @ kept.double().T).square().sum(0).mean()
    assert float(moved) == pytest.approx(float((values[:r] * (W @ N).square().sum(0)).sum()), rel=1e-2, abs=1e-4)
    gram_B, gram_A = start.B.double().T @ start.B.double(), start.A.double() @ start.A.double().T
    assert torch.allclose(gram_B, gram_A, atol=1e-4 * float(gram_A.abs().max()))


def test_lora_null_never_meets_inputs_outside_its_space():
    layer, _, _ = case(d_in=14, r=4)
    start = hs.LoRANull(version="v2").factors(layer)
    assert start.frozen == hs.LoRANull(version="v2").freezes == ("lora_A",)
    Q = torch.linalg.qr(start.A.double().T).Q
    x = torch.randn(14, dtype=torch.float64)
    x -= Q @ (Q.T @ x)
    anything = torch.randn(18, 4, dtype=torch.float64)
    assert float((anything @ (start.A.double() @ x)).abs().max()) < 1e-5
    assert hs.LoRANull().factors(layer).frozen == ()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_lora_null_stays_in_its_space_where_the_weight_has_nothing_there(rank, version):
    layer, _, _ = case()
    W = layer.weight * (torch.arange(len(layer.weight)) < rank)[:, None]
    layer = replace(layer, weight=W)
    start = hs.LoRANull(version=version).factors(layer)
    N, A = low(layer.preserved.inputs.double(), layer.r), start.A.double()
    assert float((A - A @ N @ N.T).norm()) < 1e-5 * float(A.norm())
    assert float((product(start, layer.scaling) - W.double() @ N @ N.T).norm()) <= 1e-5 * float(W.norm())
    # As large as plain LoRA's rows, and each its own direction.
    rest = A[rank:]
    assert torch.allclose(rest @ rest.T, torch.eye(layer.r - rank, dtype=torch.float64) / 3, atol=1e-6)
    assert not start.B[:, rank:].count_nonzero()
    assert start.note.startswith(f"the weight is zero along {layer.r - rank} of the {layer.r} directions taken")


def test_lora_null_says_where_its_choice_is_arbitrary():
    W = normal(8, 12, seed=0)
    few = inputs_of(5, 12, seed=1)
    layer = replace(layer_of(few, W, 2), preserved=layer_of(few, W, 2).kronecker)
    start = hs.LoRANull().factors(layer)
    assert start.info["rank_of_inputs"] == 5
    assert "leave 7 directions free, of which 2 are taken arbitrarily" in start.caution
    assert start.info["energy"] < 1e-6


@pytest.mark.parametrize(("exponent", "mode"), [(0.0, "ipm"), (0.0, "kpm"), (0.5, "ipm"), (1.0, "ipm"), (1.7, "kpm")])
def test_cordas_exponents_are_one_family(exponent, mode):
    layer, _, _ = case(12, 14, 3)
    start = hs.CorDA(exponent=exponent, mode=mode, damping=1e-9).factors(layer)
    M, W = product(start, 1.5), layer.weight.double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    if exponent == 0:
        part = slice(0, 3) if mode == "ipm" else slice(9, 12)
        expected = U[:, part] * S[part] @ Vh[part]
    elif exponent == 0.5:
        expected = product(hs.Astra().factors(layer), 1.5)
    elif exponent == 1:
        expected = product(hs.CorDA(damping=1e-9).factors(layer), 1.5)
    else:
        values, vectors = torch.linalg.eigh(layer.kronecker.inputs.double())
        power = vectors * values.clamp_min(0) ** exponent @ vectors.T
        Q = torch.linalg.svd(W @ power, full_matrices=False).U[:, 9:]
        expected = Q @ Q.T @ W
    assert relative(M, expected) < 1e-3


def test_of_white_inputs_the_family_is_one():
    layer, _, _ = case(12, 14, 3)
    eye = replace(layer.kronecker, inputs=2.5 * torch.eye(14))
    white = replace(layer, kronecker=eye)
    pissa = product(hs.PiSSA().factors(white), 1.5)
    for method in (hs.Astra(), hs.CorDA(), hs.CorDA(exponent=0.5), hs.CorDA(exponent=0.0)):
        assert relative(product(method.factors(white), 1.5), pissa) < 1e-4


@pytest.mark.parametrize(
    "wrong", [lambda: hs.CorDA(exponent=-1.0), lambda: hs.SCLoRA(beta=1.5), lambda: hs.Astra(samples=0)]
)
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(MethodError):
        wrong()


# Through the verb.


def read(base, data, names):
    """Return by layer the second moment of the inputs over seven samples."""
    batches = [data[0], {key: value[: 7 - len(data[0]["labels"])] for key, value in data[1].items()}]
    return {name: one.Z for name, one in exact_factors(base, batches, names).items()}


TASK, KEEP = [token_batch(seed=1), token_batch(seed=2)], [token_batch(seed=7, size=3), token_batch(seed=8)]


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("method", ["sc-lora:samples=7", "lora-null:samples=7", "lora-null:samples=7,version=v2"])
def test_the_verb_reads_both_sets_of_data(base, method):
    plain = base()
    targets = {"target_modules": ["c_attn", "c_fc", "c_proj"]} if base is tiny_gpt2 else {}
    model = wrap(base(), **targets)
    before = logits(plain, TASK[0])
    hs.initialize_(model, method, data=TASK, preserve=KEEP)
    torch.testing.assert_close(logits(model, TASK[0]), before, rtol=1e-4, atol=1e-4)
    layers = {layer.name: layer for layer in lora_layers(model, "default")}
    names = list(layers)
    task, keep = (read(base(), data, names) for data in (TASK, KEEP))
    for name, (A, B) in all_factors(model).items():
        W = layers[name].weight().double()
        s, M = layers[name].scaling, layers[name].scaling * B.double() @ A.double()
        if method.startswith("sc-lora"):
            C, C_keep = (W @ Z[name] @ W.T for Z in (task, keep))
            difference = 0.2 * C - 0.8 * C_keep
            best = float(torch.linalg.eigvalsh(difference)[-len(A) :].sum())
            Q = B.double()
            assert float((Q * (difference @ Q)).sum()) == pytest.approx(best, abs=1e-3 * float(C_keep.trace()))
            assert relative(M, Q @ Q.T @ W) < 1e-4
        else:
            # By their energy: where tokens are few, many directions have none.
            N = torch.linalg.qr(A.double().T).Q
            least = float(torch.linalg.eigvalsh(keep[name])[: len(A)].sum())
            assert float((N * (keep[name] @ N)).sum()) == pytest.approx(least, abs=1e-5 * float(keep[name].trace()))
            assert relative(M, W @ N @ N.T) < 1e-4
            assert layers[name].module.lora_A["default"].weight.requires_grad != ("v2" in method)
        assert s > 0


@pytest.mark.parametrize("budget", [None, 40_000])
def test_several_passes_give_the_same(budget):
    made = []
    for memory_budget in (None, budget):
        model = wrap(tiny_llama())
        report = hs.initialize_(
            model, "sc-lora:samples=7", data=iter(TASK), preserve=iter(KEEP), memory_budget=memory_budget
        )
        made.append(all_factors(model))
    assert budget is None or not report.plan.startswith("1 pass,")
    for name, (A, B) in made[0].items():
        torch.testing.assert_close(B @ A, made[1][name][1] @ made[1][name][0], rtol=1e-3, atol=1e-4)


def test_padding_order_and_batches_of_what_is_preserved_do_not_matter():
    made = []
    rows = [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in KEEP
        for row in range(len(batch["labels"]))
    ]
    for keep in (KEEP, rows[::-1]):
        model = wrap(tiny_llama())
        hs.initialize_(model, "lora-null:samples=7", preserve=keep)
        made.append({name: B @ A for name, (A, B) in all_factors(model).items()})
    for name, M in made[0].items():
        torch.testing.assert_close(M, made[1][name], rtol=1e-2, atol=1e-3)


def test_no_label_is_needed_and_data_to_learn_only_where_wanted():
    bare = [{key: value for key, value in batch.items() if key != "labels"} for batch in KEEP]
    hs.initialize_(wrap(tiny_llama()), "lora-null:samples=7", preserve=bare)
    hs.initialize_(wrap(tiny_llama()), "lora-null:samples=7", preserve=TrainingData(bare))
    with pytest.raises(DataError, match=r"method 'lora-null' needs data of the ability that is to stay.*preserve="):
        hs.initialize_(wrap(tiny_llama()), "lora-null", data=TASK)
    with pytest.raises(DataError, match=r"method 'sc-lora' needs data: give batches as data="):
        hs.initialize_(wrap(tiny_llama()), "sc-lora", preserve=KEEP)


def test_a_method_per_layer_reads_what_its_layers_want():
    model = wrap(tiny_llama())
    method = hs.PerLayer({"q_proj|v_proj": hs.LoRANull(samples=7), "up_proj": hs.Astra(samples=7), "*": hs.LoRA()})
    report = hs.initialize_(model, method, data=TASK, preserve=KEEP)
    assert {layer.method for layer in report.layers} >= {"lora-null:samples=7", "astra:samples=7", "lora"}
