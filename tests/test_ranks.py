"""Giving an adapter's layers other ranks: in the layers, in the config, in files, and all of it undone on a failure."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key

import headstart as hs
from conftest import logits, perturb, tiny_gpt2, tiny_llama, token_batch, wrap
from headstart.errors import LayerError
from headstart.layers.find import lora_layers
from headstart.layers.ranks import exact_pattern
from headstart.methods.base import Factors, Method
from snapshots import targets_of

Q0, V1, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
# From rank 4: one grows, one shrinks, one goes.
GIVEN = {Q0: 7, V1: 1, DOWN1: 0}


@dataclass(frozen=True)
class Shares(Method):
    """Ones, at the ranks that ``given`` says."""

    name: ClassVar[str] = "shares"
    form: ClassVar = "kept"

    given: ClassVar[dict[str, int]] = GIVEN
    keeps: ClassVar = "scaling"
    shares_ranks: ClassVar[bool] = True

    def factors(self, layer):
        return Factors(torch.ones(layer.r, layer.d_in), 0.01 * torch.ones(layer.d_out, layer.r))

    def settle(self, starts, ranks):
        return {name: self.of_rank(start, self.given.get(name, ranks[name])) for name, start in starts.items()}

    def of_rank(self, start, rank):
        A, B = torch.ones(rank, start.A.shape[1]), 0.01 * torch.ones(len(start.B), rank)
        return replace(start, A=A, B=B, keeps=self.keeps)


class KeepsAlpha(Shares):
    keeps: ClassVar = "alpha"


class Anchors(Shares):
    form: ClassVar = "anchored"


def picture(model):
    """All that a start may change: modules, parameters with their values and flags, and what is kept by adapter."""
    empty = (torch.nn.ModuleDict, torch.nn.ParameterDict)
    modules = [(n, id(m)) for n, m in model.named_modules() if not (isinstance(m, empty) and not len(m))]
    found = {"modules": modules}
    found["parameters"] = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    found["configs"] = {name: (id(config), config.to_dict()) for name, config in model.peft_config.items()}
    for target in lora_layers(model, "default"):
        module = target.module
        names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "lora_variant", "frozen_peft_weight_names")
        found[target.name] = {name: dict(getattr(module, name).items()) for name in names}
        found[target.name]["record"] = dict(getattr(module, "headstart_record", {}))
        found[target.name]["active"] = list(module.active_adapters)
    return found


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


def test_layers_get_their_ranks_and_keep_their_scaling():
    model = wrap(tiny_llama(), r=4, lora_alpha=8)
    removed = targets_of(model)[DOWN1].module.get_base_layer()
    report = hs.initialize_(model, Shares())
    found = targets_of(model)
    assert DOWN1 not in found and model.get_submodule(f"base_model.model.{DOWN1}") is removed
    for name, target in found.items():
        rank = GIVEN.get(name, 4)
        A, B = (part["default"].weight for part in (target.module.lora_A, target.module.lora_B))
        assert target.r == rank and A.shape == (rank, target.d_in) and B.shape == (target.d_out, rank)
        assert bool((A == 1).all()) and A.requires_grad and B.requires_grad
        assert target.scaling == 2 and target.module.lora_alpha["default"] == pytest.approx(2 * rank)
    assert {layer.name: layer.r for layer in report.layers} == {
        layer.name: GIVEN.get(layer.name, 4) for layer in report.layers
    }
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model(**token_batch()).loss.backward()


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 7), (True, 8 / math.sqrt(7))])
def test_alpha_stays_where_the_method_says_so(rslora, scaling):
    model = wrap(tiny_llama(), r=4, lora_alpha=8, use_rslora=rslora)
    hs.initialize_(model, KeepsAlpha())
    target = targets_of(model)[Q0]
    assert target.module.lora_alpha["default"] == 8
    assert target.scaling == pytest.approx(scaling)
    assert model.peft_config["default"].alpha_pattern == {}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", [Shares, KeepsAlpha])
def test_the_config_gives_peft_the_same_layers(rslora, method):
    changes = dict(r=4, lora_alpha=8, use_rslora=rslora, rank_pattern={"mlp.*": 3}, alpha_pattern={"q_proj": 16})
    model = wrap(tiny_llama(), **changes)
    hs.initialize_(model, method())
    again = wrap(tiny_llama(), **{k: v for k, v in model.peft_config["default"].to_dict().items() if k in CARRIED})
    found, fresh = targets_of(model), targets_of(again)
    assert list(found) == list(fresh)
    for name, target in found.items():
        assert fresh[name].r == target.r
        assert fresh[name].scaling == pytest.approx(target.scaling, rel=1e-12)


CARRIED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform"),
)


@pytest.mark.parametrize("method", [Shares, KeepsAlpha, Anchors])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_computes_the_same_when_peft_loads_it(tmp_path, method, rslora):
    model, batch = wrap(tiny_llama(), use_rslora=rslora), token_batch()
    hs.initialize_(model, method())
    perturb(model)
    hs.save_lora(model, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-5)
    assert list(targets_of(loaded)) == list(targets_of(model))


def test_pefts_own_saving_brings_back_ranks_too(tmp_path, recwarn):
    model, batch = wrap(tiny_llama()), token_batch()
    hs.initialize_(model, Shares())
    perturb(model)
    model.save_pretrained(tmp_path / "plain")
    recwarn.clear()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert not [str(warning.message) for warning in recwarn if "missing" in str(warning.message)]
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert {name: target.r for name, target in targets_of(loaded).items()} == {
        name: target.r for name, target in targets_of(model).items()
    }


def test_a_checkpoint_brings_back_ranks_too(tmp_path):
    model, batch = wrap(tiny_llama()), token_batch()
    hs.initialize_(model, Anchors())
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-6)
    assert {name: target.r for name, target in targets_of(loaded).items()} == {
        name: target.r for name, target in targets_of(model).items()
    }


def test_the_users_own_config_and_torchs_generator_stay_as_they_are():
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), config)
    before, state = copy.deepcopy(config.to_dict()), torch.random.get_rng_state()
    hs.initialize_(model, Shares())
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_factors_keep_the_precision_and_flags_that_they_had():
    """PEFT's own way to another rank would make them bfloat16, as the base is."""
    model = wrap(tiny_llama().to(torch.bfloat16))
    model.eval()
    for target in lora_layers(model, "default"):
        target.module.lora_A["default"].weight.requires_grad_(False)
    hs.initialize_(model, Shares())
    for target in lora_layers(model, "default"):
        A, B = (part["default"] for part in (target.module.lora_A, target.module.lora_B))
        assert A.weight.dtype == B.weight.dtype == torch.float32
        assert not A.weight.requires_grad and B.weight.requires_grad
        assert not A.training


