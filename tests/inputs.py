"""Slow oracles in float64 for starts from a layer's inputs: the inputs themselves, their moments, their directions."""

from __future__ import annotations

import torch

from headstart.layers.find import lora_layers
from headstart.layers.weights import dense
from headstart.methods.base import Kronecker, Layer

NAME = "model.layers.0.self_attn.q_proj"


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs_of(tokens, d_in, *, decades=1.0, offset=0.5, seed=0):
    """Tokens (tokens, d_in) whose directions are a random rotation, with deviations over some decades, off centre."""
    rotation = torch.linalg.qr(normal(d_in, d_in, seed=seed)).Q
    deviations = torch.logspace(0, -decades, d_in, dtype=torch.float64)
    return normal(tokens, d_in, seed=seed + 1) * deviations @ rotation.T + offset * normal(d_in, seed=seed + 2)


def moments(x):
    """The Kronecker factors' inputs side of tokens (n, d_in), as a pass over data gives it."""
    x = x.double()
    return Kronecker(
        inputs=(x.T @ x / len(x)).float(), outputs=None, mean_input=x.mean(0).float(), mean_output=None, tokens=len(x)
    )


def layer_of(x, W, r, *, s=1.0, **given):
    """A layer that reads x (n, d_in), with the weight W (d_out, d_in)."""
    known = dict(name=NAME, d_out=W.shape[0], d_in=W.shape[1], r=r, scaling=s, weight=W.float(), kronecker=moments(x))
    return Layer(**(known | given))


def leading_components(x, r):
    """The r leading principal components of tokens, as columns, and all variances in descending order."""
    centred = x.double() - x.double().mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    variances = S.square() / len(x)
    return Vh[:r].T, torch.cat((variances, variances.new_zeros(x.shape[1] - len(variances))))


def worst_angle(one, other):
    """The sine of the largest principal angle between the column spaces of two matrices of one rank."""
    one, other = (torch.linalg.qr(each.double()).Q for each in (one, other))
    return float(torch.linalg.matrix_norm(other - one @ (one.T @ other), ord=2))


def product(factors, s=1.0):
    return s * factors.B.double() @ factors.A.double()


@torch.no_grad()
def inputs_by_layer(model, batches, *, tokens="attention"):
    """What each LoRA layer of a model reads at the base model, by name: the tokens that count, (n, d_in) in float64.

    Args:
        model: a causal language model with an adapter.
        batches: of token ids, with an attention mask.
        tokens: "attention"; "labels", those that predict one; or "own labels", those that have one.
    """
    seen = {}
    targets = list(lora_layers(model, "default"))
    mask = None

    def hook_for(name):
        def hook(module, args):
            seen.setdefault(name, []).append(args[0][mask].double())

        return hook

    handles = [target.module.get_base_layer().register_forward_pre_hook(hook_for(target.name)) for target in targets]
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            for batch in batches:
                mask = _counting(batch, tokens)
                model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _counting(batch, tokens):
    if tokens == "attention":
        return batch["attention_mask"].bool()
    labelled = batch["labels"] != -100
    if tokens == "own labels":
        return labelled
    return torch.nn.functional.pad(labelled[:, 1:], (0, 1))


def layers_of(model, batches, *, tokens="attention"):
    """The layers of a model with all that a start from inputs may know of them."""
    read = inputs_by_layer(model, batches, tokens=tokens)
    return {
        target.name: layer_of(read[target.name], target.weight(), target.r, s=target.scaling, name=target.name)
        for target in lora_layers(model, "default")
    }


def weights(model):
    return {target.name: dense(target.module.get_base_layer()).clone() for target in lora_layers(model, "default")}
