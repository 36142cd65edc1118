"""Tiny models whose embeddings are adapted, and dense float64 oracles of what an adapter of them does."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call

from conftest import TEXT, class_batch, tiny_bert, tiny_llama, token_batch
from headstart.layers.anchored import anchors
from headstart.layers.factors import both
from headstart.layers.find import lora_layers
from oracles import samples_of


def tiny_gemma():
    """A Gemma, which multiplies its embeddings by the root of its width and has its head tied to them."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    widths = TEXT | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2)
    return GemmaForCausalLM(GemmaConfig(**widths, pad_token_id=0, tie_word_embeddings=True))


def tied_llama():
    return tiny_llama(tie_word_embeddings=True)


# By name: how the model is made, its batch, and the embeddings that are adapted; then a layer beside them.
MODELS = {
    "llama": (tiny_llama, token_batch, ["embed_tokens"]),
    "tied": (tied_llama, token_batch, ["embed_tokens"]),
    "gemma": (tiny_gemma, token_batch, ["embed_tokens"]),
    "bert": (tiny_bert, class_batch, ["word_embeddings", "position_embeddings"]),
}
BESIDE = {"llama": "q_proj", "tied": "q_proj", "gemma": "q_proj", "bert": "query"}


def base_of(name, dtype=torch.float32):
    """The model in evaluation mode; a padding token has a row of its own, as pretrained ones have."""
    model = MODELS[name][0]()
    torch.manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.5)
    return model.to(dtype).eval()


def embeddings(model, adapter="default"):
    """The adapted embeddings by name, as PEFT's layers."""
    return {
        t.name: t.module for t in lora_layers(model, adapter) if isinstance(t.module.get_base_layer(), nn.Embedding)
    }


def apart(base):
    """The model in float64, every parameter one of its own, so that a tied head is none of the embedding's business."""
    wide = copy.deepcopy(base).double()
    for module in wide.modules():
        if isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return wide


def update(module, adapter="default"):
    """What an adapter adds to its layer's weight as it is stored, in float64: s (B A - B0 A0)' of embeddings.

    Of a residual layer, whose weight has lost s B0 A0, that is the same of the untouched weight.
    """
    start = anchors(module, adapter)
    A, B = (part.detach().double() for part in both(module, adapter))
    if start is None:
        added = B @ A
    else:
        A0, B0 = (part.detach().double() for part in start)
        anchored = adapter in getattr(module, "lora_start_A", ())
        A, B = (A + A0, B + B0) if anchored else (A, B)
        added = B @ A - B0 @ A0
    added = module.scaling[adapter] * added
    return added.T if isinstance(module.get_base_layer(), nn.Embedding) else added


def dense_weights(model, base):
    """By the names of ``base``'s parameters, in float64: the weights with the adapter in them, as leaves."""
    wide = dict(base.named_parameters())
    return {
        f"{target.name}.weight": (wide[f"{target.name}.weight"].detach() + update(target.module)).requires_grad_(True)
        for target in lora_layers(model, "default")
    }


def dense_answers(base, weights, batch):
    """The logits, and the loss, of the float64 model with these weights."""
    outputs = functional_call(base, weights, kwargs=batch)
    return outputs.logits, outputs.loss


def exact_gradients(base, batch, names, *, two_sided=False):
    """By layer, the mean over samples of each sample's own gradient of the rows (tokens, d_out), read one at a time."""
    wide = apart(base)
    for sample in samples_of([batch], two_sided=two_sided):
        wide(**sample).loss.backward()
    return {name: wide.get_submodule(name).weight.grad / len(batch["labels"]) for name in names}
