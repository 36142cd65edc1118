"""Programs that never heard of headstart, given a start's folder: they load it, and train what headstart trains."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import headstart as hs
from conftest import logits, started, tiny_llama, token_batch
from headstart.cli import main

RATE = 0.5
PROGRAM = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, start, steps = {folder!r}, {start!r}, {steps}
batch = load_file(folder + "/batch.safetensors")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), start, is_trainable=True)
assert "headstart" not in sys.modules
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr={rate})
made = []
for step in range(steps + 1):
    output = model(**batch)
    made.append(output.logits.detach().contiguous())
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
save_file(dict(zip("0123", made)), folder + "/made.safetensors")
"""


def by_headstart(model, batch, steps, rate=RATE):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    made = [logits(model, batch)]
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        made.append(logits(model, batch))
    return made


def without_it(fresh, folder, start, batch, steps, rate=RATE):
    tiny_llama().save_pretrained(folder / "base")
    save_file(batch, folder / "batch.safetensors")
    fresh.run(PROGRAM.format(folder=str(folder), start=str(start), steps=steps, rate=rate))
    return list(load_file(folder / "made.safetensors").values())


@pytest.mark.parametrize("method", ["init-ab-plus", "lora-one:samples=4"])
def test_a_kept_starts_folder_trains_there_as_here(method, tmp_path, fresh, batch):
    model = started(tiny_llama(), method, data=[token_batch()])
    hs.save_checkpoint(model, tmp_path / "start")
    expected = by_headstart(model, batch, 3)
    assert (expected[0] - logits(tiny_llama(), batch)).norm() > 1e-3 * expected[0].norm()
    for made, own in zip(without_it(fresh, tmp_path, tmp_path / "start", batch, 3), expected, strict=True):
        assert torch.allclose(made, own, atol=1e-5)


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_an_exported_start_begins_at_the_base_model_and_steps_as_here_but_for_what_is_of_second_order(
    form, tmp_path, fresh, batch
):
    model = started(tiny_llama(), "pissa", form=form)
    hs.save_checkpoint(model, tmp_path / "start")
    main(["export", str(tmp_path / "start"), "--out", str(tmp_path / "plain")])
    expected = by_headstart(model, batch, 1, rate=0.01)
    made = without_it(fresh, tmp_path, tmp_path / "plain", batch, 1, rate=0.01)
    base, moved = logits(tiny_llama(), batch), float((expected[1] - expected[0]).norm())
    assert float((made[0] - base).norm()) <= 1e-5 * float(base.norm())
    # B A - B0 A0 = dB A0 + B0 dA + dB dA, of which a plain adapter of twice the rank has the first two at once.
    assert float((made[1] - expected[1]).norm()) <= 3e-3 * moved


def test_an_anchored_starts_own_folder_is_refused_there_in_words(tmp_path, fresh, batch):
    hs.save_checkpoint(started(tiny_llama(), "pissa"), tmp_path / "start")
    with pytest.raises(AssertionError, match=r"make a plain LoRA with headstart\.save_lora"):
        without_it(fresh, tmp_path, tmp_path / "start", batch, 1)
