"""EVA: principal components of inputs and shared ranks, against dense decompositions of the inputs and against PEFT."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.other import get_pattern_key

import headstart as hs
from conftest import logits, perturb, tiny_llama, tiny_t5, token_batch, wrap
from headstart.errors import DataError, LayerError, MethodError
from headstart.layers.find import lora_layers
from headstart.methods.base import Factors
from headstart.statistics.prepare import prepare
from headstart.statistics.sums import Regroup, Sums
from inputs import inputs_by_layer, inputs_of, layer_of, layers_of, leading_components, moments, normal, worst_angle
from test_processes import batches, together

PREFIX = "base_model.model."


def case(tokens=300, d_out=18, d_in=14, r=4, s=1.5, **given):
    return layer_of(x := inputs_of(tokens, d_in, **given), normal(d_out, d_in), r, s=s), x


def shared(worths, ranks, d=6):
    """Starts that offer rows of the given worth, marked by their place in the layer's offer."""
    starts = {}
    for name, worth in worths.items():
        rows = torch.arange(len(worth), dtype=torch.float32)[:, None].expand(-1, d)
        r = ranks[name]
        info = {"varying": float(len(worth))}
        starts[name] = Factors(rows[:r], torch.zeros(d, r), spare=rows[r:], worth=tuple(worth), info=info)
    return starts


# The components.


