"""What initialize_ refuses, naming layer or setting and changing nothing; layers that no gradient reaches."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import all_factors, perturb, started, tiny_llama, token_batch, wrap
from headstart.errors import HeadstartWarning
from snapshots import RANDOM, SUBTRACTING, refused, same, small, small_batch, targets_of

EVERY = ["init-ab", "lora", "pissa", "lora-one:samples=4"]


@pytest.mark.parametrize("method", EVERY)
def test_a_rank_over_the_smaller_side(method):
    match = r"model\.layers\.0\.self_attn\.v_proj.*rank 17.*16.*16 x 32"
    refused(wrap(tiny_llama(), r=17), hs.LayerError, match.replace("v_proj", "[kv]_proj"), method, data=[token_batch()])
    model = wrap(tiny_llama(), rank_pattern={"layers.1.self_attn.v_proj": 20})
    refused(model, hs.LayerError, r"model\.layers\.1\.self_attn\.v_proj.*rank 20.*16", method, data=[token_batch()])


@pytest.mark.parametrize("method", ["eva:samples=4", "lora-da:samples=4", "lora-xs"])
def test_what_an_embedding_cannot_give(method):
    model = wrap(tiny_llama(), target_modules=["q_proj", "embed_tokens"])
    refused(model, hs.LayerError, r"model\.embed_tokens' is an embedding, which method", method, data=[token_batch()])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_residual_weights_of_a_tied_head(target):
    model = wrap(tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", target])
    refused(model, hs.LayerError, rf"{target}.* shares its weight with .*tied", "pissa", form="residual")


def test_a_head_of_its_own_is_fine():
    report = hs.initialize_(wrap(tiny_llama(), target_modules=["lm_head"]), "pissa")
    assert [layer.name for layer in report.layers] == ["lm_head"]


@pytest.mark.parametrize("method", EVERY)
def test_a_merged_adapter(method):
    model = wrap(tiny_llama())
    model.merge_adapter()
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*merged.*unmerge", method, data=[token_batch()])
    model.unmerge_adapter()
    hs.initialize_(model, method, data=[token_batch()])


@pytest.mark.parametrize("method", EVERY)
def test_a_trained_adapter(method):
    model = wrap(tiny_llama())
    with torch.no_grad():
        targets_of(model)["model.layers.1.mlp.up_proj"].module.lora_B["default"].weight[0, 0] = 1e-6
    refused(model, hs.LayerError, r"model\.layers\.1\.mlp\.up_proj.*trained", method, data=[token_batch()])
    perturb(model)
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*trained", method, data=[token_batch()])


@pytest.mark.parametrize("start", [False, "pissa", "olora"])
def test_pefts_own_starts_that_are_not_zero(start):
    refused(wrap(tiny_llama(), init_lora_weights=start), hs.LayerError, r"q_proj.*not zero.*init_lora_weights=True")


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("first", ["lora", "orthogonal", "init-ab", "init-ab-plus", "pissa"])
@pytest.mark.parametrize("method", EVERY)
def test_an_initialised_adapter(method, first, form):
    model = started(tiny_llama(), first, form=form, target_modules=["q_proj"])
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*already init", method, data=[token_batch()])
    if form == "residual" and first in SUBTRACTING:
        return  # its base is spoilt; test_a_residual_base_is_not_started_from_again
    # The way out that the message gives.
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    hs.initialize_(model, method, adapter="default", data=[token_batch()])


def test_a_residual_base_is_not_started_from_again():
    model = started(tiny_llama(), "pissa", form="residual", target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refused(model, hs.LayerError, "made residual by adapter 'default'", adapter="second")
    again = get_peft_model(model.unload(), LoraConfig(r=2, target_modules=["q_proj"]))
    refused(again, hs.LayerError, "load the base model again")


def test_residual_weights_beside_another_adapter_are_refused():
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refused(model, hs.LayerError, "holds adapter 'second' as well", form="residual", adapter="default")


@pytest.mark.parametrize("method", ["init-ab", "pissa", "lora-ga:samples=4"])
def test_dora_with_a_start_that_is_subtracted(method):
    model = wrap(tiny_llama(), use_dora=True)
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*DoRA", method, data=[token_batch()])


def test_lora_bias():
    model = wrap(tiny_llama(), lora_bias=True, target_modules=["q_proj"])
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj.*lora_bias")


@pytest.mark.parametrize("method", EVERY)
def test_no_peft_at_all(method):
    for model in (tiny_llama(), nn.Linear(4, 4)):
        refused(model, hs.LayerError, "get_peft_model", method, data=[token_batch()])


def test_another_kind_of_adapter():
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    refused(model, hs.LayerError, "IA3Config")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize(
    "method",
    ["pissa", "milora", "olora", "inilora:solver=adam,steps=2", "inilora:solver=svd", "lora-one:samples=4", "lora-ga"],
)
def test_a_weight_that_is_not_finite_is_named(method, form, value):
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    match = r"model\.layers\.1\.mlp\.up_proj.*(NaN|infinity)"
    refused(wrap(base), hs.LayerError, match, method, data=[token_batch()], form=form)


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_a_weight_that_is_not_finite_is_named_by_draws_too(form):
    """The docstring of initialize_: a LayerError for NaN or infinity in weights, whatever the method."""
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    refused(wrap(base), hs.LayerError, r"model\.layers\.1\.mlp\.up_proj.*NaN", "init-ab", form=form)


def test_an_unknown_form():
    refused(wrap(tiny_llama()), hs.MethodError, r"form='subtracted'.*anchored.*residual", form="subtracted")


def test_an_unknown_method_or_setting():
    model = wrap(tiny_llama())
    refused(model, hs.MethodError, r"'pisa'.*'pissa'", "pisa")
    refused(model, hs.MethodError, r"'bta'.*'beta'", "init-ab:bta=3")


def test_a_class_in_place_of_a_method():
    """The likeliest slip: hs.PiSSA for hs.PiSSA()."""
    refused(wrap(tiny_llama()), hs.MethodError, "PiSSA", hs.PiSSA)


def test_an_unknown_adapter():
    refused(wrap(tiny_llama()), hs.LayerError, r"'defult'.*'default'", adapter="defult")


@pytest.mark.parametrize("method", ["lora-one", "lora-ga", "lora-da"])
def test_data_missing_or_empty(method):
    model = wrap(tiny_llama())
    refused(model, hs.DataError, rf"{method}.*data", method)
    refused(model, hs.DataError, "no sample", method, data=[])
    refused(model, hs.DataError, "no sample", method, data=iter(()))
    batch = token_batch()
    refused(model, hs.DataError, "no sample", method, data=[{key: value[:0] for key, value in batch.items()}])


def test_data_that_cannot_be_learned_from():
    model = wrap(tiny_llama())
    batch = token_batch()
    batch["labels"][1] = -100
    refused(model, hs.DataError, r"sample 1 ", "lora-one:samples=4", data=[batch])
    del batch["labels"]
    refused(model, hs.DataError, "labels", "lora-one:samples=4", data=[batch])


def test_several_active_adapters():
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    refused(model, hs.LayerError, r"default.*second.*adapter=")
    untouched = all_factors(model, "default")
    untouched = {name: (A.clone(), B.clone()) for name, (A, B) in untouched.items()}
    hs.initialize_(model, "init-ab", adapter="second")
    assert same(all_factors(model, "default"), untouched)
    assert all(B.any() for _, B in all_factors(model, "second").values())


def test_an_alpha_of_zero_names_the_layer():
    refused(wrap(tiny_llama(), lora_alpha=0), hs.LayerError, r"model\.layers\.0\.self_attn\.q_proj", "pissa")


def test_lora_ga_over_half_the_side_names_the_layer():
    model = wrap(tiny_llama(), r=9)
    refused(model, hs.LayerError, r"model\.layers\.0\.self_attn\.[kv]_proj.*at most 8", "lora-ga", data=[token_batch()])


def test_an_odd_rank_names_the_layer():
    model = wrap(tiny_llama(), rank_pattern={"layers.1.mlp.up_proj": 5})
    refused(model, hs.LayerError, r"model\.layers\.1\.mlp\.up_proj.*even", "orthogonal")


NO_FISHER = "lora-da:samples=4,fisher=none,variance=0"
FALLING_BACK = ["lora-one:samples=4", "lora-ga:samples=4", "lora-da:samples=4", NO_FISHER]


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", FALLING_BACK)
def test_layers_without_gradient_fall_back_and_are_named(method, form):
    plain, model = (small("used", "muted", "unused") for _ in range(2))
    hs.initialize_(plain, "lora")
    with pytest.warns(HeadstartWarning, match="no gradient"):
        report = hs.initialize_(model, method, data=[small_batch()], form=form)
    factors, of_lora = all_factors(model), all_factors(plain)
    for name in ("muted", "unused"):
        assert torch.equal(factors[name][0], of_lora[name][0])
        assert not factors[name][1].any()
    assert factors["used"][1].any()
    (warning,) = report.warnings
    assert "muted" in warning and "unused" in warning and "no gradient" in warning
    assert f"warning: {warning.partition(':')[0]}: " in str(report)
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["used"] == "" and "no gradient" in notes["muted"] and "no gradient" in notes["unused"]
    assert model(**small_batch())["loss"].isfinite()


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", FALLING_BACK)
def test_strict_refuses_a_layer_without_gradient(method, form):
    given = dict(data=[small_batch()], form=form, strict=True)
    for name in ("muted", "unused"):
        refused(small("used", name), hs.LayerError, rf"{name}.*no gradient", method, **given)
    # With gradients everywhere strict has nothing to refuse.
    assert hs.initialize_(small("used"), method, **given).warnings == []


def test_strict_does_not_mind_methods_without_data():
    for method in RANDOM:
        assert hs.initialize_(small("used", "unused"), method, strict=True).warnings == []
