"""The gradient pass against autograd, one sample at a time, in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import headstart as hs
import passes
from conftest import ARCHITECTURES, class_batch, factors_of, tiny_gpt2, tiny_llama, tiny_mixtral, token_batch, wrap
from headstart.layers.find import lora_layers
from oracles import exact_gradients, relative

collect = functools.partial(passes.collect, outputs=None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_is_the_mean_of_each_samples_own(architecture):
    make, batch_of, targets = ARCHITECTURES[architecture]
    base = make()
    batches = [batch_of(seed=1), batch_of(seed=2)]
    model = wrap(copy.deepcopy(base), target_modules=targets)
    found = collect(model, batches, 8)
    expected = exact_gradients(base, batches, found.gradients)
    assert found.samples == 8
    for name, gradient in found.gradients.items():
        assert relative(gradient, expected[name]) < 2e-5, name


def test_batch_size_and_padding_do_not_matter():
    base = tiny_llama()
    batch = token_batch(6, 14)
    alone = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(6)]
    wider = {k: torch.nn.functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    results = [collect(wrap(copy.deepcopy(base)), data, 6).gradients for data in ([batch], alone, [wider])]
    for name in results[0]:
        for other in results[1:]:
            assert relative(other[name], results[0][name].double()) < 1e-5


def test_a_batch_is_not_weighted_by_tokens():
    """The batch's own loss weights long samples more; that is what must not happen."""
    base = tiny_llama()
    batch = token_batch(2, 20)
    batch["labels"][0, :17] = -100
    model = copy.deepcopy(base)
    naive = torch.autograd.grad(model(**batch).loss, model.model.layers[0].mlp.up_proj.weight)[0]
    found = collect(wrap(copy.deepcopy(base)), [batch], 2).gradients["model.layers.0.mlp.up_proj"]
    assert relative(found, naive.double()) > 0.05


def test_left_padding_without_positions_is_read_one_sample_at_a_time():
    """GPT-2 counts positions from the padding, so a padded batch differs from its samples: the probe must notice."""
    base = tiny_gpt2()
    batch = token_batch(4, 12)
    flipped = {k: v.flip(1) for k, v in batch.items()}
    model = wrap(copy.deepcopy(base), target_modules=["c_attn"])
    found = collect(model, [flipped], 4)
    assert any("one at a time" in note for note in found.notes)
    expected = exact_gradients(base, [flipped], found.gradients)
    for name, gradient in found.gradients.items():
        assert relative(gradient, expected[name]) < 2e-5


def test_mixture_of_experts_with_auxiliary_loss():
    """The auxiliary loss mixes the samples of a batch, so no weighting explains it: samples are read apart."""
    base = tiny_mixtral()
    batch = token_batch(4, 12)
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "v_proj"])
    found = collect(model, [batch], 4)
    expected = exact_gradients(base, [batch], found.gradients)
    for name, gradient in found.gradients.items():
        assert relative(gradient, expected[name]) < 2e-5


