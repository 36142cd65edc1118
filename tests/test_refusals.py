"""Whatever a method can't start is refused before the first sample is read, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch

import headstart as hs
from conftest import ANY_BASE, tiny_llama, wrap
from headstart.layers.find import lora_layers
from headstart.methods import ANY_LAYER, method_class

SETTINGS = {"lora-sb": ":samples=4,lr=1e-3"}
METHODS = [name + SETTINGS.get(name, "") for name in ANY_BASE]


class Unread:
    """Data of which nothing may be read."""

    def __iter__(self):
        raise AssertionError("a sample was read")


def form(method):
    return method_class(method.partition(":")[0]).form


def dora():
    return wrap(tiny_llama(), use_dora=True)


def frozen():
    model = wrap(tiny_llama())
    hs.lora_fa_(model)
    return model


def wide():
    """q_proj is 32 by 32, k_proj 16 by 32."""
    return wrap(tiny_llama(), r=20, target_modules=["q_proj", "k_proj"])


def full():
    return wrap(tiny_llama(), r=32, target_modules=["q_proj"])


def half():
    return wrap(tiny_llama(), r=17, target_modules=["q_proj"])


def single():
    return wrap(tiny_llama(), rank_pattern={"k_proj": 1}, target_modules=["q_proj", "k_proj"])


def broken():
    model = wrap(tiny_llama())
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = float("nan")
    return model


# By conflict: the model, which methods it is one for, and what the sentence says.
CONFLICTS = {
    "rank over the smaller side": (wide, lambda method: True, r"k_proj.*rank 20 is more than its smaller side, 16"),
    "DoRA with a start that is subtracted": (dora, lambda m: form(m) == "anchored", "uses DoRA, whose norms"),
    "DoRA with protected inputs": (dora, lambda m: m.startswith("keeplora-plus"), "uses DoRA, whose magnitude changes"),
    "too many protected inputs": (
        full,
        lambda m: m.startswith("keeplora"),
        r"q_proj.*protects \d+ of 32 input directions, which leaves \d+ for rank 32",
    ),
    "DoRA with a core": (dora, lambda m: form(m) == "core", "uses DoRA, which trains A and B"),
    "LoRA-FA with a core": (frozen, lambda m: form(m) == "core", "LoRA-FA has frozen its A.*freezes B as well"),
    "LoRA-FA with A at zero": (
        frozen,
        lambda m: not method_class(m.partition(":")[0]).starts_A,
        "LoRA-FA has frozen its A.*starts A at zero",
    ),
    "twice the rank over the smaller side": (half, lambda m: m == "lora-ga", "2 r = 34 singular vectors"),
    "an odd rank": (half, lambda m: m == "orthogonal", "even rank, and r is 17"),
    "a rank of 1": (single, lambda m: m == "loram", r"k_proj.*at rank 1 both factors would be zero"),
    "a weight that is not finite": (
        broken,
        lambda m: method_class(m.partition(":")[0])().wants(ANY_LAYER).moments,
        r"layers\.1\.mlp\.up_proj.*NaN",
    ),
}
PAIRS = [
    (conflict, method) for conflict, (_, concerns, _) in CONFLICTS.items() for method in METHODS if concerns(method)
]


@pytest.mark.parametrize(("conflict", "method"), PAIRS)
def test_a_conflict_is_refused_before_a_sample_is_read(conflict, method):
    make, _, sentence = CONFLICTS[conflict]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(hs.LayerError, match=sentence):
        hs.initialize_(model, method, data=Unread(), progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value.nan_to_num(), after[name].nan_to_num()) for name, value in before.items())
    assert not any(hasattr(target.module, "headstart_record") for target in lora_layers(model, "default"))


@pytest.mark.parametrize(
    "method", [name for name in METHODS if method_class(name.partition(":")[0])().wants(ANY_LAYER).data]
)
def test_no_data_is_a_sentence(method):
    with pytest.raises(hs.DataError, match="needs data"):
        hs.initialize_(wrap(tiny_llama()), method, progress=False)


def test_a_rate_that_nobody_knows_is_refused_before_a_sample_is_read():
    with pytest.raises(hs.MethodError, match="rate of the first optimizer step"):
        hs.initialize_(wrap(tiny_llama()), "lora-sb:samples=4", data=Unread(), progress=False)


def test_every_method_has_a_conflict_of_its_own():
    assert {method for _, method in PAIRS} == set(METHODS)
    assert len(PAIRS) > 2 * len(METHODS) - 10
