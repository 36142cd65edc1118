"""OLoRA-tail, RLPO, RLMO, GeoRA and LoRAM: their formulas in float64, slow and dense, and weights at their limits."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headstart as hs
from conftest import all_factors, logits, started, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.methods import geora, method_class, parse_method
from inputs import product, worst_angle
from known_layers import SHAPES, everything, from_spectrum, normal, of_weight, problems
from oracles import best, relative
from snapshots import dense_weight, targets_of

ALL = ["olora-tail", "rlpo", "rlmo", "geora", "loram"]
ANCHORED = ["olora-tail", "geora", "loram"]
SHAPES_AND_LONG = [*SHAPES, (7, 90), (90, 7)]


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def triplets(W, r, end):
    """U (d_out, r), S (r,) and V (d_in, r) of the largest or smallest singular values, in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    part = slice(0, r) if end == "largest" else slice(len(S) - r, None)
    return U[:, part], S[part], Vh[part].T


# OLoRA-tail.


@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES_AND_LONG)
def test_olora_tail_is_the_product_of_the_last_singular_vectors(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    start = hs.OLoRATail().factors(of_weight(W, 5, s=s))
    U, _, V = triplets(W, 5, "smallest")
    assert relative(product(start), U @ V.T) < 1e-5
    # s plays no part in the factors.
    assert torch.equal(start.A, hs.OLoRATail().factors(of_weight(W, 5)).A)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_olora_tail_has_r_equal_singular_values_whatever_the_weight(problem):
    W, r, s = problem
    start = hs.OLoRATail().factors(of_weight(W, r, s=s))
    A, B = start.A.double(), start.B.double()
    assert torch.allclose(A @ A.T, eye(r), atol=2e-6) and torch.allclose(B.T @ B, eye(r), atol=2e-6)
    values = torch.linalg.svdvals(product(start, s))
    assert torch.allclose(values[:r], torch.full((r,), s, dtype=torch.float64), rtol=2e-6)
    assert float(product(start, s).norm()) == pytest.approx(s * math.sqrt(r), rel=2e-6)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_olora_tail_pairs_vectors_of_one_triplet(problem):
    """W v = sigma u and W' u = sigma v with W's own smallest values, of rank-deficient weights too."""
    W, r, _ = problem
    start = hs.OLoRATail().factors(of_weight(W, r))
    A, B = start.A.double(), start.B.double()
    values = torch.linalg.svdvals(W.double())
    least = values[len(values) - r :]
    close = dict(rtol=0, atol=2e-6 * float(values[0]))
    assert torch.allclose(W.double() @ A.T, B * least, **close)
    assert torch.allclose(W.double().T @ B, A.T * least, **close)


# RLPO and RLMO.


@pytest.mark.parametrize(("name", "like", "end"), [("rlpo", "pissa", "largest"), ("rlmo", "milora", "smallest")])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES_AND_LONG)
def test_rlpo_and_rlmo_span_what_pissa_and_milora_do(name, like, end, d_out, d_in):
    W = normal(d_out, d_in, std=0.02)
    start = parse_method(name).factors(of_weight(W, 5, s=3.0))
    assert torch.allclose(start.A.double() @ start.A.double().T, eye(5), atol=2e-6)
    assert start.B.shape == (d_out, 5) and not start.B.count_nonzero()
    _, _, V = triplets(W, 5, end)
    assert worst_angle(start.A.T, V) < 1e-5
    assert worst_angle(start.A.T, parse_method(like).factors(of_weight(W, 5, s=3.0)).A.T) < 1e-5
    # Row by row, too: the vectors, and not another basis of their span.
    assert torch.allclose((start.A.double() @ V).diagonal().abs(), torch.ones(5, dtype=torch.float64), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["rlpo", "rlmo"]))
