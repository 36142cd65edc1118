"""Random models of Llama's shapes for the GPU's benchmarks, their data, and PEFT's own starts of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import headstart as hs
from headstart.methods import parse_method

RANK = 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, int]] = {
    # Llama-3.2-1B's and Llama-3.1-8B's.
    "1B": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
    "8B": dict(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
    # Small enough to try this on a processor, and to warm a GPU up.
    "tiny": dict(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}
Batch = dict[str, torch.Tensor]


def build(shape: str, device: torch.device, *, layers: int | None = None) -> Any:
    """Return a random model in bfloat16, of the first ``layers`` decoder layers."""
    torch.manual_seed(0)
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=1024, tie_word_embeddings=shape == "1B")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def batches(shape: str, samples: int, length: int, size: int) -> list[Batch]:
    """Return batches of random tokens, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (samples, length), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in torch.split(ids, size)
    ]


def on_device(data: list[Batch], device: torch.device) -> list[Batch]:
    """Return the batches on a device."""
    return [{key: value.to(device) for key, value in batch.items()} for batch in data]


def in_four_bits(model: Any, device: torch.device) -> Any:
    """Return the model with its linear layers in bitsandbytes' NF4, all but the head; the model is used up."""
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        quantised = bnb.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        quantised.weight = bnb.Params4bit(module.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantised.to(device))
    model.is_loaded_in_4bit = True
    return model


def config(start: str | bool = True, **settings: Any) -> LoraConfig:
    """Return the adapter that all sides have."""
    return LoraConfig(
        r=RANK,
        lora_alpha=16,
        # Not PEFT's shorthand for all linear layers, which some of its starts don't know.
        target_modules=list(LINEAR),
        init_lora_weights=start,
        task_type="CAUSAL_LM",
        **settings,
    )


def with_headstart(method: str) -> Callable[[Any, list[Batch]], tuple[Any, Any]]:
    """Return what wraps a model and starts it by the verb; the wrapped model and the report come back."""

    def start(model: Any, data: list[Batch]) -> tuple[Any, Any]:
        samples = sum(len(batch["labels"]) for batch in data)
        reads = parse_method(method).reads_data
        name = f"{method}{',' if ':' in method else ':'}samples={samples}" if reads else method
        given = hs.TrainingData(data, training=hs.Training(100_000)) if reads else None
        wrapped = get_peft_model(model, config())
        return wrapped, hs.initialize_(wrapped, name, data=given, cache=False, progress=False)

    return start


def with_peft(start: str) -> Callable[[Any, list[Batch]], Any]:
    """Return what wraps a model and starts it as PEFT documents it."""

    def of_the_weight(model: Any, data: list[Batch]) -> None:
        get_peft_model(model, config(start))

    def lora_ga(model: Any, data: list[Batch]) -> None:
        from peft.tuners.lora.loraga import preprocess_loraga

        chosen = config("lora_ga", lora_ga_config=LoraGAConfig())

        def train_step() -> None:
            for batch in data:
                model(**batch).loss.backward()

        preprocess_loraga(model, chosen, train_step)
        get_peft_model(model, chosen)

    def eva(model: Any, data: list[Batch]) -> None:
        from peft.tuners.lora.eva import initialize_lora_eva_weights

        # A rho of 1 keeps the rank of each layer, as ours does by default.
        wrapped = get_peft_model(model, config("eva", eva_config=EvaConfig(rho=1.0)))
        initialize_lora_eva_weights(wrapped, dataloader=data, show_progress_bar=False)

    def corda(model: Any, data: list[Batch]) -> None:
        from peft.tuners.lora.corda import preprocess_corda

        chosen = config("corda", corda_config=CordaConfig(corda_method="kpm"))

        def run() -> None:
            # Its hook takes one sample at a time.
            with torch.no_grad():
                for batch in data:
                    for row in range(len(batch["input_ids"])):
                        model(input_ids=batch["input_ids"][row : row + 1])

        preprocess_corda(model, chosen, run_model=run)
        get_peft_model(model, chosen)

    return {"lora_ga": lora_ga, "eva": eva, "corda": corda}.get(start, of_the_weight)


def plain_pass(model: Any, data: list[Batch]) -> None:
    """Forward, backward, ``.grad`` of the target weights: what a gradient start has to do at the least."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in LINEAR)
    for batch in data:
        model(**batch, use_cache=False).loss.backward()