@settings(max_examples=60, deadline=None)
@given(
    d_in=st.integers(2, 20),
    d_out=st.integers(1, 20),
    decades=st.floats(0, 2.5),
    offset=st.floats(0, 5),
    rho=st.floats(1, 4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_rows_are_the_principal_components_of_centred_inputs(d_in, d_out, decades, offset, rho, seed, data):
    r = data.draw(st.integers(1, min(d_in, d_out)))
    layer, x = case(400, d_out, d_in, r, decades=decades, offset=offset, seed=seed)
    start = hs.EVA(rho=rho).factors(layer)
    rows = torch.cat((start.A, start.spare)).double()
    count = max(r, min(math.floor(r * rho), d_in, d_out))
    assert start.A.shape == (r, d_in) and start.B.shape == (d_out, r) and not bool(start.B.count_nonzero())
    assert len(rows) == len(start.worth) == count
    assert torch.allclose(rows @ rows.T, torch.eye(count, dtype=torch.float64), atol=1e-5)
    _, variances = leading_components(x, count)
    # The variance along the rows is all that any rows could have, and each row's own is its worth.
    centred = x - x.mean(0)
    along = (centred @ rows.T).square().mean(0)
    total = float(variances.sum())
    tolerance = 1e-5 * (1 + offset**2 * d_in)
    assert torch.allclose(along / total, variances[:count] / total, rtol=1e-3, atol=tolerance)
    worth = torch.tensor(start.worth, dtype=torch.float64)
    assert torch.allclose(worth, variances[:count] / total, rtol=1e-3, atol=tolerance)
    assert start.info["variance"] == pytest.approx(total, rel=1e-3)


def test_the_span_is_the_leading_one_where_there_is_a_gap():
    x = inputs_of(500, 16, offset=3.0)
    x = x @ torch.diag(torch.tensor([10.0] * 5 + [0.1] * 11, dtype=torch.float64))
    start = hs.EVA(rho=1).factors(layer_of(x, normal(20, 16), 5))
    assert worst_angle(start.A.T, leading_components(x, 5)[0]) < 1e-4


def test_any_order_of_the_tokens_gives_the_same():
    layer, x = case()
    turned = replace(layer, kronecker=moments(x.flip(0)))
    one, other = (hs.EVA().factors(each) for each in (layer, turned))
    assert torch.allclose(one.A, other.A, atol=1e-4) and one.worth == pytest.approx(other.worth, rel=1e-4)


def test_layers_that_share_an_input_get_the_same_rows_however_they_come():
    layer, _ = case()
    others = [replace(layer, name="other"), replace(layer, name="wide", r=6), case(seed=3)[0]]
    for one, alone in zip(hs.EVA().factors_batch([layer, *others]), [layer, *others], strict=True):
        found = hs.EVA().factors(alone)
        assert torch.allclose(one.A, found.A, atol=1e-5)
        assert one.worth == pytest.approx(found.worth, rel=1e-6) and len(one.spare) == len(found.spare)


def test_whitening_divides_by_the_root_of_the_singular_values():
    layer, x = case(200)
    plain, white = hs.EVA().factors(layer), hs.EVA(whiten=True).factors(layer)
    S = torch.linalg.svdvals(x - x.mean(0))[: layer.r]
    assert torch.allclose(white.A.double(), plain.A.double() / S.sqrt()[:, None], rtol=1e-3)
    assert white.worth == plain.worth


@pytest.mark.parametrize("whiten", [False, True])
def test_directions_without_variance_are_told_of(whiten):
    x = normal(60, 2, seed=3) @ normal(2, 10, seed=4) + 1.0
    method = hs.EVA(rho=1, whiten=whiten)
    start = method.factors(layer_of(x, normal(12, 10), 4))
    assert bool(torch.isfinite(start.A).all())
    (settled,) = method.settle({"layer": start}, {"layer": 4}).values()
    assert "vary in 2 directions, fewer than its rank" in settled.note
    assert len(settled.A) == 4 and settled.info["explained"] == pytest.approx(1, abs=1e-3)


def test_constant_inputs_are_worth_nothing():
    start = hs.EVA().factors(layer_of(torch.ones(9, 10), normal(12, 10), 3))
    assert bool(torch.isfinite(start.A).all()) and max(start.worth) < 1e-6


def test_a_layer_that_no_input_reached_starts_as_lora_does_and_keeps_its_rank():
    layer = replace(case()[0], kronecker=None)
    start = hs.EVA().factors(layer)
    assert "no input reached this layer" in start.note
    assert torch.equal(start.A, hs.LoRA().factors(layer).A) and not bool(start.B.count_nonzero())
    starts = {"unseen": start} | shared({"seen": (0.5, 0.3, 0.1, 0.1)}, {"seen": 2})
    settled = hs.EVA().settle(starts, {"unseen": 4, "seen": 2})
    assert len(settled["unseen"].A) == 4 and len(settled["seen"].A) == 2


# The ranks.


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=10, max_size=10)), max_size=6, min_size=1
    )
)
def test_ranks_go_to_the_components_that_explain_most(drawn):
    ranks = {f"layer{place}": r for place, (r, _) in enumerate(drawn)}
    worths = {f"layer{place}": sorted(worth, reverse=True)[: 2 * r] for place, (r, worth) in enumerate(drawn)}
    settled = hs.EVA().settle(shared(worths, ranks), ranks)
    given_ranks = {name: len(start.A) for name, start in settled.items()}
    assert sum(given_ranks.values()) == sum(ranks.values())
    assert all(rank <= 2 * ranks[name] for name, rank in given_ranks.items())
    taken = sorted(value for name, rank in given_ranks.items() for value in worths[name][:rank])
    best = sorted(value for worth in worths.values() for value in worth)[-sum(ranks.values()) :]
    assert taken == best
    for start in settled.values():
        # The leading rows, in their order, and a B as wide.
        assert start.A[:, 0].tolist() == list(range(len(start.A))) and start.B.shape == (6, len(start.A))
        assert start.spare is None and not start.worth
    turned = dict(reversed(shared(worths, ranks).items()))
    assert {name: len(start.A) for name, start in hs.EVA().settle(turned, ranks).items()} == given_ranks


