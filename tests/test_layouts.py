"""Layers that see their tokens otherwise than (samples, tokens): experts, poolers, the sequence first, in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import token_batch
from oracles import exact_factors
from passes import Tokens, assert_exact, batch_of_lengths, collect, left, lora, uneven_batch, whole_batch


class Experts(nn.Module):
    """Each token goes to the expert that the signs of its first two numbers name; the last one gets none."""

    def __init__(self, d=6, empty=False):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(4))
        self.empty = empty

    def forward(self, x):
        place = ((x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()).clamp(max=2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = place == number
            if self.empty or bool(chosen.any()):
                out[chosen] = expert(x[chosen]).tanh()
        return x + out


EXPERTS = [f"body.experts.{number}" for number in range(4)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_experts_see_no_padding_and_unused_ones_are_not_reached(outputs, flip):
    base = Tokens(Experts())
    batches = [token_batch(4, 12, seed) for seed in (1, 2)]
    batches = [left(batch) for batch in batches] if flip else batches
    found = collect(lora(base, EXPERTS), batches, outputs=outputs)
    assert any("one at a time" in note for note in found.notes)
    assert set(found.kronecker) == set(found.gradients) == set(found.groups) == set(EXPERTS[:3])
    assert_exact(found, exact_factors(base, batches, EXPERTS[:3]))
    assert sum(factors.tokens for factors in found.kronecker.values()) == found.tokens


def test_experts_and_labels():
    """Which rows have a label can't be told where a layer sees a part of them: all count, and that is said."""
    base = Tokens(Experts())
    found = collect(lora(base, EXPERTS), [token_batch()], tokens="labels")
    assert any("all of theirs count" in note for note in found.notes)
    assert_exact(found, exact_factors(base, [token_batch()], EXPERTS[:3]))


def test_an_expert_called_on_no_token_is_not_reached():
    base = Tokens(Experts(empty=True))
    found = collect(lora(base, EXPERTS), [token_batch()])
    assert EXPERTS[3] not in found.kronecker
    assert EXPERTS[3] not in found.gradients
    assert EXPERTS[3] not in found.groups
    assert_exact(found, exact_factors(base, [token_batch()], EXPERTS[:3]))


class Chosen(nn.Module):
    """One expert, for the tokens whose first number is positive, in an order of its own."""

    def __init__(self, d=6):
        super().__init__()
        self.expert = nn.Linear(d, d)

    def forward(self, x):
        chosen = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = self.expert(x[chosen]).tanh()
        return x + out


def chosen_by_ids():
    """A model whose expert gets the tokens 0 and 1."""
    base = Tokens(Chosen())
    with torch.no_grad():
        base.embed.weight[:, 0] = -1.0
        base.embed.weight[[0, 1], 0] = 1.0
    return base