def test_another_adapter_on_the_same_layers_stays():
    model, batch = wrap(tiny_llama()), token_batch()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    perturb(model, adapter="other")
    model.set_adapter("other")
    before, count = logits(model, batch), len(targets_of(model, "other"))
    hs.initialize_(model, Shares(), adapter="default")
    assert len(targets_of(model, "other")) == count and DOWN1 not in targets_of(model)
    assert torch.equal(logits(model, batch), before)
    model.set_adapter("default")
    assert not torch.equal(logits(model, batch), before)


def test_dora_and_conv1d_take_other_ranks():
    model = wrap(tiny_llama(), use_dora=True)
    base = logits(model, token_batch())
    hs.initialize_(model, Shares())
    for target in lora_layers(model, "default"):
        magnitude = target.module.lora_magnitude_vector["default"].weight
        A, B = (part["default"].weight for part in (target.module.lora_A, target.module.lora_B))
        W = target.module.get_base_layer().weight + target.scaling * B @ A
        assert torch.allclose(magnitude, W.norm(dim=1), rtol=1e-5)
    assert not torch.equal(logits(model, token_batch()), base)

    class OnGPT2(Shares):
        given: ClassVar = {"transformer.h.0.attn.c_attn": 9, "transformer.h.1.mlp.c_proj": 0}

    model = wrap(tiny_gpt2(), target_modules=["c_attn", "c_fc", "c_proj"])
    hs.initialize_(model, OnGPT2())
    assert targets_of(model)["transformer.h.0.attn.c_attn"].r == 9
    assert "transformer.h.1.mlp.c_proj" not in targets_of(model)
    model(**token_batch()).loss.backward()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("method", [Shares, Anchors])
