"""What reports and tables call a kind of layer, and what they say of the parameters that an adapter leaves out."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

import headstart as hs
from conftest import GROUPED, tiny_bert, tiny_experts, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_tied, token_batch, wrap
from headstart.layers.checkpoint import read_adapter
from headstart.layers.find import lora_layers
from headstart.layers.inspection import inspect_adapter
from headstart.names import kind_in_words, kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.self_attn.q_proj"),
        ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.attention.output.dense"),
        ("down_blocks.0.attentions.1.to_out.0", "down_blocks.attentions.to_out"),
        ("mlp.experts.3.w1", "mlp.experts.w1"),
        ("layers.0.fc1", "layers.fc1"),
        ("layers.0.fc2", "layers.fc2"),
        ("lm_head", "lm_head"),
        ("0", "0"),
        ("2.0", "2.0"),
    ],
)
def test_a_kind_is_the_name_without_its_numbers(name, kind):
    assert kind_of(name) == kind


DENSE = [
    "bert.encoder.layer.attention.output.dense",
    "bert.encoder.layer.intermediate.dense",
    "bert.encoder.layer.output.dense",
]


def rows(text):
    """The first word of each line of a table that starts with a kind."""
    return [line.split()[0] for line in text.splitlines() if line.startswith("bert.")]


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("transformer.h.0.attn.c_attn", True),
        ("transformer.h.0.crossattention.c_attn", False),  # keys and values alone
        ("transformer.h.3.self_attention.query_key_value", True),
        ("model.layers.0.self_attn.qkv_proj", True),
        ("transformer.blocks.1.attn.Wqkv", True),
        ("visual.blocks.2.attn.qkv", True),
        ("model.layers.0.linear_attn.in_proj_qkv", True),
        ("model.layers.0.self_attn.W_pack", True),
        ("encoder.layers.0.self_attention.in_proj", True),
        ("model.layers.0.mixer.in_proj", False),  # a state space's
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.mlp.gate_up_proj", False),
    ],
)
def test_fused_projections_are_called_so(name, fused):
    assert kind_in_words(name) == kind_of(name) + (" (q, k, v fused)" if fused else "")


def test_tables_say_which_projections_are_fused(tmp_path):
    model = wrap(tiny_gpt2())
    text = str(hs.initialize_(model, "pissa", cache=False, progress=False))
    assert "transformer.h.attn.c_attn (q, k, v fused)" in text and text.count("fused") == 1
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    kinds = [row[0] for row in inspect_adapter(read_adapter(tmp_path / "checkpoint")).table()]
    assert "transformer.h.attn.c_attn (q, k, v fused)" in kinds


def test_layers_of_one_name_in_different_places_are_different_kinds(tmp_path):
    """BERT has three called dense, two of one shape."""
    base = tiny_bert()
    with torch.no_grad():
        for block in base.bert.encoder.layer:
            block.attention.output.dense.weight.mul_(10)
    model = wrap(base, target_modules=r".*encoder.*\.dense", r=8)
    report = hs.initialize_(model, "inilora:solver=adam,steps=0", progress=False)
    assert sorted({target.kind for target in lora_layers(model, "default")}) == DENSE
    assert rows(str(report)) == DENSE
    # The draw has the deviation of its own kind's weights, not of all that are called dense.
    norms = {kind: [layer for layer in report.layers if kind_of(layer.name) == kind] for kind in DENSE}
    loud, quiet = (
        sum(layer.norm_A**2 / (layer.r * layer.d_in) for layer in norms[kind]) ** 0.5 for kind in (DENSE[0], DENSE[1])
    )
    assert loud / quiet == pytest.approx(10, rel=0.2)
    hs.save_checkpoint(model, tmp_path / "out")
    table = inspect_adapter(read_adapter(tmp_path / "out")).table()
    assert [row[0] for row in table] == DENSE


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_parameters_without_an_adapter_are_counted():
    base = tiny_llama()
    total = size(base)
    reached = sum(size(block.self_attn.q_proj) for block in base.model.layers)
    model = wrap(base, target_modules=["q_proj"])
    report = hs.initialize_(model, "lora", progress=False)
    assert (report.left_out.parameters, report.left_out.total) == (total - reached, total)
    assert report.left_out.experts == {}
    line = f"the adapter leaves out {total - reached:,} of the model's {total:,} parameters"
    assert line in str(report).splitlines()
    assert json.loads(json.dumps(report.to_dict()))["left_out"]["parameters"] == total - reached


@pytest.mark.parametrize("method", ["lora", "init-ab", "lora-xs"])
def test_factors_anchors_cores_and_other_adapters_are_no_part_of_the_model(method):
    base = tiny_llama()
    total = size(base)
    reached = sum(size(block.self_attn.v_proj) for block in base.model.layers)
    model = wrap(base, target_modules=["q_proj"])
    hs.initialize_(model, method, progress=False)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    report = hs.initialize_(model, method, adapter="second", progress=False)
    assert report.left_out.total == total
    assert report.left_out.parameters == total - reached


def test_layers_that_are_left_without_a_rank_are_left_out():
    model = wrap(tiny_llama(), r=1)
    weights = {t.name: t.module.get_base_layer().weight.numel() for t in lora_layers(model, "default")}
    report = hs.initialize_(model, hs.EVA(samples=4, rho=8), data=[token_batch()], progress=False)
    kept = [target.name for target in lora_layers(model, "default")]
    assert 0 < len(kept) < len(weights)
    assert report.left_out.total - report.left_out.parameters == sum(weights[name] for name in kept)


def test_what_trains_beside_the_adapter_is_not_left_out():
    base = tiny_llama()
    total, head = size(base), size(base.lm_head)
    reached = sum(size(block.self_attn.q_proj) for block in base.model.layers)
    model = wrap(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = hs.initialize_(model, "lora", progress=False)
    assert (report.left_out.parameters, report.left_out.total) == (total - reached - head, total)


def test_shared_parameters_count_once():
    base = tiny_tied()
    report = hs.initialize_(wrap(base, target_modules=["q_proj"]), "lora", progress=False)
    assert report.left_out.total == size(base.base_model) - sum(
        p.numel() for n, p in base.named_parameters() if "lora_" in n
    )


def test_vera_counts_alike():
    base = tiny_llama()
    total = size(base)
    reached = sum(size(block.self_attn.q_proj) for block in base.model.layers)
    model = get_peft_model(base, VeraConfig(r=4, target_modules=["q_proj"], save_projection=True))
    report = hs.initialize_(model, "init-ab", progress=False)
    assert (report.left_out.parameters, report.left_out.total) == (total - reached, total)


def tiny_qwen_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **GROUPED,
            num_hidden_layers=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        )
    )


def expert_sizes(base, *endings):
    """Numbers in the modules of these names, and in those alone."""
    return {
        f"model.layers.mlp.{ending}": sum(
            size(module) for name, module in base.named_modules() if name.endswith(f"mlp.{ending}")
        )
        for ending in endings
    }


@pytest.mark.parametrize(
    ("make", "endings"),
    [(tiny_mixtral, ["experts"]), (tiny_qwen_moe, ["experts", "shared_expert"]), (tiny_experts, ["experts"])],
)
def test_experts_that_are_left_out_are_named(make, endings):
    """Held in tensors of three dimensions or in linear layers: not adapted without a word is what they must not be."""
    base = make()
    expected = expert_sizes(base, *endings)
    assert all(expected.values())
    report = hs.initialize_(wrap(base, target_modules=["q_proj", "v_proj"]), "lora", progress=False)
    assert report.left_out.experts == expected
    text = " ".join(str(report).split())
    assert f"among them {sum(expected.values()):,} of experts ({', '.join(expected)})" in text


def test_experts_that_are_reached_are_not_named():
    base = tiny_experts()
    report = hs.initialize_(wrap(base, target_modules=["w1", "w2", "w3"]), "lora", progress=False)
    assert report.left_out.experts == {}
    half = hs.initialize_(wrap(tiny_experts(), target_modules=["w1"]), "lora", progress=False)
    (left,) = half.left_out.experts.values()
    assert left == sum(expert_sizes(tiny_experts(), "experts").values()) * 2 // 3


class Mixture(nn.Module):
    """A mixture with experts by class, not by name."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.inner = ParallelExperts()

    def forward(self, x):
        return x


class ParallelExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 8, 8))


def test_experts_by_class_are_named():
    model = get_peft_model(nn.Sequential(Mixture()), LoraConfig(r=2, target_modules=["router"]))
    report = hs.initialize_(model, "lora", progress=False)
    assert report.left_out.experts == {"inner": 192}
