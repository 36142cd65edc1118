"""What a model draws at random is off while data are read, that it is off is checked, and all is given back."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional

import headstart as hs
from conftest import tiny_bert, tiny_llama, token_batch, wrap
from headstart.errors import DataError
from headstart.layers.find import lora_layers
from headstart.methods.base import Wants
from headstart.statistics.prepare import prepare
from headstart.statistics.quiet import drawn_from, dropout_off
from oracles import exact_factors, relative
from passes import Tokens, collect, lora, named, whole_batch


def tiny_whisper():
    """Which drops layers and masks its spectrogram, as its config says, while it trains."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 32))}
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    chance = dict(encoder_layerdrop=0.5, decoder_layerdrop=0.5, dropout=0.3, apply_spec_augment=True)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    sizes = dict(vocab_size=97, d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=20)
    masks = dict(mask_time_prob=0.5, mask_time_length=2, mask_feature_prob=0.5, mask_feature_length=2)
    config = WhisperConfig(**sizes, **sides, **heads, **ids, **chance, **masks)
    return WhisperForConditionalGeneration(config)


def speech():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(3, 8, 40, generator=generator),
        "labels": torch.randint(3, 97, (3, 6), generator=generator),
    }


def state(model):
    """Every mode, rate and switch that modules and configs hold."""
    rates = {
        name: {k: v for k, v in vars(module).items() if isinstance(v, float | bool)}
        for name, module in model.named_modules()
    }
    return rates, model.config.to_dict()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_chance_that_a_config_names_is_off(checkpointed):
    base = tiny_whisper()
    exact = exact_factors(base, [speech()], ["model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc1"])
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "fc1"])
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    before = state(model)
    for seed in range(3):
        torch.manual_seed(seed)
        found = collect(model, [speech()], outputs=None)
        for name in exact:
            assert relative(found.gradients[name], exact[name].gradient) < 2e-5
    assert state(model) == before
    assert model.config.apply_spec_augment and model.config.encoder_layerdrop == 0.5


def test_nested_configs_are_off_and_given_back():
    model = tiny_bert()
    model.config.part = copy.deepcopy(model.config)
    model.config.part.part_dropout, model.config.part.jitter_noise = 0.4, 0.2
    with pytest.raises(KeyError), dropout_off(model):
        assert model.config.hidden_dropout_prob == model.config.part.part_dropout == model.config.part.jitter_noise == 0
        raise KeyError
    assert model.config.part.part_dropout == 0.4 and model.config.hidden_dropout_prob == 0.1


def test_normalisation_by_batch_stays_off_under_checkpointing():
    class Normed(nn.Module):
        def __init__(self, d=6):
            super().__init__()
            self.a, self.norm = nn.Linear(d, d), nn.BatchNorm1d(d)
            self.gradient_checkpointing = True

        def forward(self, x):
            return self.norm(self.a(x).transpose(1, 2)).transpose(1, 2)

    base = Tokens(Normed())
    found = collect(lora(base, ["body.a"]), [whole_batch()])
    base.body.gradient_checkpointing = False
    exact = exact_factors(base, [whole_batch()], ["body.a"])
    assert relative(found.gradients["body.a"], exact["body.a"].gradient) < 2e-5


class Noisy(nn.Module):
    """Draws at random whatever its mode."""

    def __init__(self, d=6):
        super().__init__()
        self.a = nn.Linear(d, d)

    def forward(self, x):
        return self.a(functional.dropout(x, 0.5)).tanh()


@pytest.mark.parametrize("size", [4, 1])
def test_a_model_that_stays_random_is_refused(size):
    model = lora(Tokens(Noisy()), ["body.a"])
    with pytest.raises(DataError, match=r"random in evaluation mode.*read twice.*sample 0"):
        hs.initialize_(model, f"lora-one:samples={size}", data=[whole_batch(size)], progress=False)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_a_random_loss_is_drawn_from_the_seed():
    """As diffusion's is: the same in every reading, whatever was drawn before; and what was drawn before goes on."""

    def loss(model, batch):
        noise = 1 + torch.rand(len(batch["input_ids"]), 1, 1)
        logits = model(**batch)["logits"] * noise
        return functional.cross_entropy(logits.transpose(1, 2), batch["labels"])

    base = Tokens(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    found = []
    for draw in (0, 1):
        torch.manual_seed(draw)
        after = torch.get_rng_state()
        found.append(collect(lora(base, ["body.0"]), [whole_batch()], outputs=None, loss=loss, seed=3))
        torch.set_rng_state(after)
    gradients = [each.gradients["body.0"] for each in found]
    assert torch.equal(*gradients)
    assert any("its draws follow from the seed" in note for note in found[0].notes)
    other = collect(lora(base, ["body.0"]), [whole_batch()], outputs=None, loss=loss, seed=4).gradients["body.0"]
    assert relative(other, gradients[0].double()) > 1e-3


def test_generators_are_given_back():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(KeyError), drawn_from(3):
        first = torch.rand(2), np.random.rand(), random.random()
        raise KeyError
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
    with drawn_from(3):
        assert torch.equal(first[0], torch.rand(2)) and first[1:] == (np.random.rand(), random.random())


def test_reading_leaves_generators_alone():
    model = wrap(tiny_llama())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    collect(model, [token_batch()])
    assert torch.equal(torch.rand(3), expected)


# Adapters.


def disturbed(model, adapter):
    """Give an adapter factors that change the model."""
    for target in lora_layers(model, adapter):
        for part in (target.module.lora_A, target.module.lora_B):
            nn.init.normal_(part[adapter].weight, std=0.5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"]], ids=["same layers", "other layers"])
def test_other_adapters_are_off_everywhere(targets):
    base = tiny_llama()
    exact = exact_factors(base, [token_batch()], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"])
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "v_proj"])
    model.add_adapter("trained", LoraConfig(r=2, target_modules=targets))
    disturbed(model, "trained")
    model.base_model.set_adapter(["default", "trained"])
    flags = [module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters")]
    report = hs.initialize_(model, "lora-one:samples=4", adapter="default", data=[token_batch()], progress=False)
    assert any("other adapters are active (trained): all were off" in sentence for sentence in report.warnings)
    assert flags == [module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters")]
    layers = {target.name: target.module for target in lora_layers(model, "default")}
    for name, expected in exact.items():
        U, _, _ = torch.linalg.svd(-expected.gradient)
        B = layers[name].lora_B["default"].weight.detach().double()
        inside = U[:, : B.shape[1]] @ (U[:, : B.shape[1]].T @ B)
        assert relative(inside, B) < 1e-3


def test_no_word_of_adapters_where_there_is_one():
    model = wrap(tiny_llama())
    layers = named(model)
    wanted = dict.fromkeys(layers, Wants(gradient=True))
    (found,) = prepare(model, layers, wanted, [token_batch()], 4, adapter="default").passes()
    assert found.notes == []
