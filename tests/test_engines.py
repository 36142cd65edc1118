"""Engines that hook modules: FSDP1 and FSDP2, accelerate's offloading, opacus; each the real thing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import logits, perturb, started, tiny_llama, token_batch, wrap
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers
from test_processes import together

FORMS = {"kept": "init-ab-plus", "anchored": "pissa", "core": "lora-xs:std=0.5"}


def moved(form, **changes):
    model = started(tiny_llama(), FORMS[form], target_modules=["q_proj", "v_proj"], **changes)
    if form == "core":
        with torch.no_grad():
            for target in lora_layers(model, "default"):
                core_of(target.module, "default").add_(0.1)
    else:
        perturb(model)
    return model.eval()


# FSDP1, wrapped as Trainer wraps a PEFT model.


def fsdp1(rank):
    """Each form, with original parameters and without: the logits, and what one step of SGD makes of them."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    batch, found = token_batch(), {}
    for form in FORMS:
        for original in (False, True):
            model = moved(form)
            policy = fsdp_auto_wrap_policy(model)
            sharded = FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
            )
            with torch.no_grad():
                before = sharded(**batch).logits
            optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
            sharded(**batch).loss.backward()
            optimizer.step()
            with torch.no_grad():
                found[form, original] = before, sharded(**batch).logits
    return found


def stepped(model, batch):
    before = logits(model, batch)
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return before, logits(model, batch)


def test_fsdp1_with_the_policy_of_a_trainer(tmp_path):
    for found in together(tmp_path, fsdp1):
        for (form, original), sides in found.items():
            expected = stepped(moved(form), token_batch())
            for here, there in zip(sides, expected, strict=True):
                assert torch.allclose(here, there, atol=1e-5), (form, original)
            assert not torch.allclose(*sides, atol=1e-4)


# FSDP2 around the adapter's own modules.


UNITS = ("layer", "factor")


def shard(model, unit):
    from torch.distributed.fsdp import fully_shard

    for target in lora_layers(model, "default"):
        parts = [target.module]
        if unit == "factor":
            parts = [
                m
                for name, m in target.module.named_modules()
                if name.endswith(".default") and any(True for _ in m.parameters())
            ]
        for part in parts:
            fully_shard(part)
    return model


def fsdp2(rank):
    batch, found = token_batch(), {}
    for form in FORMS:
        for unit in UNITS:
            found[form, unit] = stepped(shard(moved(form), unit), batch)
    return {key: tuple(side.clone() for side in sides) for key, sides in found.items()}


def test_fsdp2_around_layers_or_single_factors(tmp_path):
    for found in together(tmp_path, fsdp2):
        for (form, unit), sides in found.items():
            for here, there in zip(sides, stepped(moved(form), token_batch()), strict=True):
                assert torch.allclose(here, there, atol=1e-5), (form, unit)


# The same before the start: around layers or single factors, methods of weights alone and of gradients.
INSIDE = [
    *((method, "anchored", unit) for method in ("init-ab-plus", "pissa", "lora-one:samples=4") for unit in UNITS),
    ("pissa", "residual", "factor"),
]
# Those that make or change what is sharded already come before it.
TOO_LATE = [
    *((method, "anchored", unit) for method in ("lora-xs", "lora-sb:samples=4", "eva:samples=4") for unit in UNITS),
    ("pissa", "residual", "layer"),
]


def begun(method, form, unit=None):
    model = wrap(tiny_llama(), target_modules=["q_proj", "v_proj"]).eval()
    if unit is not None:
        shard(model, unit)
    hs.initialize_(model, method, form=form, data=[token_batch()], progress=False)
    return model


def inside_fsdp2(rank):
    found, refused = {}, {}
    for case in INSIDE:
        model = begun(*case)
        assert all(hasattr(p, "full_tensor") for p in model.parameters() if p.requires_grad)
        found[case] = tuple(side.clone() for side in stepped(model, token_batch()))
    for case in TOO_LATE:
        with pytest.raises(hs.LayerError) as error:
            begun(*case)
        refused[case] = str(error.value)
    return found, refused


