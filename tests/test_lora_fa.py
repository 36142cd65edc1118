"""LoRA-FA with any start."""

from __future__ import annotations

import copy

import pytest
import torch

import headstart as hs
from conftest import logits, tiny_llama, token_batch, wrap
from headstart.layers.find import lora_layers


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("method", ["lora", "init-ab", "pissa", "lora-da:samples=4", "lora-one:samples=4"])
def test_only_B_trains_from_any_start(method, tmp_path):
    model = wrap(tiny_llama())
    hs.initialize_(model, method, data=[token_batch()], progress=False)
    start = logits(model.eval(), token_batch())
    count = hs.lora_fa_(model)
    assert torch.equal(logits(model, token_batch()), start)
    model.set_adapter("default")
    assert trained(model) and all("lora_B" in name for name in trained(model))
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = {t.name: t.module.lora_A["default"].weight.detach().clone() for t in lora_layers(model, "default")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = float(model(**token_batch()).loss.detach())
    for _ in range(4):
        optimizer.zero_grad()
        model(**token_batch()).loss.backward()
        optimizer.step()
    assert float(model(**token_batch()).loss.detach()) < first
    for target in lora_layers(model, "default"):
        assert torch.equal(target.module.lora_A["default"].weight, before[target.name])
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    again = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    assert torch.equal(logits(again.eval(), token_batch()), logits(model.eval(), token_batch()))


def test_what_means_nothing_is_refused():
    core = wrap(tiny_llama())
    hs.initialize_(core, "lora-xs", progress=False)
    with pytest.raises(hs.LayerError, match="trains a core alone"):
        hs.lora_fa_(core)
    zero = wrap(tiny_llama())
    hs.initialize_(zero, "init-b", progress=False)
    before = trained(zero)
    with pytest.raises(hs.LayerError, match="its A is zero"):
        hs.lora_fa_(zero)
    assert trained(zero) == before


def test_another_adapter_is_left_alone():
    model = wrap(tiny_llama())
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    hs.lora_fa_(model, "default")
    model.set_adapter("other")
    assert any("lora_A.other" in name for name in trained(model))
    model.set_adapter("default")
    assert all("lora_B.default" in name for name in trained(model))
