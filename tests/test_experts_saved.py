"""Adapters of experts written and read: exports, checkpoints, and what PEFT and Transformers write themselves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import headstart as hs
from conftest import logits
from headstart.errors import CheckpointError
from headstart.layers.adapter import make_plain
from headstart.layers.checkpoint import read_adapter
from headstart.layers.core import form_of
from headstart.layers.export import write_plain
from headstart.layers.find import lora_layers
from headstart.layers.inspection import inspect_adapter
from mixtures import CONFIGS, EXPERTS, batch, find_again, moe, trained, wrapped

STARTS = {"anchored": ("pissa", {}), "residual": ("pissa", {"form": "residual"}), "kept": ("lora-one:samples=2", {})}


def started(kind, start, rslora=False):
    method, settings = STARTS[start]
    model = wrapped(moe(kind), use_rslora=rslora)
    hs.initialize_(model, method, data=[batch()] if start == "kept" else None, cache=False, **settings)
    return trained(model)


@pytest.mark.filterwarnings("ignore:.*no gradient reached")
@pytest.mark.parametrize(
    ("kind", "start", "rslora"),
    [(kind, start, False) for kind in CONFIGS for start in STARTS] + [("mixtral", start, True) for start in STARTS],
)
def test_what_is_exported_peft_loads_with_the_same_logits(kind, start, rslora, tmp_path):
    model = started(kind, start, rslora)
    expected = logits(model, batch())
    hs.save_lora(model, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(moe(kind), tmp_path / "plain")
    assert {type(module) for module in loaded.modules() if isinstance(module, ParamWrapper)} == {ParamWrapper}
    torch.testing.assert_close(logits(loaded, batch()), expected, rtol=1e-4, atol=1e-4)
    for target in lora_layers(loaded, "default"):
        assert target.r == (3 if start == "kept" else 6)
    # A rank that all of it fits into changes nothing; one that it doesn't loses what is said.
    assert hs.save_lora(model, tmp_path / "whole", rank=6) == pytest.approx(0, abs=1e-4)
    again = PeftModel.from_pretrained(moe(kind), tmp_path / "whole")
    torch.testing.assert_close(logits(again, batch()), expected, rtol=1e-3, atol=1e-3)
    lost = hs.save_lora(model, tmp_path / "less", rank=1)
    assert 0 < lost < 1


@pytest.mark.filterwarnings("ignore:.*no gradient reached")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "llama4"])
def test_checkpoints_come_back_and_go_on(kind, start, tmp_path):
    model = started(kind, start)
    expected = logits(model, batch())
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = hs.load_checkpoint(moe(kind), tmp_path / "checkpoint")
    loaded.eval()
    # What is subtracted anew is rounded anew.
    close = dict(rtol=1e-4, atol=1e-4) if start == "residual" else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded, batch()), expected, **close)
    torch.testing.assert_close(logits(trained(loaded), batch()), logits(trained(model), batch()), rtol=1e-3, atol=1e-3)
    other = moe(kind)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("down_proj") and parameter.ndim == 3:
                parameter += 0.1
    with pytest.raises(CheckpointError, match=r"another base model.*experts"):
        hs.load_checkpoint(other, tmp_path / "checkpoint")


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_pefts_own_saving_and_loading_keeps_anchors(kind, tmp_path):
    """As a trainer saves and resumes."""
    model = started(kind, "anchored")
    expected = logits(model, batch())
    model.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(moe(kind), tmp_path / "peft", is_trainable=True)
    torch.testing.assert_close(logits(loaded, batch()), expected, rtol=1e-5, atol=1e-5)
    into = started(kind, "anchored")
    into.load_adapter(tmp_path / "peft", "default", is_trainable=True)
    torch.testing.assert_close(logits(into, batch()), expected, rtol=1e-5, atol=1e-5)


def test_a_folder_is_exported_and_looked_into(tmp_path):
    model = started("mixtral", "anchored", rslora=True)
    expected = logits(model, batch())
    model.save_pretrained(tmp_path / "peft")  # without headstart.json
    saved = read_adapter(tmp_path / "peft")
    described = inspect_adapter(saved)
    names = [layer.name for layer in described.layers]
    assert "model.layers.1.mlp.experts.3.gate_up_proj" in names
    assert all(len(layer.singular_values) >= 6 and layer.r == 3 for layer in described.layers)
    plain = make_plain(saved.layers, saved.other_tensors, saved.config, None)
    write_plain(plain, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(moe("mixtral"), tmp_path / "plain")
    torch.testing.assert_close(logits(loaded, batch()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "lora-one:samples=4"])
def test_a_trainer_trains_saves_and_goes_on(method, tmp_path):
    def trainer(steps):
        rows = [{key: value[row] for key, value in batch(seed).items()} for seed in range(4) for row in range(2)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to=[],
            logging_steps=1,
            use_cpu=True,
        )
        made = Trainer(wrapped(moe("qwen3-moe")), arguments, train_dataset=rows)
        hs.initialize_(made.model, method, data=made)
        return made

    whole = trainer(4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    again = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


PLAIN = {
    "as given": dict(target_modules=["q_proj"]),
    "alone": dict(target_modules=[], target_parameters=["experts.down_proj"]),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True),
    "ranks": dict(target_modules=["q_proj"], rank_pattern={"experts.gate_up_proj": 2}),
    "all-linear": dict(target_modules="all-linear", target_parameters=None),
    "router": dict(target_modules=["q_proj"], target_parameters=["gate.weight"], alpha_pattern={"gate.weight": 60}),
}


@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"rank": None, "uniform": True}], ids=["", "rank 8", "uniform"])
@pytest.mark.parametrize("settings", PLAIN)
def test_an_adapter_that_peft_alone_wrote_is_read_right(settings, options, tmp_path):
    model = wrapped(moe("mixtral"), **PLAIN[settings])
    for target in lora_layers(model, "default"):
        torch.nn.init.normal_(target.module.lora_B["default"].weight, std=0.3)
    expected = logits(model, batch())
    model.save_pretrained(tmp_path / "peft")
    saved = read_adapter(tmp_path / "peft")
    ranks = {layer.name: layer.r for layer in inspect_adapter(saved).layers}
    assert ranks == {layer.name: layer.r for layer in find_again(model)}
    plain = make_plain(
        saved.layers, saved.other_tensors, saved.config, options.get("rank"), uniform="uniform" in options
    )
    assert plain.relative_error == pytest.approx(0, abs=1e-6)
    write_plain(plain, tmp_path / "plain")
    again = PeftModel.from_pretrained(moe("mixtral"), tmp_path / "plain")
    torch.testing.assert_close(logits(again, batch()), expected, rtol=1e-4, atol=1e-4)
    loaded = hs.load_checkpoint(moe("mixtral"), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(loaded, batch()), expected, rtol=1e-5, atol=1e-5)


def test_transformers_own_loading_keeps_anchors(tmp_path):
    model = started("mixtral", "anchored")
    expected = logits(model, batch())
    model.save_pretrained(tmp_path / "peft")
    base = moe("mixtral")
    config = LoraConfig.from_pretrained(tmp_path / "peft")
    inject_adapter_in_model(config, base, "default")
    set_peft_model_state_dict(base, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(base, batch()), expected, rtol=1e-5, atol=1e-5)
    forms = {form_of(target.module, "default") for target in lora_layers(base, "default")}
    assert forms == {"anchored"}


def test_adapters_are_added_beside_anchored_experts_and_deleted():
    model = started("mixtral", "anchored")
    expected = logits(model, batch())
    second = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS)
    model.add_adapter("second", second)
    for target in lora_layers(model, "second"):
        torch.nn.init.normal_(target.module.lora_B["second"].weight)
    torch.testing.assert_close(logits(model, batch()), expected)
    model.set_adapter("second")
    assert not torch.allclose(logits(model, batch()), expected)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, batch()), expected)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=3, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS))
    model.set_adapter("default")
    with model.disable_adapter():
        before = logits(model, batch())
    hs.initialize_(model, "pissa", adapter="default", cache=False)
    assert torch.equal(logits(model, batch()), before)