def test_of_equal_components_the_earlier_layers_are_taken():
    ranks = {"q": 2, "k": 2, "v": 2}
    settled = hs.EVA().settle(shared(dict.fromkeys(ranks, (0.4, 0.3, 0.2, 0.1)), ranks), ranks)
    assert [len(settled[name].A) for name in ranks] == [2, 2, 2]
    ranks = {"q": 1, "k": 2, "v": 2}
    settled = hs.EVA().settle(shared(dict.fromkeys(ranks, (0.4, 0.3, 0.2, 0.1)), ranks), ranks)
    assert [len(settled[name].A) for name in ranks] == [2, 2, 1]


@pytest.mark.parametrize("changes", [dict(rho=0.9), dict(rho=math.inf), dict(rho=math.nan), dict(samples=0)])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(MethodError):
        hs.EVA(**changes)


# PEFT's own.


@pytest.mark.parametrize("parts", [1, 8])
def test_the_incremental_svd_of_peft_converges_to_the_same(parts):
    """In one part PEFT's is exact; in several it forgets, at each step, what its components leave out."""
    x = inputs_of(800, 24, decades=1.5, offset=1.0)
    theirs = IncrementalPCA(n_components=6, lowrank=True, lowrank_seed=42)
    for part in x.float().chunk(parts):
        theirs.partial_fit(part)
    start = hs.EVA(rho=1).factors(layer_of(x, normal(30, 24), 6))
    exact, _ = leading_components(x, 6)
    assert worst_angle(start.A.T, exact) < 1e-3
    assert worst_angle(theirs.components_.T, exact) < (1e-3 if parts == 1 else 0.3)
    assert start.worth == pytest.approx(theirs.explained_variance_ratio_.tolist(), rel=1e-3 if parts == 1 else 0.1)


def pefts_eva(base, r=4, use_rslora=False, **changes):
    config = dict(r=r, lora_alpha=8, target_modules="all-linear", init_lora_weights="eva", use_rslora=use_rslora)
    return get_peft_model(base, LoraConfig(**config, eva_config=EvaConfig(**changes)))


def test_spans_and_ranks_are_pefts_but_for_ties():
    """One batch over and over, so that PEFT's decomposition is exact. Layers that read the same input tie, and which
    of them gets one rank more is left to a sort that keeps no order there; ours takes the earlier one. PEFT counts the
    tokens that have a label; ours are those that predict one."""
    batch = token_batch(8, 24)
    theirs = get_eva_state_dict(pefts_eva(tiny_llama()), [batch], show_progress_bar=False)
    layers = layers_of(wrap(tiny_llama()), [batch], tokens="own labels")
    method, ranks = hs.EVA(), {name: layer.r for name, layer in layers.items()}
    settled = method.settle({name: method.factors(layer) for name, layer in layers.items()}, ranks)
    by_input: dict[str, list[str]] = {}
    for name in layers:
        by_input.setdefault(
            name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("gate", "up"), []
        ).append(name)
    for names in by_input.values():
        ours = sorted(len(settled[name].A) for name in names)
        assert ours == sorted(len(theirs[PREFIX + name]) for name in names), names
        for name in names:
            both = min(len(settled[name].A), len(theirs[PREFIX + name]))
            if both:
                cosines = (settled[name].A[:both].double() * theirs[PREFIX + name][:both].double()).sum(1).abs()
                assert float(cosines.min()) > 0.99, name
    assert sum(map(len, theirs.values())) == sum(ranks.values()) == sum(len(start.A) for start in settled.values())
    assert len({len(start.A) for start in settled.values()}) > 2


def settings_of(model):
    """What PEFT keeps of each layer's rank and scaling."""
    return {
        target.name: (target.r, round(target.scaling, 9), round(float(target.module.lora_alpha["default"]), 9))
        for target in lora_layers(model, "default")
    }


