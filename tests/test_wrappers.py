"""Whatever stands around a model or its parts, a start is the same, and so is what is written and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import headstart as hs
from conftest import logits, perturb, tiny_llama, wrap
from headstart.layers.find import lora_layers
from headstart.layers.unwrap import looked_through, unwrapped

pytestmark = pytest.mark.usefixtures("process_group")


def tiny():
    return tiny_llama(num_hidden_layers=1)


def small():
    return wrap(tiny(), target_modules=["q_proj", "v_proj", "down_proj"])


def eager(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_base(model):
    model.base_model.model = eager(model.base_model.model)
    return model


def compiled_layers(model):
    layers = model.base_model.model.model.layers
    for place, layer in enumerate(layers):
        layers[place] = eager(layer)
    return model


def regional(model):
    return compile_regions(model, backend="eager")


def prepared(model):
    return Accelerator(cpu=True).prepare_model(model)


def unwrapped_by_accelerate(model):
    return Accelerator(cpu=True).unwrap_model(eager(DistributedDataParallel(model)))


WRAPPERS = {
    "none": lambda model: model,
    "torch.compile": eager,
    "model.compile": compiled_in_place,
    "compiled base": compiled_base,
    "compiled layers": compiled_layers,
    "regional": regional,
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "prepared": prepared,
    "unwrap_model": unwrapped_by_accelerate,
    "compile(DDP)": lambda model: eager(DistributedDataParallel(model)),
    "DDP(compile)": lambda model: DistributedDataParallel(eager(model)),
    "compile(DDP(compiled layers))": lambda model: eager(DistributedDataParallel(compiled_layers(model))),
}


@pytest.fixture(params=WRAPPERS)
def around(request):
    torch._dynamo.reset()
    return WRAPPERS[request.param]


def factors(model):
    with unwrapped(model) as inside:
        return {
            (target.name, which): getattr(target.module, which)["default"].weight.detach().clone()
            for target in lora_layers(inside, "default")
            for which in ("lora_A", "lora_B")
        }


def train(model, batch, steps=2):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model, batch):
    """Logits in the mode that it trains in, so that it isn't compiled for another one."""
    return model(**batch).logits.detach()


