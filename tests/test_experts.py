"""Starts for experts that a mixture holds in one tensor, and for routers: forms, layers and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import headstart as hs
from conftest import logits
from headstart.advise.costs import measured
from headstart.cli import main
from headstart.errors import LayerError
from headstart.layers.adapters import find
from headstart.layers.experts import ExpertLayer
from headstart.layers.stacks import laid_together, taken_apart
from headstart.methods import method_class
from headstart.monitor.monitor import sampled
from headstart.runs.stages import execute
from mixtures import COMMON, CONFIGS, EXPERTS, batch, find_again, moe, parts, stacks, wrapped
from running import small_run, sums, tokenizer


def matrices(module):
    """Each expert's W (d_out, d_in) as PEFT takes it, in float64."""
    parameter = module.get_param().detach().double()
    return parameter if module._did_swap_in_out_features else parameter.mT


@pytest.mark.parametrize("kind", CONFIGS)
def test_layouts_are_pefts_own(kind):
    model = wrapped(moe(kind))
    for stack in stacks(model).values():
        module = stack.module
        torch.nn.init.normal_(module.lora_B["default"].weight)
        A, B = parts(module)
        expected = module.get_delta_weight("default").double()
        product = module.scaling["default"] * B.double() @ A.double()
        torch.testing.assert_close(product if module._did_swap_in_out_features else product.mT, expected)
        again = laid_together(list(A), list(B))
        assert torch.equal(again[0], module.lora_A["default"].weight)
        assert torch.equal(again[1], module.lora_B["default"].weight)


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_pissa_of_every_expert_is_that_of_its_matrix(kind, form):
    model = wrapped(moe(kind))
    weights = {name: matrices(stack.module) for name, stack in stacks(model).items()}
    layers = {name: stack.module for name, stack in stacks(model).items()}
    before = logits(model, batch())
    report = hs.initialize_(model, "pissa", form=form, cache=False)
    for name, module in layers.items():
        s = module.scaling["default"]
        if form == "anchored":
            A, B = taken_apart(
                module.lora_start_A["default"].weight, module.lora_start_B["default"].weight, module.num_experts
            )
        else:
            A, B = parts(module)
        for expert, W in enumerate(weights[name]):
            U, S, Vh = torch.linalg.svd(W)
            best = (U[:, :3] * S[:3]) @ Vh[:3]
            torch.testing.assert_close(s * B[expert].double() @ A[expert].double(), best, rtol=1e-5, atol=1e-6)
    after = logits(model, batch())
    if form == "anchored":
        assert torch.equal(before, after)
    else:
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    experts = [layer for layer in report.layers if "experts" in layer.name]
    assert {layer.name.split(".")[-1] for layer in experts} == {"gate_up_proj", "down_proj"}
    assert not any(name.endswith(".experts") for name in report.left_out.experts)  # shared ones are linear layers


WEIGHT_ONLY = ["lora", "init-ab", "pissa", "olora", "milora", "inilora", "mica", "rlpo", "olora-tail", "geora", "loram"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_training_and_merging(method, dtype):
    """A trained start computes what PEFT's own merge of it does, and the base comes back when it is taken out."""
    model = wrapped(moe("qwen3-moe", dtype))
    base = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    before = logits(model, batch())
    hs.initialize_(model, method, cache=False)
    assert torch.equal(logits(model, batch()), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = logits(model, batch())
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), before)
    merged = copy.deepcopy(model).merge_and_unload()
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.1)
    torch.testing.assert_close(logits(merged, batch()).float(), trained.float(), **tolerance)
    model.merge_adapter()
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        if name in base:
            torch.testing.assert_close(value, base[name], rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-6)


def test_routers_start_as_matrices():
    model = wrapped(moe("mixtral"), target_modules="all-linear", target_parameters=None)
    names = [layer.name for layer in find(model, None).layers]
    assert "model.layers.0.mlp.gate" in names
    assert "model.layers.1.mlp.experts.3.down_proj" in names
    before = logits(model, batch())
    hs.initialize_(model, "pissa", cache=False)
    assert torch.equal(logits(model, batch()), before)


def test_experts_without_values_are_named():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    model = wrapped(model, target_modules=[])
    with pytest.raises(LayerError, match=r"experts.*(no values|meta device)"):
        hs.initialize_(model, "lora")


REFUSED = [("mixtral", name) for name in ("lora-xs", "gora", "lora-one:scale=search", "eva")]
REFUSED += [("llama4", name) for name in ("corda", "lora-da", "eva")]  # whose experts' function can't be chosen


@pytest.mark.parametrize(("kind", "method"), REFUSED)
def test_what_experts_cannot_give_is_refused(kind, method):
    model = wrapped(moe(kind))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LayerError, match=r"experts\.0\.down_proj' is a matrix in a parameter.*PerLayer"):
        hs.initialize_(model, method, data=[batch()])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_different_starts_for_experts_and_attention():
    model = wrapped(moe("qwen3-moe"))
    report = hs.initialize_(model, hs.PerLayer({"experts.*": hs.PiSSA(), "*": hs.OLoRA()}), cache=False)
    assert {layer.method for layer in report.layers if "experts" in layer.name} == {"pissa"}
    assert {layer.method for layer in report.layers if "self_attn" in layer.name} == {"olora"}


