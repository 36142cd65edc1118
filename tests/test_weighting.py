"""How samples weigh: each by its own loss, whatever the model makes of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import tiny_mixtral, token_batch, wrap
from oracles import exact_factors
from passes import Classes, Tokens, assert_exact, collect, lora, reordered, uneven_batch, whole_batch


def test_a_token_classifier_counts_the_first_label():
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    batch = uneven_batch(4, 6)
    found = collect(lora(base, ["body.0"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.0"]))


@pytest.mark.parametrize("batch_of", [whole_batch, uneven_batch], ids=["whole", "uneven"])
def test_a_loss_that_sums_over_tokens(batch_of):
    """It is not the mean over label tokens that is computed from logits, so that it is the model's own that counts."""
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction="sum")
    batch = batch_of(4, 6)
    found = collect(lora(base, ["body.0"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.0"]))
    assert any("one at a time" in note for note in found.notes)


@pytest.mark.parametrize("sizes", [(1, 4, 3), (5, 2, 1), (8,)])
@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_a_loss_that_sums_in_batches_of_several_sizes(sizes, outputs):
    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reduction="sum")
    batch, ends = uneven_batch(8, 6), torch.tensor(sizes).cumsum(0).tolist()
    data = [reordered(batch, list(range(end - size, end))) for size, end in zip(sizes, ends, strict=True)]
    found = collect(lora(base, ["body.0"]), data, outputs=outputs)
    assert_exact(found, exact_factors(base, [batch], ["body.0"]))


@pytest.mark.parametrize("size", [8, 3])
def test_a_sum_over_samples_of_one_class_each(size):
    base = Classes(reduction="sum")
    batch = {"x": torch.randn(8, 7, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(8) % 5}
    data = [reordered(batch, list(range(start, min(start + size, 8)))) for start in range(0, 8, size)]
    names = ["net.0", "net.2", "net.4"]
    found = collect(lora(base, names), data)
    assert_exact(found, exact_factors(base, [batch], names))
    assert found.notes == []


class MeanOfMeans(Tokens):
    """Whose loss is the mean over samples of each one's own."""

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = super().forward(input_ids, labels)["logits"]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return {"loss": (losses.sum(1) / (labels != -100).sum(1)).mean(), "logits": logits}


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (Tokens, "uneven"),
        (MeanOfMeans, "uneven"),
        (MeanOfMeans, "prompts"),
        pytest.param(Tokens, "whole"),
        pytest.param(MeanOfMeans, "whole"),
        pytest.param(Tokens, "prompts"),
    ],
)
def test_the_first_batch_may_not_tell_how_samples_weigh(make, first):
    """Where all samples have as many labels any rule will do for that batch, but not for the next.

    And where none has one in first place, whether that would count.
    """
    base = make(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    data = [whole_batch(4, 6), whole_batch(4, 6, seed=1)]
    uneven = data[0 if first == "uneven" else 1]
    for row in range(4):
        uneven["labels"][row, 2 + row :] = -100
        if first == "prompts":
            data[0]["labels"][row, : 1 + row] = -100
    found = collect(lora(base, ["body.0"]), data)
    assert_exact(found, exact_factors(base, data, ["body.0"]))
    assert found.notes == []


@pytest.mark.parametrize("padded", [True, False])
def test_an_auxiliary_loss_that_mixes_samples(padded):
    base = tiny_mixtral()
    batch = token_batch(4, 12, padded=padded)
    if not padded:
        batch["labels"] = batch["input_ids"].clone()
    found = collect(wrap(copy.deepcopy(base), target_modules=["q_proj", "v_proj"]), [batch])
    assert_exact(found, exact_factors(base, [batch], list(found.kronecker)))
