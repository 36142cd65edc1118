"""Layers that read one input, or no longer do, and layers that no gradient reaches; numbers that are not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import headstart as hs
from conftest import class_batch, image_batch, tiny_bert, tiny_llama, tiny_t5, tiny_vit, token_batch, wrap
from headstart.errors import HeadstartWarning
from headstart.methods.base import Wants
from headstart.statistics.prepare import prepare
from oracles import exact_factors, relative
from passes import Tokens, assert_exact, collect, lora, named, pair_batch, reordered, singles, uneven_batch, whole_batch


def together(statistics):
    """Return the sets of layers that hold one tensor."""
    by_tensor = {}
    for name, factors in statistics.kronecker.items():
        by_tensor.setdefault(id(factors.inputs), set()).add(name.rpartition("layers.")[2])
    return sorted(map(sorted, by_tensor.values()))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_layers_that_read_one_input_share_one_tensor(reentrant):
    model = wrap(tiny_llama())
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = collect(model, [token_batch()])
    assert together(found) == sorted(
        sorted(f"{layer}.{name}" for name in names)
        for layer in (0, 1)
        for names in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    )
    for one, factors in found.kronecker.items():
        for other, theirs in found.kronecker.items():
            assert (found.groups[one] == found.groups[other]) == (factors.inputs is theirs.inputs)


def test_cross_attention_shares_the_encoders_states():
    found = collect(wrap(tiny_t5(), target_modules=["k", "v"]), [pair_batch()])
    cross = [factors for name, factors in found.kronecker.items() if "EncDec" in name]
    assert len(cross) == 4
    assert all(factors.inputs is cross[0].inputs for factors in cross)


class Branching(nn.Module):
    """Two or three layers that read one tensor, or not, as the first token of the batch says."""

    def __init__(self, d=6):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.kind = lambda x: 0

    def forward(self, x):
        match self.kind(x):
            case 0:  # one tensor
                return self.a(x).tanh() * self.b(x) + self.c(x)
            case 1:  # another one with the same values in it
                return self.a(x).tanh() * self.b(x.clone()) + self.c(x)
            case 2:  # other values
                return self.a(x).tanh() * self.b(2 * x + 1) + self.c(x)
            case 3:  # b is not called
                return self.a(x).tanh() + self.c(x)
            case 4:  # called a second time
                return self.a(x).tanh() * self.b(self.a(self.b(x)))
            case 5:  # another order
                return self.c(x) * self.b(x) + self.a(x)
            case 6:  # twice on one input
                return self.a(x) * self.a(x) + self.b(x).tanh() * self.b(x) + self.c(x) * self.c(x)
            case 7:  # one after the other
                return self.a(self.b(self.c(x).tanh()).tanh())
            case 8:  # only one of them twice
                return self.a(x) * self.a(x) + self.b(x).tanh() + self.c(x)
            case 9:  # none
                return x.tanh()
        raise AssertionError


BRANCHES = ["body.a", "body.b", "body.c"]


@pytest.mark.parametrize("later", range(1, 10))
@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_share_inputs_at_first_only(later, size):
    base = Tokens(Branching())
    # Which way to go is told by the value that the first token was embedded as, the same in every batch size.
    kinds = torch.tensor([0, 0, 0, later, 0, later, 5, later])
    batch = whole_batch(8, 5)
    batch["input_ids"][:, 0] = kinds
    with torch.no_grad():
        base.embed.weight[:10, 0] = torch.arange(10) / 10
    base.body.kind = lambda x: round(10 * float(x.detach()[0, 0, 0]))
    order = kinds.argsort(stable=True) if size > 1 else torch.arange(8)
    batch = reordered(batch, order)
    kinds = kinds[order].tolist()
    if size > 1:
        # Batches of samples that go one way.
        data = [
            reordered(batch, [row for row in range(8) if kinds[row] == kind][start : start + size])
            for kind in dict.fromkeys(kinds)
            for start in range(0, kinds.count(kind), size)
        ]
    else:
        data = singles(batch)
    found = collect(lora(base, BRANCHES), data)
    assert_exact(found, exact_factors(base, data, BRANCHES))
    assert found.samples == 8
    if later not in (5, 6, 9):
        assert len({id(factors.inputs) for factors in found.kronecker.values()}) == 3


@pytest.mark.parametrize("kind", [4, 6, 7, 8])
def test_layers_called_twice_in_one_forward_pass(kind):
    base = Tokens(Branching())
    base.body.kind = lambda x: kind
    batch = uneven_batch(4, 6)
    names = BRANCHES if kind != 4 else BRANCHES[:2]
    found = collect(lora(base, names), [batch])
    assert_exact(found, exact_factors(base, [batch], names))


def test_layers_that_do_not_share_in_the_first_sample_may_later():
    base = Tokens(Branching())
    kinds = iter([1])
    base.body.kind = lambda x: next(kinds, 0)
    model = lora(base, BRANCHES)
    found = collect(model, singles(whole_batch()))
    base.body.kind = lambda x: 0
    assert_exact(found, exact_factors(base, [whole_batch()], BRANCHES))


def test_only_some_of_the_layers_ask_for_factors():
    base = tiny_llama()
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "k_proj", "v_proj"])
    layers = named(model)
    wanted = {
        name: Wants(gradient=True, outputs=None if "q_proj" in name else "full" if "k_proj" in name else "diagonal")
        for name in layers
    }
    (found,) = prepare(model, layers, wanted, [token_batch()], 4).passes()
    exact = exact_factors(base, [token_batch()], list(layers))
    assert set(found.gradients) == set(layers)
    for name in layers:
        assert relative(found.gradients[name], exact[name].gradient) < 2e-5
    assert_exact(found, {name: each for name, each in exact.items() if "q_proj" not in name})


class Overwriting(nn.Module):
    """Changes the input of one layer in place before another one reads it."""

    def __init__(self, d=6):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        x = x * 1.0
        y = self.a(x)
        x.add_(1.0)
        return y + self.b(x).tanh()


def test_a_shared_input_changed_in_place_is_never_summed_wrongly():
    """Nor can such a model be trained: its first adapter needs the input that was overwritten."""
    base = Tokens(Overwriting())
    model = lora(base, ["body.a", "body.b"])
    with pytest.raises(RuntimeError, match="inplace"):
        model(**whole_batch())["loss"].backward()
    with pytest.raises(RuntimeError, match="inplace"):
        collect(model, [whole_batch()])
    # The model is given back as it was.
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


# Failures.


@pytest.mark.parametrize("make, batch", [(tiny_bert, class_batch()), (tiny_vit, image_batch())])
def test_labels_of_classes_are_not_labels_of_tokens(make, batch):
    with pytest.raises(hs.DataError, match=r"tokens='labels'.*have none a token"):
        collect(wrap(make(), target_modules=["query", "q_proj"]), [batch], tokens="labels")


class Poisoned(nn.Module):
    """Gives its second layer NaN, or infinity, for the first token, which the loss may not depend on."""

    def __init__(self, value, d=6):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)
        self.value = value

    def forward(self, x):
        x = self.a(x).tanh()
        poison = torch.zeros_like(x)
        poison[:, 0] = self.value
        return x + self.b(x + poison)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_an_input_names_the_layer(value, gradient):
    model = lora(Tokens(Poisoned(value), loss_from=1), ["body.a", "body.b"])
    assert model(**whole_batch())["loss"].isfinite()
    with pytest.raises(hs.LayerError, match=r"layer 'body\.b'.*NaN or infinity"):
        collect(model, [whole_batch()], gradient=gradient)


@pytest.mark.parametrize(
    "method", ["lora-da:samples=4", "lora-da:samples=4,fisher=full", "lora-one:samples=4", "kfac-newton:samples=4"]
)
def test_nan_in_an_input_reaches_no_factor(method):
    model = lora(Tokens(Poisoned(math.nan), loss_from=1), ["body.a", "body.b"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(hs.LayerError, match=r"body\.b"):
        hs.initialize_(model, method, data=[whole_batch()])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_overflowing_squares_name_the_layer():
    """Finite numbers whose squares float32 can't hold."""
    model = lora(Tokens(Poisoned(1e25), loss_from=1), ["body.a", "body.b"])
    with pytest.raises(hs.LayerError, match=r"layer 'body\.b'.*NaN or infinity"):
        collect(model, [whole_batch()])