def test_rows_are_orthonormal_whatever_the_weight(problem, name):
    W, r, s = problem
    A = parse_method(name).factors(of_weight(W, r, s=s)).A.double()
    assert torch.allclose(A @ A.T, eye(r), atol=2e-6)
    values = torch.linalg.svdvals(W.double())
    expected = values[:r] if name == "rlpo" else values[len(values) - r :]
    assert torch.allclose((W.double() @ A.T).norm(dim=0), expected, rtol=0, atol=2e-6 * float(values[0]))


@pytest.mark.parametrize("name", ["rlpo", "rlmo", "olora-tail"])
def test_the_largest_entry_of_each_right_vector_is_positive(name):
    A = parse_method(name).factors(of_weight(normal(40, 60), 8)).A
    assert bool((A.gather(1, A.abs().argmax(dim=1, keepdim=True)) > 0).all())


# GeoRA.


def small_entries(W, r, rho):
    """W with zeros where neither W nor its rank-r image is small, and where it isn't zeroed; float64, sorted whole."""
    stays = torch.zeros(W.shape, dtype=torch.bool)
    for matrix in (W.double().abs(), best(W, r).abs()):
        stays |= matrix <= torch.quantile(matrix, rho)
    return torch.where(stays, W.double(), 0.0), stays


@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("rho", [0.05, 0.2, 0.7, 1])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES_AND_LONG)
def test_geora_is_the_rank_r_image_of_the_small_entries(d_out, d_in, rho, s):
    W = normal(d_out, d_in, std=0.02)
    start = hs.GeoRA(rho=rho).factors(of_weight(W, 5, s=s))
    masked, stays = small_entries(W, 5, rho)
    assert relative(product(start, s), best(masked, 5)) < 1e-5
    A, B = start.A.double(), start.B.double()
    root = (torch.linalg.svdvals(masked)[:5] / s).diag()
    for gram in (A @ A.T, B.T @ B):
        assert torch.allclose(gram, root, rtol=0, atol=2e-6 * float(root.max()))
    share = float(stays.double().mean())
    assert start.info["share_of_entries"] == pytest.approx(share, abs=1e-9)
    assert rho - 1 / W.numel() <= share <= min(1, 2 * rho + 2 / W.numel())


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_geora_that_lets_everything_through_is_pissa(d_out, d_in, s):
    W = normal(d_out, d_in, std=0.02)
    start, pissa = (method.factors(of_weight(W, 5, s=s)) for method in (hs.GeoRA(rho=1), hs.PiSSA()))
    assert torch.equal(start.A, pissa.A) and torch.equal(start.B, pissa.B)


def test_geora_of_a_weight_too_large_for_a_dense_decomposition():
    """A spectrum without gaps: a residual of 1e-5 would bring some entries to their quantile's other side."""
    W = normal(1000, 800)
    start = hs.GeoRA().factors(of_weight(W, 8))
    assert relative(product(start), best(small_entries(W, 8, 0.2)[0], 8)) < 1e-4


def test_geora_that_lets_almost_nothing_through_is_almost_zero():
    W = normal(48, 30)
    norms = [float(product(hs.GeoRA(rho=rho).factors(of_weight(W, 5))).norm()) for rho in (0.5, 0.05, 0.005, 1e-9)]
    assert norms == sorted(norms, reverse=True)
    # One entry passes each of the two: the smallest of W, and the one where its image is smallest.
    passed = W[best(W, 5).abs() == best(W, 5).abs().min()].abs().double()
    assert norms[-1] == pytest.approx(math.hypot(float(passed), float(W.abs().min())), rel=1e-5)


