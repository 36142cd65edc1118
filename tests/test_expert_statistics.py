"""What is measured of experts and routers for starts that read data, against oracles that see each token."""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import headstart as hs
from conftest import logits
from headstart.errors import HeadstartWarning
from headstart.layers.adapters import find
from headstart.layers.experts import ExpertLayer
from headstart.methods.base import Wants
from headstart.statistics.prepare import prepare
from headstart.statistics.routed import routed_layers
from headstart.statistics.stacks import stacks_of
from headstart.statistics.sums import symmetric
from mixtures import CONFIGS, batch, moe, named_stacks, parts, wrapped


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