def same(found, expected):
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_a_start_and_what_is_saved_and_loaded_are_the_same_inside_a_wrapper(around, tmp_path, batch):
    alone, model = small(), around(small())
    reports = [hs.initialize_(each, "pissa", seed=3, progress=False) for each in (alone, model)]
    assert [layer.name for layer in reports[1].layers] == [layer.name for layer in reports[0].layers]
    expected, found = factors(alone), factors(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key

    train(model, batch)
    wanted = outputs(model, batch)
    hs.save_lora(model, tmp_path / "lora")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    Accelerator(cpu=True).unwrap_model(model, keep_torch_compile=False).save_pretrained(tmp_path / "peft")
    for name in ("lora", "checkpoint"):
        assert not [key for key in load_file(tmp_path / name / "adapter_model.safetensors") if "_orig_mod" in key]
        assert "_orig_mod" not in (tmp_path / name / "adapter_config.json").read_text()
    assert "_orig_mod" not in (tmp_path / "checkpoint" / "headstart.json").read_text()
    same(logits(PeftModel.from_pretrained(tiny(), tmp_path / "lora"), batch), wanted)
    for name in ("checkpoint", "peft"):
        same(logits(hs.load_checkpoint(tiny(), tmp_path / name), batch), wanted)
    assert torch.equal(outputs(model, batch), wanted)  # it is as it was

    # Into a model that was compiled for other values, or for layers without a start.
    train(model, batch)
    hs.load_checkpoint(model, tmp_path / "checkpoint")
    same(outputs(model, batch), wanted)
    hs.lora_fa_(model)
    with unwrapped(model) as inside:
        for target in lora_layers(inside, "default"):
            assert not target.module.lora_A["default"].weight.requires_grad


@pytest.mark.parametrize("wrapper", ["torch.compile", "compiled layers", "model.compile", "DDP"])
def test_gradients_are_measured_inside_a_wrapper(wrapper, batch):
    torch._dynamo.reset()
    models = [small(), WRAPPERS[wrapper](small())]
    for model in models:
        hs.initialize_(model, "lora-ga:samples=4", data=[batch], progress=False)
    expected, found = map(factors, models)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_an_anchored_checkpoint_is_loaded_into_a_compiled_model_without_a_start(tmp_path, batch):
    torch._dynamo.reset()
    first, model = small(), eager(compiled_layers(small()))
    hs.initialize_(first, "pissa", progress=False)
    perturb(first)
    hs.save_checkpoint(first, tmp_path / "c")
    logits(model, batch)
    hs.load_checkpoint(model, tmp_path / "c")
    same(logits(model, batch), logits(first, batch))


@pytest.mark.parametrize("compiled", ["base", "layers"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "all-linear"])
def test_what_was_compiled_before_peft_wrapped_it(targets, compiled, tmp_path, batch):
    """PEFT then takes the wrappers' names for the layers', in its config as well."""
    torch._dynamo.reset()

    def base():
        model = tiny()
        if compiled == "base":
            return eager(model)
        model.model.layers[0] = eager(model.model.layers[0])
        return model

    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    wanted = logits(model, batch)
    hs.save_lora(model, tmp_path / "lora")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "peft")
    same(logits(PeftModel.from_pretrained(tiny(), tmp_path / "lora"), batch), wanted)
    for name in ("checkpoint", "peft"):
        same(logits(hs.load_checkpoint(tiny(), tmp_path / name), batch), wanted)
    same(logits(hs.load_checkpoint(base(), tmp_path / "checkpoint"), batch), wanted)
    assert not [file for file in (tmp_path / "checkpoint").iterdir() if b"_orig_mod" in file.read_bytes()]
    assert not [file for file in (tmp_path / "lora").iterdir() if b"_orig_mod" in file.read_bytes()]


def test_a_core_comes_before_ddp_and_may_come_into_the_others(batch):
    for around in (eager, DataParallel, compiled_layers):
        hs.initialize_(around(small()), "lora-xs", progress=False)
    for around in (WRAPPERS["DDP"], WRAPPERS["compile(DDP)"]):
        with pytest.raises(hs.LayerError, match="before it is wrapped"):
            hs.initialize_(around(small()), "lora-xs", progress=False)


class Counting(nn.Module):
    """A module that says whether it is compiled."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.compiled = []

    def forward(self, x):
        self.compiled.append(torch.compiler.is_compiling())
        return self.inner(x)


def test_within_the_block_nothing_is_compiled_and_after_it_everything_is():
    torch._dynamo.reset()
    part, alone = Counting(), Counting()
    alone.compile(backend="eager")
    model = nn.Sequential(eager(part), alone)
    parts, call = list(model), alone._compiled_call_impl
    with pytest.raises(KeyboardInterrupt), unwrapped(DataParallel(model)) as inside:
        assert inside is model
        assert list(model) == [part, alone]
        assert len(looked_through()) == 1
        model(torch.ones(1, 2))
        raise KeyboardInterrupt
    assert looked_through() == ()
    assert part.compiled == alone.compiled == [False]
    assert list(model) == parts
    assert alone._compiled_call_impl is call


def test_what_is_no_module_is_left_to_others():
    with unwrapped("a name") as found:
        assert found == "a name"


def test_a_wrapped_model_can_be_copied_and_both_can_be_saved(tmp_path):
    model = compiled_layers(small())
    hs.initialize_(model, "lora", progress=False)
    hs.save_lora(copy.deepcopy(model), tmp_path / "copy")
    hs.save_lora(model, tmp_path / "model")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("copy", "model"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
