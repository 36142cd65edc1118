"""Tiny mixtures of experts, and their parameters' adapters, for tests."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

from headstart.layers.adapters import find
from headstart.layers.experts import ExpertLayer, is_stack
from headstart.layers.find import lora_layers
from headstart.layers.matrices import matrices_of
from headstart.layers.stacks import taken_apart

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
    defaults = {"r": 3, "target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS} | settings
    return get_peft_model(model, LoraConfig(lora_alpha=6, task_type="CAUSAL_LM", **defaults))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (2, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def stacks(model):
    return {layer.stack.name: layer.stack for layer in find(model, None).layers if isinstance(layer, ExpertLayer)}


def parts(module, adapter="default"):
    return taken_apart(module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.num_experts)


def named_stacks(model):
    for target in lora_layers(model, "default"):
        if is_stack(target.module):
            holder = target.name.replace(".base_layer", "")
            yield f"{holder}.{target.module.parameter_name}", target


def trained(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def find_again(model):
    """The layers of an adapter that is trained already, as a start would see them."""
    return matrices_of(lora_layers(model, "default"))