def test_what_is_left_out_of_a_mixture_is_named():
    report = hs.initialize_(wrapped(moe("mixtral"), target_parameters=None), "lora", progress=False)
    assert report.left_out.experts == {"model.layers.mlp.experts": 2 * 4 * (48 * 32 + 32 * 24)}
    assert report.left_out.routers == {"model.layers.mlp.gate": 2 * 4 * 32}
    assert "18,432 of experts (model.layers.mlp.experts) and 256 of routers (model.layers.mlp.gate)" in str(
        report.left_out
    )


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_ranks_for_which_experts_train_as_much_as_one_matrix_are_suggested(kind):
    def started(**settings):
        model = wrapped(moe(kind), **{"r": 8, **settings})
        return hs.initialize_(model, "pissa", progress=False)

    report = started()
    assert report.lower_ranks == {"experts.gate_up_proj": 2, "experts.down_proj": 2}
    assert f"rank_pattern={report.lower_ranks}" in str(report)
    lower = started(rank_pattern=report.lower_ranks)
    ranks = {layer.name: layer.r for layer in lower.layers}
    assert {r for name, r in ranks.items() if "experts" in name} == {2}
    assert {r for name, r in ranks.items() if "experts" not in name} == {8}
    assert not started(r=1).lower_ranks and not started(target_parameters=None).lower_ranks


def test_a_monitor_watches_the_linear_layers():
    model = wrapped(moe("mixtral"))
    assert {layer.name.split(".")[-1] for layer in sampled(model, None, 8)} == {"q_proj", "o_proj"}
    with pytest.raises(LayerError, match="no linear LoRA layer to watch"):
        sampled(wrapped(moe("mixtral"), target_modules=[]), None, 1)


def test_what_a_start_would_cost_counts_every_expert():
    machine = measured(wrapped(moe("mixtral")), [batch()])
    assert machine.shapes == {(32, 32): 4, (48, 32): 8, (32, 24): 8}


def test_experts_of_one_parameter_start_in_one_form():
    model = wrapped(moe("mixtral"))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LayerError, match=r"experts\.0\.\w+' and '.*experts\.\d\.\w+' are matrices of one parameter"):
        hs.initialize_(model, hs.PerLayer({"experts.0.*": hs.LoRA(), "*": hs.PiSSA()}), cache=False)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    mixed = hs.PerLayer({"experts.0.*": hs.PiSSA(), "*": hs.OLoRA()})
    before = logits(model, batch())
    hs.initialize_(model, mixed, cache=False)
    assert torch.equal(logits(model, batch()), before)


@pytest.mark.parametrize("pair", [("mica", "lora"), ("keeplora-plus", "lora-one"), ("keeplora", "pissa")])
def test_experts_of_one_parameter_train_the_same_factors(pair):
    model = wrapped(moe("mixtral"))
    first, other = (method_class(name)() for name in pair)
    assert first.form == other.form and first.freezes != other.freezes

    def unread():
        pytest.fail("data were read")
        yield

    with pytest.raises(LayerError, match=r"experts\.0\.\w+' and '.*experts\.\d\.\w+' are matrices of one parameter"):
        hs.initialize_(model, hs.PerLayer({"experts.0.*": first, "*": other}), data=unread(), cache=False)


def test_the_command_starts_experts_and_a_run_trains_them(tmp_path, capsys):
    folder, words = tmp_path / "model", tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(**COMMON | {"vocab_size": 96, "eos_token_id": words.eos_token_id}, num_local_experts=4)
    base = AutoModelForCausalLM.from_config(config)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    base.save_pretrained(folder)
    words.save_pretrained(folder)
    named = ["init", str(folder), "--method", "pissa", "--rank", "2", "--targets", "q_proj", "--parameters"]
    main([*named, ",".join(EXPERTS), "--out", str(tmp_path / "start")])
    loaded = hs.load_checkpoint(copy.deepcopy(base), tmp_path / "start")
    assert len([layer for layer in find_again(loaded) if isinstance(layer, ExpertLayer)]) == 16
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*named, "experts.down_prj", "--out", str(tmp_path / "no")])
    assert "'experts.down_prj' is not in the model. Did you mean 'experts.down_proj'?" in capsys.readouterr().err
    adapter = {"r": 2, "targets": ["q_proj"], "parameters": EXPERTS}
    run = small_run(folder, sums(tmp_path / "sums.jsonl"), adapter=adapter, start={"method": "pissa"})
    result = execute(run, tmp_path / "run")
    assert result.status == "done"
    assert result.trainable == 2 * 2 * (2 * 32 + 4 * (48 + 32) + 4 * (32 + 24))