def test_samples_are_counted_not_batches():
    base = tiny_llama()
    batch = token_batch(6)
    found = collect(wrap(copy.deepcopy(base)), [batch] * 3, 4)
    expected = exact_gradients(base, [{k: v[:4] for k, v in batch.items()}], found.gradients)
    assert found.samples == 4
    assert found.tokens == int(batch["attention_mask"][:4].sum())
    for name, gradient in found.gradients.items():
        assert relative(gradient, expected[name]) < 2e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_dropout(reentrant):
    base = tiny_llama(attention_dropout=0.3)
    batch = token_batch()
    plain = collect(wrap(copy.deepcopy(base)), [batch], 4).gradients
    model = wrap(copy.deepcopy(base), lora_dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    checkpointed = collect(model, [batch], 4).gradients
    for name in plain:
        assert relative(checkpointed[name], plain[name].double()) < 1e-5
    assert model.training
    assert model.get_submodule("base_model.model.model.layers.0.self_attn").attention_dropout == 0.3


def test_offload_gives_the_same():
    base = tiny_llama()
    batch = token_batch()
    here = collect(wrap(copy.deepcopy(base)), [batch], 4).gradients
    there = collect(wrap(copy.deepcopy(base)), [batch], 4, offload="cpu").gradients
    for name in here:
        assert relative(there[name], here[name].double()) < 1e-6


def test_the_model_comes_back_as_it_was():
    model = wrap(tiny_llama(), lora_dropout=0.1, modules_to_save=["lm_head"])
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    before = {
        "modes": [module.training for module in model.modules()],
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: p.detach().clone() for name, p in model.named_parameters()},
    }
    hooks = [len(module._forward_hooks) for module in model.modules()]
    collect(model, [token_batch()], 4)
    assert [module.training for module in model.modules()] == before["modes"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before["grads"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before["values"][name]) for name, p in model.named_parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_half_precision_model_gives_float32_gradients():
    base = tiny_llama()
    exact = collect(wrap(copy.deepcopy(base)), [token_batch()], 4).gradients
    half = collect(wrap(copy.deepcopy(base).bfloat16()), [token_batch()], 4).gradients
    for name in exact:
        assert half[name].dtype == torch.float32
        assert relative(half[name], exact[name].double()) < 0.1


def test_a_dataset_with_a_collator():
    rows = [{"input_ids": list(range(1, 5 + i)), "labels": list(range(1, 5 + i))} for i in range(5)]

    def collate(items):
        width = max(len(item["input_ids"]) for item in items)
        return {
            "input_ids": torch.tensor([i["input_ids"] + [0] * (width - len(i["input_ids"])) for i in items]),
            "attention_mask": torch.tensor(
                [[1] * len(i["input_ids"]) + [0] * (width - len(i["input_ids"])) for i in items]
            ),
            "labels": torch.tensor([i["labels"] + [-100] * (width - len(i["labels"])) for i in items]),
        }

    base = tiny_llama()
    found = collect(wrap(copy.deepcopy(base)), rows, 5, collator=collate, batch_size=2)
    expected = exact_gradients(base, [collate(rows)], found.gradients)
    assert found.samples == 5
    for name, gradient in found.gradients.items():
        assert relative(gradient, expected[name]) < 2e-5


def test_the_verb_takes_a_dataset_as_trainers_do():
    datasets = pytest.importorskip("datasets")
    from transformers import default_data_collator

    batch = token_batch(6)
    rows = datasets.Dataset.from_list([{key: value[i].tolist() for key, value in batch.items()} for i in range(6)])
    models = [wrap(tiny_llama()) for _ in range(2)]
    report = hs.initialize_(models[0], "lora-one:samples=5", data=rows, collator=default_data_collator, batch_size=2)
    hs.initialize_(models[1], "lora-one:samples=5", data=[batch])
    assert report.samples == 5
    for mine, theirs in zip(*(lora_layers(model, "default") for model in models), strict=True):
        for found, expected in zip(factors_of(mine.module), factors_of(theirs.module), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_single_sample_is_no_batch():
    with pytest.raises(hs.DataError, match="give a collator"):
        collect(wrap(tiny_llama()), [{key: value[0] for key, value in token_batch().items()}], 4)


def test_a_label_in_first_place_only_is_named():
    batch = token_batch(3, padded=False)
    batch["labels"][1] = -100
    batch["labels"][1, 0] = 5
    with pytest.raises(hs.DataError, match="sample 1 has its only label in first place"):
        collect(wrap(tiny_llama()), [batch], 3)


def test_no_label_left_names_the_sample():
    batch = token_batch(4)
    batch["labels"][2] = -100
    with pytest.raises(hs.DataError, match="sample 6 has no label left"):
        collect(wrap(tiny_llama()), [token_batch(4), batch], 8)


def test_no_data():
    with pytest.raises(hs.DataError, match="holds no sample"):
        collect(wrap(tiny_llama()), [], 4)


def test_no_loss():
    batch = token_batch()
    del batch["labels"]
    with pytest.raises(hs.DataError, match="no loss"):
        collect(wrap(tiny_llama()), [batch], 4)


def test_not_a_batch():
    with pytest.raises(hs.DataError, match="mappings"):
        collect(wrap(tiny_llama()), ["text"], 4)


def test_nan_weight_names_the_layer():
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(hs.LayerError, match=r"layer 'model.layers.1.mlp.up_proj': its weight has NaN"):
        collect(wrap(base), [token_batch()], 4)


def test_infinite_loss_names_the_samples():
    batch = class_batch()
    base = ARCHITECTURES["bert"][0]()
    base.config.problem_type = "regression"
    base.num_labels = 1
    base.config.num_labels = 1
    base.classifier = torch.nn.Linear(32, 1)
    batch["labels"] = torch.tensor([0.0, 1.0, float("inf"), 0.0])
    with pytest.raises(hs.DataError, match="loss is inf on"):
        collect(wrap(base, target_modules=["query"]), [batch], 4)
