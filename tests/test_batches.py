"""A batch is what the model takes: it is cut into samples where that is safe, else read whole and counted as said."""

from __future__ import annotations

import collections
import copy
import itertools
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import BatchEncoding

import headstart as hs
from conftest import tiny_llama, token_batch, wrap
from headstart.statistics.batches import iterate_samples, moved, single_sample, size_of
from headstart.statistics.packing import unpacked
from oracles import exact_factors, exact_gradients, relative
from passes import Tokens, assert_exact, collect, lora, singles, uneven_batch, whole_batch


def cut(batch, samples=100):
    return list(iterate_samples([batch], samples))


# Cutting.


def mixed(size=3):
    """What detectors take and more: tensors, a list of one dict a sample, a mapping, and settings."""
    return {
        "pixel_values": torch.arange(size * 4.0).reshape(size, 4),
        "labels": [{"boxes": torch.full((row + 1, 4), row)} for row in range(size)],
        "sizes": [(row, row) for row in range(size)],
        "texts": [f"text {row}" for row in range(size)],
        "more": {"mask": torch.arange(size), "kind": "x"},
        "return_loss": True,
        "temperature": torch.tensor(2.0),
        "none": None,
    }


def test_a_batch_of_many_kinds_is_cut():
    (samples,) = cut(mixed(), 2)
    assert samples.cut and samples.indices == (0, 1)
    one = single_sample(samples.batch, 1)
    assert one["pixel_values"].tolist() == [[4, 5, 6, 7]]
    assert [len(each["boxes"]) for each in one["labels"]] == [2]
    assert one["sizes"] == [(1, 1)] and one["texts"] == ["text 1"] and one["more"]["mask"].tolist() == [1]
    assert one["return_loss"] is True and one["more"]["kind"] == "x" and one["none"] is None
    assert float(one["temperature"]) == 2


@pytest.mark.parametrize("kind", [BatchEncoding, collections.UserDict, collections.OrderedDict])
def test_other_mappings_are_batches(kind):
    (samples,) = cut(kind(token_batch(3)))
    assert type(samples.batch) is dict and samples.size == 3
    assert size_of(kind(token_batch(3))) == 3


@pytest.mark.parametrize(
    ("batch", "size", "told"),
    [
        ({"input_ids": torch.ones(4, 5), "pixel_values": torch.ones(64, 3), "grid": torch.ones(4, 3)}, 4, False),
        ({"input_ids": torch.ones(1, 5), "pixel_values": torch.ones(64, 3), "grid": torch.ones(2, 3)}, 1, False),
        ({"nodes": torch.ones(9, 2), "edges": torch.ones(20, 2)}, 1, False),
        ({"pixel_values": torch.ones(4, 2), "labels": [1, 2, 3]}, 1, False),
        ({"pixel_values": torch.ones(4, 2), "labels": [1, 2, 3, 4]}, 4, True),
    ],
    ids=["patches", "patches of one", "a graph", "another number of labels", "as many labels"],
)
def test_what_can_not_be_cut_is_whole(batch, size, told):
    (samples,) = cut(batch)
    assert (samples.size, samples.cut) == (size, told) and size_of(batch) == size
    (first,) = cut(batch, 1)
    assert first.size == (1 if told else size)


def test_parts_of_a_batch_are_moved_with_it():
    there = moved(mixed(), torch.device("meta"))
    assert there["labels"][0]["boxes"].is_meta and there["more"]["mask"].is_meta and there["texts"] == mixed()["texts"]


def test_what_is_as_wide_as_the_tokens_by_chance_is_not_cut():
    batch = uneven_batch(2, 6)
    alone = single_sample(batch, 1)
    assert alone["input_ids"].shape[1] < 6
    both = single_sample(batch | {"pixel_values": torch.ones(2, 6, 3)}, 1)
    assert both["input_ids"].shape == (1, 6) and both["pixel_values"].shape == (1, 6, 3)


# Packed rows.

LENGTHS = (5, 3, 4)


