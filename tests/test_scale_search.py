"""A kept start's scale: the line search by itself, and through the verb."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import headstart as hs
from conftest import all_factors, started, tiny_llama, token_batch, wrap
from headstart.errors import DataError, HeadstartWarning
from headstart.methods.base import Factors
from headstart.statistics.batches import iterate_samples
from headstart.statistics.search import least, samples_for, scaled
from test_resume import arguments

# Samples that say the same, so that a start from some of them helps with the others.
DATA = [token_batch(seed=0) for _ in range(6)]


@settings(max_examples=200, deadline=None)
@given(st.floats(-7, 7), st.floats(0.05, 5))
def test_the_least_of_a_bowl_is_found_in_about_ten_steps(place, width):
    """A quadratic model's loss along a direction: 2 - width (2 m - m^2) at e^place m."""
    count = 0

    def loss_at(multiple):
        nonlocal count
        count += 1
        m = multiple / math.exp(place)
        return 2 - width * (2 * m - m**2)

    losses = least(loss_at, 2.0)
    best = min(losses, key=losses.get)
    assert count <= 9
    assert losses[best] < 2
    # Of what there is to win, nearly all.
    assert 2 - losses[best] >= 0.97 * width


def test_nothing_is_beyond_what_lowers_the_loss():
    losses = least(lambda multiple: 2.0 + multiple, 2.0)
    assert min(losses.values()) > 2
    assert len(losses) <= 8
    # A loss that is no number, or overflows, is none that was lowered.
    losses = least(lambda multiple: math.nan if multiple > 0.3 else 2 - multiple, 2.0)
    best = min(losses, key=losses.get)
    assert 0.06 <= best <= 0.3


def test_how_many_samples():
    assert [samples_for(read) for read in (8, 64, 256, 10_000)] == [8, 8, 10, 32]
    # At most 10 forward passes over them, against a forward and a backward pass of twice its cost.
    assert all(10 * samples_for(read) <= 0.15 * 3 * read for read in (256, 512, 4096))


def test_a_product_is_multiplied():
    A, B, R = torch.randn(3, 8), torch.randn(6, 3), torch.randn(3, 3)
    both = scaled(Factors(A, B), 2.5)
    torch.testing.assert_close(both.B @ both.A, 2.5 * B @ A)
    assert float(both.A.norm() / A.norm()) == pytest.approx(float(both.B.norm() / B.norm()))
    # A layer that starts as 'lora' has no product to multiply.
    assert scaled(Factors(A, torch.zeros(6, 3)), 2.5).A is A
    core = scaled(Factors(A, B, core=R), 2.5)
    assert core.A is A
    torch.testing.assert_close(core.core, 2.5 * R)


def loss(model, batches):
    with torch.no_grad():
        sizes = [len(batch["labels"]) for batch in batches]
        losses = [float(model(**batch).loss) for batch in batches]
    return sum(size * one for size, one in zip(sizes, losses, strict=True)) / sum(sizes)


@pytest.mark.parametrize(
    "method", ["lora-one:samples=8", "lora-sb:samples=8,lr=0.001", "kfac-newton:samples=8", "gora:samples=8"]
)
def test_the_verb_searches_on_samples_that_were_not_read(method):
    plain = wrap(tiny_llama())
    hs.initialize_(plain, method, data=iter(DATA))
    model = wrap(tiny_llama())
    report = hs.initialize_(model, f"{method},scale=search", data=iter(DATA))
    ((name, searched),) = report.searched.items()
    assert name == f"{method},scale=search"
    assert searched.samples == 8
    # Eight samples are read, the next eight searched on: the base model's loss, and the start's as it is installed.
    kept = DATA[2:4]
    assert searched.before == pytest.approx(loss(tiny_llama(), kept), rel=1e-5)
    assert searched.after == pytest.approx(loss(model.eval(), kept), rel=1e-4)
    assert searched.after == min(searched.losses.values()) < searched.before
    assert searched.losses[1.0] == pytest.approx(loss(plain.eval(), kept), rel=1e-4)
    # One multiple for all layers.
    for layer, (A, B) in all_factors(model).items():
        A0, B0 = all_factors(plain)[layer]
        if "lora-sb" in method:
            torch.testing.assert_close(A, A0)
            continue
        torch.testing.assert_close(B @ A, searched.multiple * (B0 @ A0), rtol=1e-4, atol=1e-7)
    assert "times the published scale, by a search on 8 samples" in str(report)


