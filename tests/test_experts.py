"""Starts for experts that a mixture holds in one tensor, and for routers: against oracles and PEFT's own merge."""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import headstart as hs
from conftest import logits
from headstart.advise.costs import measured
from headstart.cli import main
from headstart.errors import CheckpointError, HeadstartWarning, LayerError
from headstart.layers.adapter import make_plain
from headstart.layers.adapters import find
from headstart.layers.checkpoint import read_adapter
from headstart.layers.core import form_of
from headstart.layers.experts import ExpertLayer, is_stack
from headstart.layers.export import write_plain
from headstart.layers.find import lora_layers
from headstart.layers.inspection import inspect_adapter
from headstart.layers.matrices import matrices_of
from headstart.layers.stacks import laid_together, taken_apart
from headstart.methods.base import Wants
from headstart.monitor.monitor import sampled
from headstart.runs.stages import execute
from headstart.statistics.prepare import prepare
from headstart.statistics.routed import routed_layers
from headstart.statistics.stacks import stacks_of
from headstart.statistics.sums import symmetric
from headstart.stream import stream_start
from running import small_run, sums, tokenizer

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    num_experts_per_tok=2,
)
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=24, head_dim=8),
    "qwen3.5-moe": lambda: Qwen3_5MoeTextConfig(
        **COMMON,
        num_experts=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gpt-oss": lambda: GptOssConfig(**COMMON, num_local_experts=4, head_dim=8),
    "llama4": lambda: Llama4TextConfig(
        **COMMON | {"num_experts_per_tok": 1},
        intermediate_size_mlp=48,
        num_local_experts=4,
        head_dim=8,
        interleave_moe_layer_step=1,
    ),
    "deepseek-v3": lambda: DeepseekV3Config(
        **COMMON,
        n_routed_experts=4,
        moe_intermediate_size=24,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_shared_experts=1,
    ),
}


def moe(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    for parameter in model.parameters():
        # Some of these models leave their experts without values, or at zero.
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.02)
    return model.to(dtype)