@pytest.mark.parametrize("rho", [1e-9, 0.1, 0.2, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 101, 1000])
def test_what_is_at_or_below_the_quantile_is_what_torch_says(count, rho):
    values = normal(count).abs()
    values[: count // 3] = values[0]  # ties go together
    stays = values <= geora._quantile(values, rho)
    assert torch.equal(stays, values.double() <= torch.quantile(values.double(), rho))


def test_more_entries_than_torchs_quantile_takes():
    values = normal(4100, 4100).abs()
    with pytest.raises(RuntimeError):
        torch.quantile(values, 0.2)
    threshold = geora._quantile(values, 0.2)
    assert int((values <= threshold).sum()) == math.floor(0.2 * (values.numel() - 1)) + 1


def test_geora_of_a_weight_in_which_only_zeros_pass():
    """A third of the rows is zero, and so is W's image there: these are the small entries, all of them."""
    W = torch.cat([torch.zeros(10, 16), normal(20, 2) @ normal(2, 16, seed=1)])
    start = hs.GeoRA().factors(of_weight(W, 4))
    assert start.A.count_nonzero() and not start.B.count_nonzero()
    assert "zero" in start.note


# LoRAM.


def sine_matrix(order):
    """Entry by entry."""
    scale, step = math.sqrt(2 / (order + 1)), math.pi / (order + 1)
    rows = [
        [scale * math.sin(step * ((i * j) % (2 * order + 2))) for j in range(1, order + 1)] for i in range(1, order + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("r", [2, 5, 7])
@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES_AND_LONG)
def test_loram_is_the_published_formula(d_out, d_in, s, r):
    W = normal(d_out, d_in, std=0.02)
    start = hs.LoRAM().factors(of_weight(W, r, s=s))
    out, into = sine_matrix(d_out)[:, :r], sine_matrix(d_in)[:, :r]
    share = math.log(r) / math.log(min(d_out, d_in))
    mean_square = float(W.double().square().mean())
    beta = (share * mean_square / float((out @ into.T).square().mean())) ** 0.25
    assert relative(start.B, beta / math.sqrt(s) * out) < 1e-6
    assert relative(start.A, beta / math.sqrt(s) * into.T) < 1e-6
    assert relative(product(start, s), beta**2 * out @ into.T) < 1e-6


@settings(max_examples=60, deadline=None)
@given(problems(twice=True))
def test_loram_is_as_large_as_its_rank_says_whatever_the_weight(problem):
    W, r, s = problem
    r = max(r, 2)
    start = hs.LoRAM().factors(of_weight(W, r, s=s))
    share = math.log(r) / math.log(min(W.shape))
    assert float(product(start, s).norm()) == pytest.approx(math.sqrt(share) * float(W.double().norm()), rel=1e-5)
    assert start.info["norm_share"] == pytest.approx(math.sqrt(share))
    A, B = start.A.double(), start.B.double()
    square = math.sqrt(share / r) * float(W.double().norm()) / s
    for gram in (A @ A.T, B.T @ B):
        assert torch.allclose(gram, square * eye(r), rtol=0, atol=2e-6 * square)


def test_the_sines_of_a_wide_layer_are_orthonormal():
    W = torch.zeros(16, 11_008)
    W[0, 0] = 1
    A = hs.LoRAM().factors(of_weight(W, 16)).A.double()
    assert torch.allclose(A @ A.T / float(A[0].square().sum()), eye(16), atol=1e-6)


def test_loram_draws_nothing():
    one = hs.LoRAM().factors(of_weight(normal(30, 48), 5))
    two = hs.LoRAM().factors(of_weight(normal(30, 48), 5, seed=3, name="another"))
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_rank_1_is_refused_where_a_pattern_gives_it_before_anything_changes():
    model = wrap(tiny_llama(), rank_pattern={"v_proj": 1})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(hs.LayerError, match=r"v_proj.*'loram'.*rank 1.*at least 2"):
        hs.initialize_(model, "loram", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# All of them.


@pytest.mark.parametrize("name", ["pissa", "milora", *ALL])
def test_a_weight_of_zeros_still_trains(name):
    start = parse_method(name).factors(of_weight(torch.zeros(12, 9), 3))
    assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())
    assert start.A.count_nonzero() or start.B.count_nonzero()
    assert ("starts as 'lora' does" in start.note) == (name in ("pissa", "milora", "geora", "loram"))


@pytest.mark.parametrize("name", ALL)
def test_a_transposed_view_gives_the_same(name):
    """GPT-2 stores its weights the other way round, and they come as views."""
    W = normal(20, 30)
    plain, view = (parse_method(name).factors(of_weight(V, 4)) for V in (W, W.T.contiguous().T))
    assert torch.allclose(view.A, plain.A, atol=1e-5) and torch.allclose(view.B, plain.B, atol=1e-5)


@pytest.mark.parametrize("name", ["geora", "loram", "rlmo"])
def test_threads_and_company_change_no_bit(name):
    method = parse_method(name)
    layers = [
        dataclasses.replace(everything(180, 140, name=f"layer{i}"), weight=normal(180, 140, seed=i)) for i in range(3)
    ]
    alone = [method.factors(layer) for layer in layers]
    torch.set_num_threads(3)
    together = method.factors_batch(layers)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("name", ALL)
def test_the_model_starts_at_the_base_model(name, make, form):
    targets = ["c_attn", "c_fc", "c_proj"] if make is tiny_gpt2 else "all-linear"
    base, batch = make(), token_batch()
    expected = logits(copy.deepcopy(base), batch)
    model = started(copy.deepcopy(base), name, form=form, target_modules=targets)
    weights = {layer: dense_weight(target) for layer, target in targets_of(wrap(base, target_modules=targets)).items()}
    if form == "anchored" or name not in ANCHORED:
        assert torch.equal(logits(model, batch), expected)
    else:
        assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    for layer, (A, B) in all_factors(model).items():
        # Of the weight as the layer means it, whichever way round it is stored; s = 8 / 4.
        alone = parse_method(name).factors(of_weight(weights[layer].float().contiguous(), 4, s=2.0))
        assert torch.allclose(A, alone.A, atol=1e-5) and torch.allclose(B, alone.B, atol=1e-5), layer


@pytest.mark.parametrize("name", ALL)
def test_a_bfloat16_base_stays_as_it_is_and_the_adapter_trains(name):
    base, batch = tiny_llama().to(torch.bfloat16), token_batch()
    expected = logits(copy.deepcopy(base), batch)
    model = started(copy.deepcopy(base), name)
    assert torch.equal(logits(model, batch), expected)
    for A, B in all_factors(model).values():
        if name in ("olora-tail", "rlpo", "rlmo"):
            assert torch.allclose(A.double() @ A.double().T, eye(4), atol=2e-6)
        assert A.dtype == B.dtype == torch.float32
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = float(model(**batch).loss.detach())
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert float(model(**batch).loss.detach()) < before


@pytest.mark.parametrize("name", ALL)
def test_forms_and_dora(name):
    anchored = name in ANCHORED
    assert method_class(name).form == ("anchored" if anchored else "kept")
    assert method_class(name).rate is None
    model = wrap(tiny_llama(), use_dora=True)
    if anchored:
        with pytest.raises(hs.LayerError, match="uses DoRA, whose norms"):
            hs.initialize_(model, name, progress=False)
    else:
        expected = logits(model, token_batch())
        hs.initialize_(model, name, progress=False)
        assert torch.allclose(logits(model, token_batch()), expected, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_weight_with_no_spectrum_to_speak_of(name):
    """One singular value, thirty times; and of two, one that fades away."""
    for S in (torch.ones(30, dtype=torch.float64), torch.logspace(0, -14, 30, dtype=torch.float64)):
        W = from_spectrum(48, 30, S).float()
        start = parse_method(name).factors(of_weight(W, 5, s=2.0))
        assert bool(torch.isfinite(start.A).all() and torch.isfinite(start.B).all())
        if name in ("olora-tail", "rlpo", "rlmo"):
            assert torch.allclose(start.A.double() @ start.A.double().T, eye(5), atol=2e-6)
