"""LoRA-DA on attention or on the rest alone: how layers are told apart by name, and how those left out start."""

from __future__ import annotations

import warnings

import pytest
import torch

import headstart as hs
from conftest import ARCHITECTURES, all_factors, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit, wrap
from fisher import ATTENTION, FEED_FORWARD, layer_named, linear
from headstart.errors import HeadstartWarning
from headstart.methods.base import Layer
from oracles import relative

# By the part of the name that says it: written by hand from the architectures' papers.
PARTS = {
    "llama": (tiny_llama, (".self_attn.",), (".mlp.",)),
    "gpt2": (tiny_gpt2, (".attn.",), (".mlp.",)),
    "t5": (tiny_t5, (".SelfAttention.", ".EncDecAttention."), (".DenseReluDense.",)),
    "bert": (tiny_bert, (".attention.self.", ".attention.output."), (".intermediate.", ".0.output.", ".1.output.")),
    "vit": (tiny_vit, (".attention.",), (".mlp.",)),
    "mixtral": (lambda: tiny_mixtral(num_hidden_layers=2), (".self_attn.",), ()),
}


@pytest.mark.parametrize("architecture", PARTS)
def test_real_names_are_sorted_into_attention_and_the_rest(architecture):
    make, attention, feed_forward = PARTS[architecture]
    seen = 0
    for name, _ in linear(make()):
        kinds = [any(part in name for part in parts) for parts in (attention, feed_forward)]
        if not any(kinds):
            # Heads and poolers are no attention either.
            assert name.rpartition(".")[2] in ("lm_head", "classifier", "dense"), name
        assert not all(kinds)
        seen += kinds[0]
        assert (hs.LoRADA(layers="attention").wants(layer_named(name)).data) == kinds[0], name
        assert (hs.LoRADA(layers="feed-forward").wants(layer_named(name)).data) == (not kinds[0]), name
        assert hs.LoRADA().wants(layer_named(name)).data
    assert seen >= 4


MORE_NAMES = {
    "transformer.h.0.self_attention.query_key_value": True,
    "model.decoder.layers.0.self_attn.out_proj": True,
    "model.decoder.layers.0.encoder_attn.k_proj": True,
    "model.decoder.layers.0.fc1": False,
    "transformer.blocks.0.attn.Wqkv": True,
    "transformer.blocks.0.ffn.up_proj": False,
    "model.layers.0.block_sparse_moe.experts.3.w1": False,
    "model.layers.0.block_sparse_moe.gate": False,
    "model.layers.3.mlp.experts.7.down_proj": False,
    "model.layers.0.mlp.gate_up_proj": False,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": True,
    "distilbert.transformer.layer.0.attention.q_lin": True,
    "distilbert.transformer.layer.0.ffn.lin1": False,
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output": False,
    "q_proj": True,
    "up_proj": False,
}
LOOK_ALIKES = {
    "roberta_head.classifier.out_proj": False,
    "rwkv.blocks.0.feed_forward.key": False,
    "rwkv.blocks.0.feed_forward.value": False,
    "backbone.layers.0.mixer.out_proj": False,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": False,
}


@pytest.mark.parametrize(("name", "attention"), [*MORE_NAMES.items(), *LOOK_ALIKES.items()])
def test_names_of_other_architectures(name, attention):
    assert (hs.LoRADA(layers="attention").wants(layer_named(name)).data) == attention


@pytest.mark.parametrize("options", [{}, dict(fisher="none", variance=0)])
@pytest.mark.parametrize(("layers", "left_out"), [("attention", FEED_FORWARD), ("feed-forward", ATTENTION)])
def test_layers_left_out_start_as_lora_does(layers, left_out, options):
    bare = Layer(name=left_out, d_out=6, d_in=8, r=2, scaling=1.0, seed=3)
    start, plain = hs.LoRADA(layers=layers, **options).factors(bare), hs.LoRA().factors(bare)
    assert torch.equal(start.A, plain.A) and torch.equal(start.B, plain.B)
    assert start.note == start.repair == ""


@pytest.mark.parametrize("layers", ["attention", "feed-forward"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_verb_with_layers_left_out(architecture, layers):
    make, batch_of, targets = ARCHITECTURES[architecture]
    parts = PARTS[architecture][1]
    models = {}
    methods = {"lora": "lora", "all": hs.LoRADA(samples=4), "some": hs.LoRADA(samples=4, layers=layers)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        for name, method in methods.items():
            models[name] = wrap(make(), target_modules=targets)
            data = None if name == "lora" else [batch_of()]
            report = hs.initialize_(models[name], method, data=data, seed=5)
    factors = {name: all_factors(model) for name, model in models.items()}
    assert all(layer.note == "" for layer in report.layers)
    count = 0
    for name, (A, B) in factors["some"].items():
        chosen = any(part in name for part in parts) == (layers == "attention")
        other = factors["all" if chosen else "lora"][name]
        assert relative(A, other[0]) < 1e-3 if chosen else torch.equal(A, other[0]), name
        assert B.any() == chosen
        count += chosen
    assert 0 < count < len(factors["some"])