@pytest.mark.parametrize("adjust", [True, False])
def test_ranks_are_installed_as_peft_installs_them(adjust):
    batch = token_batch(8, 24)
    ours = wrap(tiny_llama(), r=1)
    hs.initialize_(ours, hs.EVA(samples=8, adjust_scaling=adjust, rho=8), data=[batch])
    theirs = pefts_eva(tiny_llama(), r=1, rho=8, adjust_scaling_factors=adjust)
    kept = {PREFIX + t.name: t.module.lora_A["default"].weight.detach().clone() for t in lora_layers(ours, "default")}
    every = {PREFIX + target.name for target in lora_layers(theirs, "default")}
    gone = {name: torch.zeros(0, 1) for name in every - set(kept)}
    initialize_lora_eva_weights(theirs, eva_state_dict=kept | gone, show_progress_bar=False)
    assert gone and settings_of(ours) == settings_of(theirs)
    one, other = ours.peft_config["default"], theirs.peft_config["default"]
    # Ours are anchored at the name's beginning, as PEFT takes a bare name for the ending of others, too.
    assert one.rank_pattern == {f"^{re.escape(name)}": r for name, r in other.rank_pattern.items()}
    assert one.alpha_pattern == pytest.approx({f"^{re.escape(n)}": alpha for n, alpha in other.alpha_pattern.items()})
    assert torch.equal(logits(ours, batch), logits(theirs, batch))


def test_the_scaling_stays_under_rslora_where_pefts_does_not():
    """PEFT multiplies alpha by the ranks' ratio, where rank-stabilised scaling needs its root."""
    batch = token_batch(8, 24)
    model = wrap(tiny_llama(), use_rslora=True)
    before = {target.name: target.scaling for target in lora_layers(model, "default")}
    hs.initialize_(model, hs.EVA(samples=8), data=[batch])
    for target in lora_layers(model, "default"):
        assert target.scaling == before[target.name]
        patterns = model.peft_config["default"].alpha_pattern
        alpha = patterns.get(get_pattern_key(list(patterns), target.name), 8)
        assert alpha / math.sqrt(target.r) == pytest.approx(target.scaling)
    theirs = pefts_eva(tiny_llama(), use_rslora=True)
    name = next(iter(before))
    state = {PREFIX + target.name: torch.zeros(4, target.d_in) for target in lora_layers(theirs, "default")}
    state[PREFIX + name] = torch.zeros(8, 32)
    initialize_lora_eva_weights(theirs, eva_state_dict=state, show_progress_bar=False)
    assert next(t for t in lora_layers(theirs, "default") if t.name == name).scaling != pytest.approx(before[name])


# The verb.


@pytest.mark.parametrize("tokens", ["labels", "attention"])
@pytest.mark.parametrize("rho", [1, 2])
def test_a_model_starts_from_its_own_inputs_and_does_not_move(tokens, rho):
    model, batches = wrap(tiny_llama()), [token_batch(seed=1), token_batch(seed=2)]
    base = logits(model, batches[0])
    method = hs.EVA(samples=8, tokens=tokens, rho=rho)
    layers = layers_of(model, batches, tokens=tokens)
    read = inputs_by_layer(model, batches, tokens=tokens)
    starts = {name: method.factors(layer) for name, layer in layers.items()}
    expected = method.settle(starts, {name: layer.r for name, layer in layers.items()})
    report = hs.initialize_(model, method, data=batches)
    assert torch.equal(logits(model, batches[0]), base)
    assert report.form == "kept" and not report.warnings
    found = {target.name: target for target in lora_layers(model, "default")}
    for line in report.layers:
        assert line.r == len(expected[line.name].A) and line.norm_product == 0
        if not line.r:
            assert line.name not in found
            continue
        target = found[line.name]
        A = target.module.lora_A["default"].weight.detach().double()
        assert target.r == line.r and target.scaling == 2
        assert torch.allclose(A @ A.T, torch.eye(line.r, dtype=torch.float64), atol=1e-5)
        _, variances = leading_components(read[line.name], line.r)
        centred = read[line.name] - read[line.name].mean(0)
        along = float((centred @ A.T).square().sum(1).mean())
        assert along == pytest.approx(float(variances[: line.r].sum()), rel=1e-3)
        assert line.info["explained"] == pytest.approx(float(variances[: line.r].sum() / variances.sum()), rel=1e-3)
    assert sum(line.r for line in report.layers) == 4 * len(report.layers)
    assert (len({line.r for line in report.layers}) == 1) == (rho == 1)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("budget", [None, "100KiB"])