def wrapped(model, **settings):
    defaults = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS} | settings
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **defaults))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (2, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def stacks(model):
    return {layer.stack.name: layer.stack for layer in find(model, None).layers if isinstance(layer, ExpertLayer)}


def parts(module, adapter="default"):
    return taken_apart(module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.num_experts)


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


@pytest.mark.filterwarnings("ignore:.*no gradient reached")
def test_routers_have_gradients():
    base = moe("mixtral")
    expected = sample_gradients(base, [batch()], ["model.layers.0.mlp.gate.weight"])["model.layers.0.mlp.gate.weight"]
    model = wrapped(base, target_parameters=["gate.weight"])
    router = next(layer for layer in find(model, None).layers if layer.name == "model.layers.0.mlp.gate")
    hs.initialize_(model, "lora-one:samples=2", data=[batch()])
    U, S, Vh = torch.linalg.svd(-expected)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    A, B = (part["default"].weight.detach().double() for part in (router.module.lora_A, router.module.lora_B))
    assert float((B @ A * best).sum() / (B @ A).norm() / best.norm()) > 1 - 1e-4


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


def sample_gradients(model, batches, names):
    """The mean over samples of each sample's own loss gradient, in float64, by parameter."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the others compute in float32 at most
    sums = {}
    count = 0
    for whole in batches:
        for row in range(len(whole["input_ids"])):
            model.zero_grad()
            model(**{key: value[row : row + 1] for key, value in whole.items()}).loss.backward()
            count += 1
            for name, parameter in model.named_parameters():
                if name in names:
                    sums[name] = sums.get(name, 0) + parameter.grad
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("target_modules", [["q_proj"], []], ids=["beside attention", "alone"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_starts_of_experts_are_those_of_their_matrices(kind, target_modules):
    base = moe(kind)
    data = [batch(seed) for seed in range(3)]
    names = [name for name, parameter in base.named_parameters() if parameter.ndim == 3]
    gradients = sample_gradients(base, data, names)
    for parameter in base.parameters():
        assert parameter.grad is None
    model = wrapped(base, target_modules=target_modules)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hs.initialize_(model, "lora-one:samples=6", data=data)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, stack in named_stacks(model):
        module = stack.module
        G = gradients[name].double()
        G = G if module._did_swap_in_out_features else G.mT
        A, B = parts(module)
        for expert in range(module.num_experts):
            U, S, Vh = torch.linalg.svd(-G[expert])
            best = (U[:, :3] * S[:3]) @ Vh[:3]
            product = B[expert].double() @ A[expert].double()
            if not float(S[0]):
                assert not product.any()
                continue
            # LoRA-One's product is the rank-r part of -G up to its own scale.
            cosine = float((product * best).sum() / product.norm() / best.norm())
            assert cosine > 1 - 1e-4


def named_stacks(model):
    for target in lora_layers(model, "default"):
        if is_stack(target.module):
            holder = target.name.replace(".base_layer", "")
            yield f"{holder}.{target.module.parameter_name}", target


def test_experts_that_no_token_reached_start_as_lora_does():
    base = moe("mixtral")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.gate.weight[2:] = -layer.mlp.gate.weight[:1] * 0  # equal logits: ties go to the first two
            layer.mlp.gate.weight[:2] = 0
    model = wrapped(base)
    with pytest.warns(HeadstartWarning, match=r"experts\.\d\.\w+, .* and \d+ more: .*no gradient") as caught:
        report = hs.initialize_(model, "lora-one:samples=4", data=[batch(0), batch(1)])
    assert len([warning for warning in caught if "no gradient" in str(warning.message)]) == 1
    unreached = [layer for layer in report.layers if "experts" in layer.name and layer.norm_product == 0]
    assert unreached and all(layer.note for layer in unreached)


def trained(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


STARTS = {"anchored": ("pissa", {}), "residual": ("pissa", {"form": "residual"}), "kept": ("lora-one:samples=2", {})}


def started(kind, start, rslora=False):
    method, settings = STARTS[start]
    model = wrapped(moe(kind), use_rslora=rslora)
    hs.initialize_(model, method, data=[batch()] if start == "kept" else None, cache=False, **settings)
    return trained(model)


@pytest.mark.filterwarnings("ignore:.*no gradient reached")
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", CONFIGS)
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


def padded(seed=0):
    data = batch(seed)
    data["attention_mask"][1, -5:] = 0
    data["labels"] = data["labels"].masked_fill(data["attention_mask"] == 0, -100)
    return data


def routed_oracle(base, batches):
    """Per expert: Z over the tokens that count, the mean gradient over samples, and diag(Y), in float64."""
    model = copy.deepcopy(base).double()
    found = {}
    samples = 0

    def forward_of(name):
        def forward(module, hidden, chosen, weights):
            total = torch.zeros_like(hidden)
            for token in range(len(hidden)):
                for place, expert in enumerate(chosen[token].tolist()):
                    row = hidden[token : token + 1]
                    for parameter in ("gate_up_proj", "down_proj"):
                        W = getattr(module, parameter)[expert]
                        W = W.mT if module.is_transposed else W
                        out = row @ W.T
                        if module.has_bias:
                            out = out + getattr(module, f"{parameter}_bias")[expert]
                        out.requires_grad_(True)
                        out.retain_grad()
                        found.setdefault(f"{name}.{expert}.{parameter}", []).append((token, row.detach(), out))
                        row = module._apply_gate(out) if parameter == "gate_up_proj" else out
                    total[token] = total[token] + row[0] * weights[token, place]
            return total

        return forward

    ALL_EXPERTS_FUNCTIONS.register("oracle", lambda module, *rest: module.oracle(module, *rest))
    model.set_experts_implementation("oracle")
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.oracle = forward_of(name)
    sums = {}
    for whole in batches:
        for row in range(len(whole["input_ids"])):
            found.clear()
            sample = {key: value[row : row + 1] for key, value in whole.items()}
            length = int(sample["attention_mask"].sum())
            sample = {key: value[:, :length] for key, value in sample.items()}
            model(**sample).loss.backward()
            samples += 1
            for layer, seen in found.items():
                own = sums.setdefault(layer, {"Z": 0, "G": 0, "Y": 0, "tokens": 0})
                for _, x, out in seen:
                    own["Z"] = own["Z"] + x.T @ x
                    own["G"] = own["G"] + out.grad.T @ x
                    own["Y"] = own["Y"] + out.grad[0] ** 2
                    own["tokens"] += 1
    return {
        layer: (own["Z"] / own["tokens"], own["G"] / samples, own["Y"] / own["tokens"], own["tokens"])
        for layer, own in sums.items()
    }


@pytest.mark.parametrize("data", [[padded(0), padded(1)], [batch(2)]], ids=["padded", "whole"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "qwen3.5-moe", "gpt-oss", "deepseek-v3"])
def test_fisher_factors_of_experts_are_those_of_their_tokens(kind, data):
    base = moe(kind)
    expected = routed_oracle(base, data)
    model = wrapped(base)
    layers = find(model, None).layers
    experts = [layer for layer in layers if isinstance(layer, ExpertLayer)]
    wants = {layer.name: Wants(gradient=True, inputs=True, outputs="diagonal") for layer in layers}
    before = base.config._experts_implementation
    (found,) = prepare(
        model,
        {layer.name: layer.module for layer in layers if not isinstance(layer, ExpertLayer)},
        wants,
        data,
        8,
        stacks=stacks_of(experts),
        experts=routed_layers(experts),
    ).passes()
    assert base.config._experts_implementation == before
    assert expected.keys() == {layer.name for layer in experts if layer.name in found.groups}
    for name, (Z, G, Y, tokens) in expected.items():
        kronecker = found.kronecker[name]
        assert kronecker.tokens == tokens
        torch.testing.assert_close(symmetric(kronecker.inputs).double(), Z, rtol=1e-4, atol=1e-5 * float(Z.norm()))
        torch.testing.assert_close(found.gradients[name].double(), G, rtol=1e-3, atol=1e-5 * float(G.norm()))
        torch.testing.assert_close(kronecker.outputs.double(), Y, rtol=1e-3, atol=1e-5 * float(Y.norm()))


@pytest.mark.filterwarnings("ignore:.*(no gradient|no input) reached")
@pytest.mark.parametrize(
    "method", ["lora-da:samples=4", "eva:samples=4,rho=1", "corda:samples=4", "astra:samples=4", "lora-ga"]
)
def test_starts_from_what_experts_read(method):
    model = wrapped(moe("qwen3-moe"))
    before = logits(model, batch())
    report = hs.initialize_(model, method, data=[batch(seed) for seed in range(2)])
    kept = report.form == "kept"
    assert torch.equal(logits(model, batch()), before) != kept or "eva" in method
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_experts_are_not_streamed(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "model")
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    with pytest.raises(LayerError, match=r"layers\.0\.mlp\.experts' is adapted through its parameter .*not streamed"):
        stream_start(tmp_path / "model", "pissa", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def _in_process(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for method in ("lora-one:samples=6", "lora-da:samples=6"):
        model = wrapped(moe("mixtral"))
        hs.initialize_(model, method, data=[padded(seed) for seed in range(3)], progress=False)
        save_file(get_peft_model_state_dict(model), f"{folder}/{method.partition(':')[0]}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*no gradient reached")
def test_two_processes_start_experts_as_one_does(tmp_path):
    torch.multiprocessing.spawn(_in_process, (str(tmp_path),), nprocs=2)
    for method in ("lora-one", "lora-da"):
        model = wrapped(moe("mixtral"))
        hs.initialize_(model, f"{method}:samples=6", data=[padded(seed) for seed in range(3)])
        parts_of = [load_file(tmp_path / f"{method}.{rank}") for rank in range(2)]
        assert all(torch.equal(value, parts_of[1][name]) for name, value in parts_of[0].items())
        model_again = wrapped(moe("mixtral"))
        set_peft_model_state_dict(model_again, parts_of[0])
        for (_, one), (_, two) in zip(named_stacks(model), named_stacks(model_again), strict=True):
            (A, B), (other_A, other_B) = parts(one.module), parts(two.module)
            product = B.double() @ A.double()
            size = float(product.detach().norm())
            torch.testing.assert_close(other_B.double() @ other_A.double(), product, rtol=0, atol=1e-3 * size)


def test_what_is_left_out_of_a_mixture_is_named():
    report = hs.initialize_(wrapped(moe("mixtral"), target_parameters=None), "lora", progress=False)
    assert report.left_out.experts == {"model.layers.mlp.experts": 2 * 4 * (48 * 32 + 32 * 24)}
    assert report.left_out.routers == {"model.layers.mlp.gate": 2 * 4 * 32}
    assert "18,432 of experts (model.layers.mlp.experts) and 256 of routers (model.layers.mlp.gate)" in str(
        report.left_out
    )


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


@pytest.mark.filterwarnings("ignore:.*reached")
@pytest.mark.parametrize("unreached", [0, 1])
def test_what_never_trains_is_so_whichever_expert_was_reached(unreached):
    base = moe("mixtral")
    model = wrapped(base)
    data = [batch(0), batch(1)]
    with _never_chosen(base, unreached):
        hs.initialize_(model, "lora-null:version=v2,samples=4", data=data, preserve=data)
    assert not any(target.module.lora_A["default"].weight.requires_grad for _, target in named_stacks(model))


@contextmanager
def _never_chosen(base, expert):
    def hook(module, args, output):
        logits_, weights, chosen = output
        other = torch.where(chosen == expert, (chosen + 2) % 4, chosen)
        return logits_, weights, other

    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in base.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def find_again(model):
    """The layers of an adapter that is trained already, as a start would see them."""
    return matrices_of(lora_layers(model, "default"))


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