@pytest.mark.parametrize("second", [False, True])
def test_a_failure_anywhere_leaves_the_model_as_it_was(monkeypatch, method, second):
    """Stopped at one assignment after another, as Ctrl-C would, until there is none left to stop at."""
    from headstart.layers import install, ranks

    model = wrap(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "v_proj", "down_proj"])
    if second:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))

    class Here(method):
        given: ClassVar = {Q0: 6, "model.layers.0.mlp.down_proj": 0, "model.layers.0.self_attn.v_proj": 1}

    before, batch = picture(model), token_batch()
    base = logits(model, batch)
    calls, limit, armed = 0, 0, True

    def step():
        nonlocal calls, armed
        calls += 1
        if armed and calls > limit:
            armed = False  # what is undone goes through the same functions
            raise Stop

    def counted(function):
        def wrapped(*args):
            step()
            result = function(*args)
            step()
            return result

        return wrapped

    for module, names in (
        (ranks, ("_resize", "_remove", "_excluding")),
        (install, ("assign", "mark_config", "set_record")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    stops = 0
    while True:
        calls, armed = 0, True
        try:
            hs.initialize_(model, Here())
        except Stop:
            assert same(picture(model), before), limit
            assert torch.equal(logits(model, batch), base)
            stops, limit = stops + 1, limit + 1
        else:
            break
    assert stops > 10
    assert not same(picture(model), before)
    assert targets_of(model)[Q0].r == 6
    assert not torch.equal(logits(model, batch), base) or method is Anchors


def test_a_failed_start_can_be_made_again(monkeypatch):
    from headstart.layers import adapters

    model, twin = wrap(tiny_llama()), wrap(tiny_llama())
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "install", lambda *given: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            hs.initialize_(model, Shares())
    for each in (model, twin):
        hs.initialize_(each, Shares())
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    assert model.peft_config["default"].to_dict() == twin.peft_config["default"].to_dict()


@pytest.mark.parametrize(
    ("given_ranks", "words"),
    [({Q0: 33}, "rank 33, more than its smaller side"), (dict.fromkeys([Q0], -1), None)],
)
def test_a_rank_that_a_layer_cant_have_is_refused(given_ranks, words):
    if words is None:  # no tensor has a negative side: nothing but all zeros is left to refuse
        given_ranks = dict.fromkeys(targets_of(wrap(tiny_llama())), 0)
        words = "left no layer with a rank above 0"

    class Wrong(Shares):
        given: ClassVar = given_ranks

    model = wrap(tiny_llama())
    before = picture(model)
    with pytest.raises(LayerError, match=words):
        hs.initialize_(model, Wrong())
    assert same(picture(model), before)


def test_a_method_that_shares_no_ranks_can_change_none():
    class Sneaky(Shares):
        shares_ranks: ClassVar = False

    model = wrap(tiny_llama())
    with pytest.raises(LayerError, match=rf"{Q0}.*\(7, 32\), not \(4, 32\)"):
        hs.initialize_(model, Sneaky())


def test_a_wrapped_model_is_refused():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = wrap(tiny_llama())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        with pytest.raises(LayerError, match="parameters of other ranks"):
            hs.initialize_(parallel, Shares())
    finally:
        dist.destroy_process_group()


names = st.lists(st.sampled_from("ab01"), min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, st.integers(1, 5), min_size=1, max_size=8))
def test_a_pattern_gives_every_layer_its_own_value(values):
    """Names that end like others are what PEFT's patterns get wrong."""
    pattern = exact_pattern(values, 2)
    read = {name: pattern.get(get_pattern_key(list(pattern), name), 2) for name in values}
    assert read == values


@pytest.mark.parametrize("exclude", [None, ["lm_head"], r".*layers\.0\.mlp\.up_proj"])
def test_layers_that_were_left_out_already_stay_so(exclude):
    targets = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
    model = wrap(tiny_llama(), target_modules=targets, exclude_modules=exclude)
    hs.initialize_(model, Shares())
    settings_now = {k: v for k, v in model.peft_config["default"].to_dict().items() if k in CARRIED}
    assert list(targets_of(wrap(tiny_llama(), **settings_now))) == list(targets_of(model))


def test_removing_a_layer_removes_no_other_that_ends_like_it():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("C", (), {"model_type": "twice"})()
            self.q = torch.nn.Linear(8, 8)
            self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "v": torch.nn.Linear(8, 8)})

    class NoQ(Shares):
        given: ClassVar = {"q": 0, "inner.v": 3}

    for exclude in (None, ["v"]):
        changes = dict(target_modules=["q", "v"], exclude_modules=exclude)
        model = wrap(Twice(), **changes)
        hs.initialize_(model, NoQ())
        assert "q" not in targets_of(model) and "inner.q" in targets_of(model)
        now = model.peft_config["default"]
        again = wrap(Twice(), target_modules=["q", "v"], exclude_modules=now.exclude_modules)
        assert list(targets_of(again)) == list(targets_of(model))
