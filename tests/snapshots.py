"""What the tests of initialize_ share: all that it could leave behind in a model, and refusals that leave nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import token_batch
from headstart.layers.find import lora_layers, record
from inputs import normal
from known_layers import ZERO_PRODUCT

SUBTRACTING = ["init-ab", "inilora-alpha", "inilora-beta", "inilora:solver=adam,steps=3", "inilora:solver=svd", "pissa"]
SUBTRACTING += ["milora", "olora", "olora-tail", "geora", "loram"]
WITH_DATA = ["lora-ga:samples=4", "lora-one:samples=4"]
ALL = [*ZERO_PRODUCT, "rlpo", "rlmo", *SUBTRACTING, "init-ab-plus", *WITH_DATA]
RANDOM = [*ZERO_PRODUCT, "init-ab", "init-ab-plus", "inilora-alpha", "inilora-beta"]


def data_for(method):
    return [token_batch()] if "samples" in str(method) or method in ("lora-ga", "lora-one") else None


def targets_of(model, adapter="default"):
    return {target.name: target for target in lora_layers(model, adapter)}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(A, other[name][0]) and torch.equal(B, other[name][1]) for name, (A, B) in one.items()
    )


def dense_weight(target):
    W = target.module.get_base_layer().weight.detach().double()
    return W.T if getattr(target.module, "fan_in_fan_out", False) else W


def live_form(method, form):
    own = hs.methods.parse_method(method).form
    return form if own == "anchored" else own


def snapshot(model):
    """All that an initialisation could leave behind."""
    return {
        "parameters": {n: (p.detach().clone(), p.requires_grad, p.dtype) for n, p in model.named_parameters()},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in model.named_buffers()},
        "keys": sorted(model.state_dict()),
        "variants": {n: dict(m.lora_variant) for n, m in model.named_modules() if hasattr(m, "lora_variant")},
        "disabled": {n: m._disable_adapters for n, m in model.named_modules() if hasattr(m, "_disable_adapters")},
        "configs": {n: copy.deepcopy(c.to_dict()) for n, c in getattr(model, "peft_config", {}).items()},
        "modes": {n: m.training for n, m in model.named_modules() if "lora_start" not in n and "residual" not in n},
        "hooks": {
            n: len(m._forward_hooks) for n, m in model.named_modules() if "lora_start" not in n and "residual" not in n
        },
        "records": {n: record(t) for a in getattr(model, "peft_config", {}) for n, t in targets_of(model, a).items()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (value, flag, dtype) in before["parameters"].items():
        now = after["parameters"][name]
        assert torch.equal(torch.nan_to_num(now[0]), torch.nan_to_num(value)), name
        assert (now[1], now[2]) == (flag, dtype), name
    for name, value in before["buffers"].items():
        assert torch.equal(after["buffers"][name], value), name
    for part in ("identities", "keys", "variants", "disabled", "configs", "modes", "hooks", "records"):
        assert after[part] == before[part], part
    assert after["buffers"].keys() == before["buffers"].keys()
    assert all(p.grad is None for p in model.parameters())


def refused(model, error, match, method="init-ab", **given):
    """The error is raised, and nothing has changed."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        hs.initialize_(model, method, **given)
    assert_unchanged(model, before)


class Small(nn.Module):
    """A convolution, a linear layer that is used, one that is not, and one whose output counts for nothing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.used = nn.Linear(8, 6)
        self.unused = nn.Linear(8, 6)
        self.muted = nn.Linear(8, 6)

    def forward(self, x, labels):
        features = self.conv(x).mean((2, 3))
        scores = self.used(features) + 0 * self.muted(features)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def small(*targets, **settings):
    torch.manual_seed(0)
    return get_peft_model(Small(), LoraConfig(**(dict(r=2, lora_alpha=4, target_modules=list(targets)) | settings)))


def small_batch(size=4):
    return {"x": normal(size, 3, 6, 6).float(), "labels": torch.arange(size) % 6}
