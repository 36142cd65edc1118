"""Slow and plain, in float64: what the passes over data should find, one sample at a time, and what a rank can hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch


@dataclass
class Exact:
    """What the definition gives for one layer."""

    gradient: torch.Tensor | float = 0.0
    Z: torch.Tensor | float = 0.0
    Y: torch.Tensor | float = 0.0
    mean_input: torch.Tensor | float = 0.0
    mean_output: torch.Tensor | float = 0.0
    tokens: int = 0
    inputs: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)


def samples_of(batches, *, two_sided=False):
    """Yield each sample by itself, without its padding."""
    for batch in batches:
        for row in range(len(batch["labels"])):
            yield stripped({key: value[row : row + 1] for key, value in batch.items()}, two_sided=two_sided)


def stripped(one, *, two_sided=False):
    if "attention_mask" not in one:
        return one
    keep = one["attention_mask"][0].bool()
    width = len(keep)
    if not two_sided:
        return {k: v[:, keep] if v.dim() == 2 and v.shape[1] == width else v for k, v in one.items()}
    # Encoder and decoder have lengths of their own; labels pad the decoder with -100.
    found = {k: one[k][:, keep] for k in ("input_ids", "attention_mask")}
    mask = one.get("decoder_attention_mask", (one["labels"] != -100).long())
    end = int(mask[0].nonzero()[-1]) + 1
    return found | {k: v[:, :end] for k, v in one.items() if k not in found}


def is_real(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def reads_decoder(name):
    """Whether a layer of an encoder-decoder reads the decoder's tokens: not where it reads what the encoder gives."""
    of_encoder = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    return "encoder" not in name.split(".") and not name.endswith(of_encoder)


def exact_factors(base, batches, names, tokens="attention", loss=None):
    """Return by layer the definitions of METHODS, from one backward pass a sample in float64.

    Args:
        base: the model without an adapter.
        batches: of samples whose padding ``attention_mask`` tells.
        names: of its linear layers.
        tokens: "labels" means the positions that predict a label: of a causal model, the one before it. A decoder's
            tokens are those with a label also where it has no mask of its own: only labels tell its padding.
        loss: (model, sample) -> loss; the model's own by default.
    """
    model = copy.deepcopy(base).double().eval()
    two_sided = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    causal = any(word in type(base).__name__ for word in ("CausalLM", "LMHead"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    calls = []

    def hook_for(name):
        def hook(module, args, output):
            calls.append((name, args[0].detach().clone(), output))
            return output.clone()  # what follows may work in place

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(hook_for(name))
    found = {name: Exact() for name in names}
    weights = [model.get_submodule(name).weight for name in names]
    count = 0
    for one in samples_of(batches, two_sided=two_sided):
        one = {key: value.double() if is_real(value) else value for key, value in one.items()}
        calls.clear()
        own = model(**one)["loss"] if loss is None else loss(model, one)
        gradients = torch.autograd.grad(own, [*weights, *(output for _, _, output in calls)], allow_unused=True)
        for name, weight, gradient in zip(names, weights, gradients, strict=False):
            found[name].gradient += torch.zeros_like(weight) if gradient is None else gradient
        for (name, x, output), g in zip(calls, gradients[len(names) :], strict=True):
            g = torch.zeros_like(output) if g is None else g
            counting = None
            if two_sided and reads_decoder(name):
                counting = one.get("decoder_attention_mask") if tokens == "attention" else None
                counting = one["labels"] != -100 if counting is None else counting.bool()
            elif tokens == "labels" and not two_sided and x.dim() == 3 and x.shape[1] == one["labels"].shape[1]:
                counting = one["labels"] != -100
                if causal:
                    counting = torch.cat([counting[:, 1:], torch.zeros_like(counting[:, :1])], 1)
            if counting is not None:
                x, g = x[counting], g[counting]
            found[name].inputs.append(x.reshape(-1, x.shape[-1]))
            found[name].grads.append(g.reshape(-1, g.shape[-1]))
        count += 1
    for name, exact in found.items():
        exact.gradient = exact.gradient / count
        if type(model.get_submodule(name)).__name__ == "Conv1D":
            exact.gradient = exact.gradient.T
        if exact.inputs:
            x, g = torch.cat(exact.inputs), torch.cat(exact.grads)
            exact.tokens = len(x)
            exact.Z, exact.Y = x.T @ x / len(x), g.T @ g / len(g)
            exact.mean_input, exact.mean_output = x.mean(0), g.mean(0)
    return found


def exact_gradients(base, batches, names, loss=None):
    """Return by layer the mean over samples of the gradient of each sample's own loss."""
    return {name: exact.gradient for name, exact in exact_factors(base, batches, names, loss=loss).items()}


@torch.no_grad()
def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def best(W, r):
    """The best rank-r approximation of W, in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]


def tail(W, r):
    """Eckart-Young: the smallest squared error of any rank-r approximation."""
    return float(torch.linalg.svdvals(W.double())[r:].square().sum())


def published_adam(W, A0, B0, *, steps, lr, decay, decay_every):
    """IniLoRA's published loop on one matrix in its own dtype: autograd, torch's own Adam and schedule."""
    A, B = A0.clone().requires_grad_(), B0.clone().requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, decay_every, gamma=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (W - B @ A).square().mean().backward()
        optimizer.step()
        schedule.step()
    return A.detach(), B.detach()