def marked_rows():
    """Samples that can be told by their second token."""
    return [{key: value[0] for key, value in token_batch(1, 8, seed=row, padded=False).items()} for row in range(60)]


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def perturbed(rows):
    """Replace a token by chance, as a collator does that masks some."""
    batch = stacked(rows)
    batch["input_ids"][:, -1] = torch.randint(1, 60, (len(rows),))
    return batch


def loader(**settings):
    return DataLoader(marked_rows(), batch_size=4, **{"collate_fn": stacked, **settings})


LOADERS = {
    "shuffled": lambda: dict(data=loader(shuffle=True)),
    "with a generator of its own": lambda: dict(data=loader(shuffle=True, generator=torch.Generator().manual_seed(3))),
    "in workers": lambda: dict(data=loader(shuffle=True, num_workers=1)),
    "collated at random": lambda: dict(data=loader(shuffle=True, collate_fn=perturbed)),
    "samples collated at random": lambda: dict(data=marked_rows(), collator=perturbed, batch_size=4),
    "an iterator": lambda: dict(data=iter(loader(shuffle=True))),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_search_goes_on_where_the_start_stopped_in_the_same_draw(monkeypatch, name):
    """Whatever the data draw by chance, and whatever the chance outside: what was read isn't searched on."""
    places = {tuple(row["labels"].tolist()): place for place, row in enumerate(marked_rows())}
    drawn = []

    def reading(module, kept):
        def iterate(*args, **settings):
            for samples in iterate_samples(*args, **settings):
                kept.append((samples.indices, samples.batch))
                yield samples

        monkeypatch.setattr(f"headstart.statistics.{module}.iterate_samples", iterate)

    read, searched = [], []
    reading("prepare", read)
    reading("search", searched)
    for outside in (0, 1) if name != "an iterator" else (0,):
        read.clear(), searched.clear()
        model = wrap(tiny_llama())
        torch.manual_seed(outside)
        given = LOADERS[name]()
        before = torch.get_rng_state()
        report = hs.initialize_(model, "lora-one:samples=12,scale=search", **given, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        for (indices, batch), (again, theirs) in zip(read, searched, strict=False):
            assert indices == again
            assert all(torch.equal(batch[key], theirs[key]) for key in batch)
        order = [places[tuple(labels.tolist())] for _, batch in searched for labels in batch["labels"]]
        assert len(read) == 3 and len(set(order)) == len(order) == 20
        ((_, result),) = report.searched.items()
        assert result.samples == 8
        drawn.append((order, result.losses))
    assert all(each == drawn[0] for each in drawn)


def test_a_published_scale_is_left_alone_and_reads_no_more_data():
    report = hs.initialize_(wrap(tiny_llama()), "lora-one:samples=8", data=iter(DATA[:2]))
    assert report.searched == {}


def test_data_that_end_early_are_said():
    with pytest.warns(HeadstartWarning, match="last 8 of the data's 12 samples, which the start has read, too"):
        report = hs.initialize_(wrap(tiny_llama()), "lora-one:samples=8,scale=search", data=DATA[:3])
    assert report.searched["lora-one:samples=8,scale=search"].samples == 8


def test_a_failure_leaves_the_model_as_it_was():
    model = wrap(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model, batch):
        if torch.is_grad_enabled():
            return model(**batch).loss
        return model(**batch).loss * math.nan

    with pytest.raises(DataError, match="not finite on the samples that the scale is searched on"):
        hs.initialize_(model, "lora-one:samples=8,scale=search", data=DATA, loss=broken)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_method_per_layer_searches_for_its_own_layers():
    model = wrap(tiny_llama())
    method = hs.PerLayer({"q_proj|v_proj": hs.LoRAOne(samples=8, scale="search"), "*": hs.LoRA()})
    report = hs.initialize_(model, method, data=DATA)
    assert list(report.searched) == ["lora-one:samples=8,scale=search"]


def test_a_trainer_gives_samples_to_search_on(tmp_path):
    from transformers import Trainer

    batch = token_batch(padded=False)
    learned = [{key: value[row % 4] for key, value in batch.items()} for row in range(16)]
    trainer = Trainer(wrap(tiny_llama()), arguments(tmp_path, seed=0), train_dataset=learned)
    report = hs.initialize_(trainer.model, "lora-one:samples=8,scale=search", data=trainer)
    assert report.samples == 8
    assert not report.warnings
    assert report.searched["lora-one:samples=8,scale=search"].samples == 8


def test_residual_and_anchored_starts_have_no_scale_to_search():
    assert not hs.PiSSA().searches_scale
    assert started(tiny_llama(), "lora-one:samples=4,scale=search", data=DATA) is not None
