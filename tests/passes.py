"""Small models and data that the tests of passes over data share, and how they collect and compare."""

from __future__ import annotations

import copy
import types

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from conftest import ARCHITECTURES, VOCABULARY, token_batch
from headstart.layers.find import lora_layers
from headstart.methods.base import Wants
from headstart.statistics.prepare import prepare
from oracles import relative


def named(model):
    return {target.name: target.module for target in lora_layers(model, "default")}


def collect(model, data, samples=None, *, outputs="full", tokens="attention", gradient=True, **kwargs):
    """Return the statistics of the only pass."""
    layers = named(model)
    wanted = Wants(gradient=gradient, outputs=outputs, tokens=tokens)
    samples = samples or sum(len(batch["labels"]) for batch in data)
    (statistics,) = prepare(model, layers, dict.fromkeys(layers, wanted), data, samples, **kwargs).passes()
    return statistics


def assert_exact(statistics, exact, *, tolerance=2e-5, gradients=True):
    """Compare all that a pass found with the definition."""
    assert set(statistics.kronecker) == set(exact)
    for name, expected in exact.items():
        factors = statistics.kronecker[name]
        Y = expected.Y if factors.outputs.dim() == 2 else expected.Y.diagonal()
        assert factors.tokens == expected.tokens, name
        assert factors.inputs.shape == expected.Z.shape and factors.outputs.shape == Y.shape
        assert relative(factors.inputs, expected.Z) < tolerance, name
        assert relative(factors.outputs, Y) < tolerance, name
        # A mean may be small beside what it is the mean of.
        for mean, exact_mean, second in (
            (factors.mean_input, expected.mean_input, expected.Z),
            (factors.mean_output, expected.mean_output, expected.Y),
        ):
            assert float((mean.double() - exact_mean).norm()) < tolerance * float(second.trace().sqrt()), name
        for value in (factors.inputs, factors.outputs, factors.mean_input, factors.mean_output):
            assert value.dtype == torch.float32
        assert relative(factors.inputs, factors.inputs.T.double()) < 1e-6, name
        if gradients:
            assert relative(statistics.gradients[name], expected.gradient) < tolerance, name


# Data.


def left(batch):
    """Move the padding to the left."""
    hidden = (batch["attention_mask"] == 0).sum(1)
    width = batch["attention_mask"].shape[1]
    return {
        key: torch.stack([row.roll(int(n)) for row, n in zip(value, hidden, strict=True)])
        if value.dim() == 2 and value.shape[1] == width
        else value
        for key, value in batch.items()
    }


def pair_batch(inputs=(6, 12, 8, 3), answers=(9, 4, 10, 2), width=12, label_width=10, seed=0):
    """Inputs and answers of these lengths, for an encoder and its decoder."""
    generator = torch.Generator().manual_seed(seed)
    size = len(inputs)
    ids = torch.randint(1, VOCABULARY, (size, width), generator=generator)
    labels = torch.randint(1, VOCABULARY, (size, label_width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        ids[row, inputs[row] :] = 0
        mask[row, inputs[row] :] = 0
        labels[row, answers[row] :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = {name: batch_of for name, (_, batch_of, _) in ARCHITECTURES.items()} | {"t5": pair_batch}


class Tokens(nn.Module):
    """Embeds tokens, runs ``body``, and learns a label a token: the loss is the mean over the labels that count."""

    def __init__(self, body, d=6, reduction="mean", loss_from=0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, d)
        self.body = body
        self.head = nn.Linear(d, VOCABULARY)
        self.config = types.SimpleNamespace(model_type="tokens", is_encoder_decoder=False)
        self.reduction, self.loss_from = reduction, loss_from

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.body(self.embed(input_ids)))
        used, of = logits[:, self.loss_from :].transpose(1, 2), labels[:, self.loss_from :]
        return {"loss": functional.cross_entropy(used, of, reduction=self.reduction), "logits": logits}


def lora(model, targets):
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))


def whole_batch(size=4, length=5, seed=0):
    batch = token_batch(size, length, seed, padded=False)
    return batch | {"labels": batch["input_ids"].flip(1)}


def singles(batch):
    return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["labels"]))]


def wider(batch, by=5):
    return {k: functional.pad(v, (0, by), value=-100 if k == "labels" else 0) for k, v in batch.items()}


def reordered(batch, order):
    return {key: value[order] for key, value in batch.items()}


def collated(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batch_of_lengths(*lengths, seed=0):
    batch = whole_batch(len(lengths), max(lengths), seed)
    for row, length in enumerate(lengths):
        for key, padding in (("attention_mask", 0), ("labels", -100), ("input_ids", 0)):
            batch[key][row, length:] = padding
    return batch


def uneven_batch(size, length, seed=0):
    batch = whole_batch(size, length, seed)
    for row in range(1, size):
        cut = max(1, length - (1, 3, 2)[row % 3])
        batch["attention_mask"][row, cut:] = 0
        batch["labels"][row, cut:] = -100
        batch["input_ids"][row, cut:] = 0
    return batch


class Classes(nn.Module):
    """A classifier of vectors: one token a sample."""

    def __init__(self, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.reduction = reduction
        self.net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8, bias=False), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels, reduction=self.reduction), "logits": logits}


class Sequences(Classes):
    """The same for sequences, each of whose tokens has a label; the loss is the mean over tokens."""

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}