def test_no_nan_where_no_token_counts():
    batch = whole_batch()
    batch["attention_mask"][:] = 0
    found = collect(lora(Tokens(Branching()), BRANCHES), [batch])
    for factors in found.kronecker.values():
        for value in (factors.inputs, factors.outputs, factors.mean_input, factors.mean_output):
            assert value.isfinite().all()


class Unused(nn.Module):
    """One layer that is used, one that isn't, and one whose output is cut off from the loss."""

    def __init__(self, d=6):
        super().__init__()
        self.used, self.unused, self.cut = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.used(x).tanh() + self.cut(x).detach()


UNUSED = ["body.used", "body.unused", "body.cut"]


@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_layers_that_no_gradient_reached_are_missing(outputs):
    base = Tokens(Unused())
    found = collect(lora(base, UNUSED), [uneven_batch(4, 6)], outputs=outputs)
    assert set(found.layers) == set(UNUSED)
    assert set(found.kronecker) == set(found.gradients) == set(found.groups) == {"body.used"}
    assert_exact(found, exact_factors(base, [uneven_batch(4, 6)], ["body.used"]))


def test_strict_refuses_an_unused_layer():
    model = lora(Tokens(Unused()), UNUSED)
    with pytest.raises(hs.LayerError, match=r"body\.unused.*no gradient"):
        hs.initialize_(model, "lora-da:samples=4", data=[whole_batch()], strict=True)
    with pytest.warns(HeadstartWarning, match="no gradient"):
        report = hs.initialize_(model, "lora-da:samples=4", data=[whole_batch()])
    notes = {layer.name: layer.note for layer in report.layers}
    assert not notes["body.used"] and notes["body.unused"] and notes["body.cut"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_no_layer_reached_at_all():
    with pytest.raises(hs.DataError, match="no gradient reached any"):
        collect(lora(Tokens(Unused()), UNUSED[1:]), [whole_batch()])