def test_ranks_do_not_depend_on_how_the_data_are_read(budget):
    batches = [token_batch(seed=1), token_batch(seed=2)]
    model, single = wrap(tiny_llama()), wrap(tiny_llama())
    hs.initialize_(model, hs.EVA(samples=8), data=batches, memory_budget=budget)
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in (3, 1, 0, 2)]
    hs.initialize_(single, hs.EVA(samples=8), data=rows)
    assert settings_of(model) == settings_of(single)
    for one, other in zip(lora_layers(model, "default"), lora_layers(single, "default"), strict=True):
        A, B = (target.module.lora_A["default"].weight.detach() for target in (one, other))
        assert float((A * B).sum(1).abs().min()) > 0.999, one.name


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_what_trains_stay_as_they_are(training):
    model = wrap(tiny_llama(), r=1, lora_dropout=0.1).train(training)
    inner = model.base_model.model.model
    # What neither a mode nor PEFT's own choice for the whole model would give back.
    inner.layers[0].mlp.train(not training)
    inner.norm.weight.requires_grad_(True)
    inner.layers[0].self_attn.o_proj.lora_B["default"].weight.requires_grad_(False)

    def found():
        modes = {name: module.training for name, module in model.named_modules()}
        flags = {name.replace(".base_layer", ""): p.requires_grad for name, p in model.named_parameters()}
        return modes, flags

    before = found()
    report = hs.initialize_(model, hs.EVA(samples=8, rho=8), data=[token_batch(8, 24)], progress=False)
    assert {line.r for line in report.layers} > {0, 1}
    for now, then in zip(found(), before, strict=True):
        assert now.keys() < then.keys() and now == {name: then[name] for name in now}
        assert set(now.values()) == {True, False}


def in_one_of_two(rank):
    model = wrap(tiny_llama(), r=1)
    hs.initialize_(model, "eva:samples=10,rho=8", data=batches(), progress=False)
    return settings_of(model), {
        t.name: t.module.lora_A["default"].weight.detach() for t in lora_layers(model, "default")
    }


def test_two_processes_share_ranks_out_as_one_does(tmp_path):
    expected, rows = in_one_of_two(0)
    (first, A), (second, B) = together(tmp_path, in_one_of_two)
    assert first == second == expected and len({rank for rank, _, _ in expected.values()}) > 2
    for name, row in rows.items():
        assert torch.equal(A[name], B[name])
        assert torch.allclose(A[name], row, atol=1e-3), name


def test_an_adapter_of_several_ranks_can_be_saved_and_loaded(tmp_path):
    model, batch = wrap(tiny_llama(), r=1), token_batch(8, 24)
    report = hs.initialize_(model, hs.EVA(samples=8, rho=8), data=[batch])
    assert {line.r for line in report.layers} > {0, 1}
    perturb(model)
    hs.save_lora(model, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-6)
    assert [target.name for target in lora_layers(loaded, "default")] == [
        target.name for target in lora_layers(model, "default")
    ]


def test_strict_forbids_directions_that_are_arbitrary():
    model = wrap(tiny_llama(), r=16)
    batch = {key: value[:1, :6] for key, value in token_batch(padded=False).items()}
    with pytest.raises(LayerError, match=r"vary in \d directions, fewer than its rank"):
        hs.initialize_(model, hs.EVA(samples=1, rho=1), data=[batch], strict=True)
    assert all(target.r == 16 for target in lora_layers(model, "default"))