def packed(how, lengths=LENGTHS, fill=0):
    ids = torch.arange(1, sum(lengths) + 1)[None]
    labels = ids.clone()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    labels[0, ends[:-1]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": ids, "labels": labels}
    if how == "positions":
        batch["position_ids"] = positions
    else:
        batch |= {"cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int(), "max_length_q": 5, "max_length_k": 5}
    if fill:
        shapes = {"input_ids": 0, "labels": -100, "position_ids": 0}
        batch = {k: functional.pad(v, (0, fill), value=shapes[k]) if k in shapes else v for k, v in batch.items()}
    return batch


@pytest.mark.parametrize(("how", "fill"), [("positions", 0), ("positions", 3), ("boundaries", 0)])
def test_packed_sequences_are_samples(how, fill):
    (samples,) = cut(packed(how, fill=fill))
    assert samples.size == 3 and samples.cut and size_of(packed(how, fill=fill)) == 3
    for row, (start, length) in enumerate(zip((1, 6, 9), LENGTHS, strict=True)):
        one = single_sample(samples.batch, row)
        assert one["input_ids"].tolist() == [list(range(start, start + length))]
        assert one["labels"].tolist() == [[-100, *range(start + 1, start + length)]]
        assert not {"cu_seq_lens_q", "max_length_q"} & one.keys()


def test_rows_of_packed_sequences():
    two = {
        key: torch.cat([value, value.flip(1) if key == "input_ids" else value])
        for key, value in packed("positions").items()
    }
    (samples,) = cut(two)
    assert samples.size == 6 and samples.batch["attention_mask"].sum(1).tolist() == [*LENGTHS, *LENGTHS]


@pytest.mark.parametrize(
    "batch",
    [
        packed("positions") | {"attention_mask": torch.ones(1, 12)},
        packed("positions") | {"pixel_values": torch.ones(1, 3)},
        {"input_ids": torch.ones(2, 4), "position_ids": torch.arange(4).expand(2, 4)},
        {"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[3, 0, 1, 2]])},
        {"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[0, 1, 3, 0]])},
        {"input_ids": torch.ones(1, 4), "cu_seq_lens_q": torch.tensor([0, 2])},
        token_batch(),
    ],
    ids=["masked", "images", "not packed", "no beginning", "a jump", "short of the end", "padded"],
)
def test_other_rows_stay_as_they_are(batch):
    assert unpacked(batch) is None


@pytest.mark.parametrize("how", ["positions", "boundaries"])
def test_a_packed_batch_gives_the_gradient_of_its_sequences(how):
    base = tiny_llama()
    batch = packed(how)
    ends = [0, 5, 8, 12]
    apart = [{k: batch[k][:, low:high] for k in ("input_ids", "labels")} for low, high in itertools.pairwise(ends)]
    exact = exact_gradients(base, apart, ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"])
    found = collect(wrap(copy.deepcopy(base)), [batch], 3, outputs=None)
    assert found.samples == 3 and found.tokens == 12
    for name in exact:
        assert relative(found.gradients[name], exact[name]) < 2e-5


# Batches read as wholes.


def batch_gradients(base, batches, names):
    model = copy.deepcopy(base)
    weights = [model.get_submodule(name).weight for name in names]
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        for part, gradient in zip(total, torch.autograd.grad(model(**batch)["loss"], weights), strict=True):
            part += gradient / len(batches)
    return dict(zip(names, total, strict=True))


class Patches(Tokens):
    """Adds to each token the mean of its sample's patches, which lie in a row, as many a sample as ``counts`` says."""

    def forward(self, input_ids, patches, counts, labels, attention_mask=None):
        means = torch.stack([part.mean(0) for part in patches.split(counts.tolist())])
        logits = self.head(self.body(self.embed(input_ids) + means[:, None]))
        return {"loss": functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


def patch_batch():
    counts = torch.tensor([2, 4, 1, 3])
    patches = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    return uneven_batch(4, 6) | {"patches": patches, "counts": counts}


def patch_singles(batch):
    parts = batch["patches"].split(batch["counts"].tolist())
    keys = ("input_ids", "attention_mask", "labels", "counts")
    return [{k: batch[k][row : row + 1] for k in keys} | {"patches": parts[row]} for row in range(4)]


def test_samples_weigh_the_same_in_a_batch_that_can_not_be_cut():
    """Their labels lie in rows, so that each one's own loss follows from the logits all the same."""
    base, batch = Patches(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), patch_batch()
    whole = collect(lora(base, ["body.0"]), [batch], 4, outputs=None)
    apart = collect(lora(base, ["body.0"]), patch_singles(batch), 4, outputs=None)
    assert whole.samples == apart.samples == 4
    exact = batch_gradients(base, patch_singles(batch), ["body.0"])["body.0"].double()
    for found in (whole, apart):
        assert relative(found.gradients["body.0"], exact) < 2e-5


def test_an_unknown_loss_of_a_batch_that_can_not_be_cut_is_its_own():
    class Summed(Patches):
        def forward(self, **given):
            outputs = super().forward(**given)
            return outputs | {"loss": 3 * outputs["loss"]}

    base, batch = Summed(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), patch_batch()
    found = collect(lora(base, ["body.0"]), [batch], 4, outputs=None)
    assert any("can't be told apart" in note for note in found.notes)
    model = copy.deepcopy(base)
    (expected,) = torch.autograd.grad(model(**batch)["loss"], model.body[0].weight)
    assert relative(found.gradients["body.0"], expected.double()) < 1e-5


class Contrast(nn.Module):
    """Two towers whose samples are each other's negatives: one alone has nothing to learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)
        self.config = types.SimpleNamespace(model_type="contrast", is_encoder_decoder=False)

    def scores(self, x, y):
        return 3 * functional.normalize(self.left(x), dim=-1) @ functional.normalize(self.right(y), dim=-1).T

    def forward(self, x, y, return_loss=None):
        scores = self.scores(x, y)
        return {"loss": functional.cross_entropy(scores, torch.arange(len(x))), "logits": scores}


class Sigmoid(Contrast):
    """A sample alone has a loss, but no negative in it."""

    def forward(self, x, y, return_loss=None):
        scores = self.scores(x, y)
        signs = 2 * torch.eye(len(x)) - 1
        return {"loss": -functional.logsigmoid(signs * scores).sum(1).mean(), "logits": scores}


def pairs(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 6, generator=generator), "y": torch.randn(size, 6, generator=generator)}


# Nothing tells the second one from a loss of single samples but that it is asked for without labels.
@pytest.mark.parametrize(
    ("make", "asked"), [(Contrast, {}), (Contrast, {"return_loss": True}), (Sigmoid, {"return_loss": True})]
)
def test_losses_that_compare_samples_are_read_by_batches(make, asked):
    base, names = make(), ["left", "right"]
    batches = [pairs(4, seed) | asked for seed in (0, 1)]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=names))
    found = collect(model, batches, 8, outputs=None)
    assert found.notes == ["the loss compares the samples of a batch, so batches were read as wholes"]
    expected = batch_gradients(base, batches, names)
    for name in names:
        assert relative(found.gradients[name], expected[name].double()) < 1e-5


def test_a_user_who_says_so_gets_whole_batches():
    base, names = Sigmoid(), ["left", "right"]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=names))
    found = collect(model, [pairs()], 1, outputs=None, single=True)
    expected = batch_gradients(base, [pairs()], names)
    for name in names:
        assert relative(found.gradients[name], expected[name].double()) < 1e-5
    data = hs.TrainingData([pairs(4, seed) for seed in range(3)], single=True)
    assert hs.initialize_(model, "lora-one:samples=2", data=data, progress=False).samples == 2


def test_a_batch_with_a_gradient_starts_every_layer():
    model = get_peft_model(Contrast(), LoraConfig(r=2, target_modules=["left", "right"]))
    report = hs.initialize_(model, "lora-one:samples=4", data=[pairs()], progress=False, strict=True)
    assert all(layer.norm_product > 0 for layer in report.layers)


# Pictures, whose labels are a map, or as many boxes as there are things.


class Pixels(nn.Module):
    """Sees of each pixel its colours and the picture's mean; the loss is the mean over the pixels that count."""

    def __init__(self, outputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, 8), nn.Linear(8, outputs)
        self.config = types.SimpleNamespace(model_type="pixels", is_encoder_decoder=False)

    def features(self, pixel_values):
        x = self.first(pixel_values.permute(0, 2, 3, 1)).tanh()
        return x + x.mean((1, 2), keepdim=True)

    def forward(self, pixel_values, labels):
        logits = self.head(self.features(pixel_values)).permute(0, 3, 1, 2)
        return {"loss": functional.cross_entropy(logits, labels, ignore_index=255), "logits": logits}


class Boxes(Pixels):
    """Finds one box a row of pixels; the loss is the mean over the boxes that are there, in all pictures."""

    def __init__(self):
        super().__init__(outputs=4)

    def forward(self, pixel_values, labels):
        found = self.head(self.features(pixel_values).mean(2))
        terms = [(row[: len(of["boxes"])] - of["boxes"]).abs().mean(1) for row, of in zip(found, labels, strict=True)]
        return {"loss": torch.cat(terms).mean(), "logits": found}


def pictures(kind):
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(4, 3, 6, 5, generator=generator)}
    if kind is Pixels:
        labels = torch.randint(0, 5, (4, 6, 5), generator=generator)
        for row, counted in enumerate((6, 1, 3, 5)):
            labels[row, counted:] = 255
        return batch | {"labels": labels}
    boxes = [torch.rand(count, 4, generator=generator) for count in (2, 6, 1, 4)]
    return batch | {"labels": [{"boxes": each, "class_labels": torch.arange(len(each))} for each in boxes]}


@pytest.mark.parametrize("kind", [Pixels, Boxes])
def test_each_picture_weighs_the_same_whatever_its_labels_are(kind):
    base, batch, names = kind(), pictures(kind), ["first", "head"]
    exact = exact_factors(base, [batch], names)
    together, apart = (collect(lora(base, names), data, 4) for data in ([batch], singles(batch)))
    for found in (together, apart):
        assert found.samples == 4
        assert_exact(found, exact)
    assert together.notes == ["the model's loss can't be computed from its logits, so samples were read one at a time"]
    assert apart.notes == []
    # The batch's own loss weighs a picture by how much of it counts.
    own = batch_gradients(base, [batch], names)
    assert all(relative(own[name], exact[name].gradient) > 0.05 for name in names)


# A loss given from outside.


def distilled(model, batch):
    logits = model(input_ids=batch["input_ids"], labels=batch["labels"])["logits"]
    return (logits.softmax(-1) - functional.one_hot(batch["labels"].clamp(min=0), 97)).square().sum(-1).mean()


def test_a_given_loss_is_read_one_sample_at_a_time():
    base, batch = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), whole_batch()
    found = collect(lora(base, ["body.0"]), [batch], loss=distilled)
    assert_exact(found, exact_factors(base, [batch], ["body.0"], loss=distilled))
    assert found.notes == ["loss= was given, so samples were read one at a time"]


def test_a_given_loss_of_pairs_is_read_by_batches():
    """The first half of the rows are chosen, the second half rejected: a row alone has no partner."""

    def preference(model, batch):
        chosen, rejected = model(**batch)["logits"].logsumexp(-1).mean(1).chunk(2)
        return -functional.logsigmoid(chosen - rejected).mean()

    base, batch = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), whole_batch()
    found = collect(lora(base, ["body.0"]), [batch], outputs=None, loss=preference)
    assert any("so batches were read as wholes" in note for note in found.notes)
    model = copy.deepcopy(base)
    (expected,) = torch.autograd.grad(preference(model, batch), model.body[0].weight)
    assert relative(found.gradients["body.0"], expected.double()) < 1e-5


def test_a_given_loss_that_fails_says_why():
    def broken(model, batch):
        raise KeyError("advantages")

    with pytest.raises(KeyError, match="advantages"):
        collect(lora(Tokens(nn.Linear(6, 6)), ["body"]), [whole_batch()], loss=broken)


# Which positions predict a label.


@pytest.mark.parametrize("size", [1, 3])
def test_labels_at_the_last_position_only_are_predicted_by_the_one_before(size):
    """The last position's own output gradient is zero: counted instead, it would leave nothing of Y."""
    base, batch = tiny_llama(), token_batch(3, 8, padded=False)
    batch["labels"][:, :-1] = -100
    data = [batch] if size == 3 else singles(batch)
    found = collect(wrap(copy.deepcopy(base)), data, 3, tokens="labels")
    exact = exact_factors(base, [batch], list(found.kronecker), "labels")
    assert_exact(found, exact)
    name = "model.layers.1.mlp.down_proj"
    assert found.kronecker[name].tokens == 3 and float(found.kronecker[name].outputs.trace()) > 1e-6


def test_positions_of_a_masked_language_model_predict_their_own_label():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    base, batch = BertForMaskedLM(BertConfig(vocab_size=97, **sizes)), token_batch(4, 9)
    found = collect(wrap(copy.deepcopy(base), target_modules=["query", "dense"]), [batch], tokens="labels")
    assert found.notes == []
    names = [name for name in found.kronecker if "encoder" in name]
    exact = exact_factors(base, [batch], names, "labels")
    for name in names:
        assert found.kronecker[name].tokens == exact[name].tokens
        assert relative(found.kronecker[name].outputs, exact[name].Y) < 2e-5