def test_a_start_inside_fsdp2_around_layers_or_single_factors(tmp_path):
    for found, refused in together(tmp_path, inside_fsdp2):
        for method, form, unit in INSIDE:
            sides = found[method, form, unit]
            for here, there in zip(sides, stepped(begun(method, form), token_batch()), strict=True):
                assert torch.allclose(here, there, atol=1e-5), (method, form, unit)
            assert not torch.allclose(*sides, atol=1e-4)
        for (_, form, _), words in refused.items():
            assert ("initialise before fully_shard" if form == "residual" else "before it is wrapped") in words


# Accelerate.


def offloaded(model, way, folder):
    from accelerate import cpu_offload, disk_offload, dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module

    if way == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif way == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    elif way == "dispatch":
        places = {name: "cpu" for name, _ in model.named_children()}
        dispatch_model(model, places | {"base_model": "disk"}, main_device="cpu", offload_dir=str(folder))
    else:
        for module in model.modules():
            if not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
                add_hook_to_module(module, ModelHook())
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["cpu", "disk", "dispatch", "hook"])
def test_accelerates_hooks_made_after_the_start(way, form, tmp_path):
    model, batch = moved(form), token_batch()
    expected = logits(model, batch)
    assert torch.allclose(logits(offloaded(model, way, tmp_path), batch), expected, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_accelerates_hooks_made_before_the_start(form, tmp_path, batch):
    expected = logits(started(tiny_llama(), FORMS[form]), batch)
    model = offloaded(wrap(tiny_llama()), "hook", tmp_path)
    hs.initialize_(model, FORMS[form], progress=False)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)


@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("form", FORMS)
def test_factors_that_are_offloaded_already_are_refused(way, form, tmp_path):
    model = offloaded(wrap(tiny_llama()), way, tmp_path)
    with pytest.raises(hs.LayerError, match=r"q_proj.*keeps the factors.*elsewhere.*before cpu_offload"):
        hs.initialize_(model, FORMS[form], progress=False)


# Opacus: a gradient for each sample, from what its hooks on single modules see.


@pytest.mark.parametrize("form", FORMS)
def test_per_sample_gradients_of_opacus(form):
    opacus = pytest.importorskip("opacus")

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    model = get_peft_model(plain, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]))
    hs.initialize_(model, FORMS[form], progress=False)
    if form != "core":
        perturb(model)
    x, y = torch.randn(5, 12), torch.randint(0, 3, (5,))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = {name: [] for name in names}
    for row in range(5):
        twin = copy.deepcopy(model)
        nn.functional.cross_entropy(twin(x[row : row + 1]), y[row : row + 1]).backward()
        for name in names:
            expected[name].append(twin.get_parameter(name).grad)
    watched = opacus.GradSampleModule(model, loss_reduction="mean")
    nn.functional.cross_entropy(watched(x), y).backward()
    for name in names:
        found = model.get_parameter(name).grad_sample
        assert torch.allclose(found, torch.stack(expected[name]), atol=1e-5), name


# A start comes before them, where they hide the layers.


def inside_fsdp1(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(wrap(tiny_llama()), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(
        hs.LayerError, match=r"sharded by FSDP1 or DeepSpeed.*initialise it before that, load what headstart init"
    ):
        hs.initialize_(sharded, "pissa", progress=False)
    return True


def test_a_start_inside_fsdp1_is_refused(tmp_path):
    assert all(together(tmp_path, inside_fsdp1))


def test_a_start_inside_deepspeed_is_refused():
    model = wrap(tiny_llama())
    next(model.parameters()).ds_id = 0  # what ZeRO-3 puts on each parameter
    with pytest.raises(hs.LayerError, match="sharded by FSDP1 or DeepSpeed"):
        hs.initialize_(model, "pissa", progress=False)