def ids_batch(ids):
    """Of two samples, the second of which is one token shorter."""
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    labels = torch.where(mask > 0, 3 + torch.arange(ids.shape[1]), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(
            [[1, 7, 8, 9], [5, 6, 7, 0]],
        ),
        # The first sample by itself shows another number of rows than one.
        [[7, 7, 8, 9], [5, 1, 7, 0]],
        [[7, 1, 1, 9], [5, 6, 7, 8]],
        [[1, 1, 1, 9], [1, 1, 1, 0]],
    ],
)
def test_an_expert_that_gets_as_many_tokens_as_there_are_samples(ids):
    base = chosen_by_ids()
    batch = ids_batch(ids)
    found = collect(lora(base, ["body.expert"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.expert"]))


def test_an_expert_that_gets_as_many_tokens_as_there_are_samples_later():
    """The first batch shows two tokens of one sample, the second one of each and one of padding."""
    base = chosen_by_ids()
    # So long that there is no padding to be saved by another order.
    rest = [5] * 17
    data = [ids_batch([[1, 1, 8, *rest], [5, 6, *rest, 0]]), ids_batch([[1, 7, 8, *rest], [5, 6, *rest, 0]])]
    found = collect(lora(base, ["body.expert"]), data)
    assert any("one at a time" in note for note in found.notes)
    assert_exact(found, exact_factors(base, data, ["body.expert"]))


class SequenceFirst(nn.Module):
    """Puts the sequence before the samples, as PyTorch's recurrent and attention layers do by default."""

    def __init__(self, d=6):
        super().__init__()
        self.a = nn.Linear(d, d)

    def forward(self, x):
        return self.a(x.transpose(0, 1)).tanh().transpose(0, 1)


class SamplesFirst(SequenceFirst):
    """The same with samples first."""

    def forward(self, x):
        return self.a(x).tanh()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("tokens", ["attention", "labels"])
@pytest.mark.parametrize("size", [3, 5])
def test_layers_that_see_the_sequence_first(size, tokens, flip):
    base = Tokens(SequenceFirst())
    batch = uneven_batch(size, 5)
    batch["labels"][:, 2] = -100
    batch = left(batch) if flip else batch
    found = collect(lora(base, ["body.a"]), [batch], tokens=tokens)
    # Its layout is known from one sample, so that batches can be read whole.
    assert found.notes == []
    # The oracle tells labels by samples first.
    other = Tokens(SamplesFirst())
    other.load_state_dict(base.state_dict())
    assert_exact(found, exact_factors(other, [batch], ["body.a"], tokens))
    if tokens == "attention":
        assert_exact(found, exact_factors(base, [batch], ["body.a"]))


class Pooled(nn.Module):
    """Adds to each token what a layer makes of the first one: one row a sample, as poolers see them."""

    def __init__(self, d=6):
        super().__init__()
        self.a, self.pooler = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.a(x).tanh() + self.pooler(x[:, 0]).tanh()[:, None]


class Flat(Pooled):
    """Sees all tokens of all samples in a row."""

    def forward(self, x):
        return self.a(x.flatten(0, 1)).tanh().view_as(x)


@pytest.mark.parametrize("length", [4, 1])
@pytest.mark.parametrize(("body", "names"), [(Pooled, ["body.a", "body.pooler"]), (Flat, ["body.a"])])
def test_layers_that_see_one_row_a_sample_or_all_tokens_in_a_row(body, names, length):
    """A batch as long as it is wide, whose first sample has one token or more."""
    base, batch = Tokens(body()), batch_of_lengths(length, 4, 2, 3)
    found = collect(lora(base, names), [batch])
    assert_exact(found, exact_factors(base, [batch], names))
    if length > 1:
        assert found.notes == []


def test_the_sequence_first_after_a_sample_of_one_token():
    """From which it can't be told what comes first."""
    base, batch = Tokens(SequenceFirst()), batch_of_lengths(1, 5, 2, 4, 3)
    found = collect(lora(base, ["body.a"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.a"]))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 1100), nn.Linear(1100, 6)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def test_layers_wider_than_a_block_of_the_gram_matrices():
    base = Tokens(Wide())
    batch = uneven_batch(4, 6)
    found = collect(lora(base, ["body.up", "body.down"]), [batch])
    assert_exact(found, exact_factors(base, [batch], ["body.up", "body.down"]))


class InPlace(nn.Module):
    """Overwrites a layer's output, as many models do."""

    def __init__(self, kind, d=6):
        super().__init__()
        self.a, self.act, self.kind = nn.Linear(d, d), nn.ReLU(inplace=True), kind

    def forward(self, x):
        y = self.a(x)
        if self.kind == "activation":
            return self.act(y)
        if self.kind == "residual":
            y += x
            return y
        y = y.view(len(y), -1, 2, 3)
        y /= 3**0.5
        return y.flatten(2)


@pytest.mark.parametrize("kind", ["activation", "residual", "scale"])
def test_an_output_that_is_overwritten(kind):
    base = Tokens(InPlace(kind))
    lora(base, ["body.a"])(**whole_batch())["loss"].backward()  # such a model can be trained
    found = collect(lora(base, ["body.a"]), [whole_batch()])
    assert_exact(found, exact_factors(base, [whole_batch()], ["body.a"]))