@pytest.mark.parametrize("labels", ["none", "classes"])
def test_without_labels_a_token_all_tokens_count(labels):
    batch = {key: value for key, value in token_batch(seed=1).items() if key != "labels"}
    model, plain = wrap(tiny_llama()), wrap(tiny_llama())
    given = batch | ({"labels": torch.arange(4)} if labels == "classes" else {})
    with pytest.warns(hs.errors.HeadstartWarning, match="no label a token"):
        hs.initialize_(model, hs.EVA(samples=4, rho=1.0), data=[given])
    hs.initialize_(plain, hs.EVA(samples=4, rho=1.0, tokens="attention"), data=[batch])
    for one, other in zip(lora_layers(model, "default"), lora_layers(plain, "default"), strict=True):
        assert torch.equal(one.module.lora_A["default"].weight, other.module.lora_A["default"].weight)


# What the data tell of labels.


def test_a_sample_without_labels_is_named():
    batch = token_batch()
    batch["labels"][2] = -100
    with pytest.raises(DataError, match="sample 2 has no label left"):
        hs.initialize_(wrap(tiny_llama()), hs.EVA(samples=4), data=[batch], progress=False)


def test_it_is_said_where_positions_cannot_be_told():
    batch, reports = token_batch(), []
    for loss in (None, lambda model, batch: model(**batch).loss):
        reports.append(hs.initialize_(wrap(tiny_llama()), hs.EVA(samples=4), data=[batch], loss=loss, progress=False))
    assert not reports[0].warnings
    assert any("which positions predict a label can't be told" in note for note in reports[1].warnings)


def test_a_loss_may_do_without_labels():
    batch = token_batch()
    batch["labels"][:] = -100
    report = hs.initialize_(
        wrap(tiny_llama()),
        "lora-one:samples=4",
        data=[batch],
        loss=lambda model, batch: model(input_ids=batch["input_ids"]).logits.square().mean(),
        progress=False,
    )
    assert report.samples == 4


def test_bars_go_back_where_a_pass_begins_anew(monkeypatch):
    model, seen = wrap(tiny_llama()), []
    begin = Sums.check_groups
    calls = []

    def once(sums):
        calls.append(None)
        if len(calls) == 2:
            raise Regroup(next(iter(sums.groups.values())))
        begin(sums)

    monkeypatch.setattr(Sums, "check_groups", once)
    batches = [token_batch(seed=seed) for seed in (1, 2)]
    hs.initialize_(
        model, hs.EVA(samples=8, rho=1, tokens="attention"), data=batches, progress=lambda *now: seen.append(now)
    )
    assert [done for step, done, _ in seen if step.startswith("data")] == [0, 4, 0, 4, 8]


@pytest.mark.parametrize("tokens", ["attention", "labels"])
def test_a_decoder_as_long_as_its_encoder_is_read_without_padding(tokens):
    base, batch, seen = tiny_t5().eval(), token_batch(), {}

    def hook_for(name):
        def hook(module, args):
            rows = args[0][0][labels != -100] if name.startswith("decoder") else args[0][0]
            seen.setdefault(name, []).append(rows.double())

        return hook

    for name, module in base.named_modules():
        if name.endswith((".q", ".wo")):
            module.register_forward_pre_hook(hook_for(name))
    with torch.no_grad():
        for row in range(4):
            ids = batch["input_ids"][row, batch["attention_mask"][row] == 1]
            labels = batch["labels"][row]
            base(input_ids=ids[None], labels=labels[None])
    for size in (1, 4):
        batches = [{key: value[row : row + size] for key, value in batch.items()} for row in range(0, 4, size)]
        model = wrap(tiny_t5(), target_modules=["q", "wo"])
        layers = {target.name: target.module for target in lora_layers(model, "default")}
        wants = dict.fromkeys(layers, hs.Wants(inputs=True, tokens=tokens))
        (found,) = prepare(model, layers, wants, batches, 4).passes()
        assert not found.notes and found.kronecker.keys() == seen.keys()
        for name, parts in seen.items():
            x = torch.cat(parts)
            assert torch.allclose(found.kronecker[name].inputs.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5), name
