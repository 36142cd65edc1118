"""Models that are split over processes layer by layer are refused; those that FSDP2 gathers are not."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from peft import VeraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import headstart as hs
from conftest import tiny_llama, token_batch, wrap
from headstart.errors import LayerError
from headstart.layers.find import lora_layers
from test_processes import factors, together

METHODS = ["lora", "init-ab", "pissa", "lora-one:samples=4"]
REFUSED = r"layer 'model.layers.0.self_attn.\w_proj': the model is split by tensor parallelism"


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refusals(rank, folder):
    """What each method says of a model that Transformers has split over two processes."""
    from transformers import AutoModelForCausalLM

    # As torchrun sets them; Transformers takes the number of processes from there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    said = []
    for make in (wrap, lambda base, **more: get_peft_model(base, VeraConfig(r=4, save_projection=True, **more))):
        model = make(AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto"), target_modules=["o_proj"])
        for method in METHODS[: 4 if make is wrap else 1]:
            try:
                hs.initialize_(model, method, data=[token_batch()], progress=False)
                said.append("")
            except LayerError as error:
                said.append(str(error))
    return said


def test_a_model_that_transformers_has_split_is_refused_in_every_process(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    for said in together(tmp_path, refusals, str(tmp_path / "base")):
        assert len(said) == 5
        for text in said:
            assert text.startswith("layer 'model.layers.0.self_attn.o_proj': the model is split by tensor parallelism")


@pytest.mark.parametrize("names", [("tp",), None])
@pytest.mark.parametrize("method", METHODS)
def test_weights_split_by_torchs_own_means_are_refused(alone, method, names):
    base = tiny_llama()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names)
    for block in base.model.layers:
        parallelize_module(block.self_attn, mesh, {"q_proj": ColwiseParallel()})
    model = wrap(base, target_modules=["q_proj"])
    with pytest.raises(LayerError, match=REFUSED):
        hs.initialize_(model, method, data=[token_batch()], progress=False)


def test_a_plan_on_the_layer_is_enough():
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    next(lora_layers(model, "default")).module.get_base_layer()._hf_tp_plan = "colwise"
    with pytest.raises(LayerError, match=REFUSED):
        hs.initialize_(model, "lora", progress=False)


def test_what_fsdp2_has_split_further_is_refused(alone):
    base = tiny_llama()
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("rows", "columns"))
    model = wrap(base, target_modules=["q_proj"])
    fully_shard(model, mesh=mesh["rows"])
    for target in lora_layers(model, "default"):
        linear = target.module.get_base_layer()
        weight = distribute_tensor(torch.ones(32, 32), mesh, [Shard(0), Shard(1)])
        linear.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(LayerError, match=REFUSED):
        hs.initialize_(model, "lora", progress=False)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("method", ["lora", "pissa", "init-ab", "lora-one:samples=4"])
def test_fsdp2_and_its_hybrid_work(alone, method, shape):
    base = tiny_llama()
    plain, sharded = wrap(copy.deepcopy(base)), wrap(base)
    names = ("fsdp",) if len(shape) == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in sharded.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    if len(shape) == 2:
        weight = next(lora_layers(sharded, "default")).module.get_base_layer().weight
        assert weight.placements == (Replicate(), Shard(0))
    for model in (plain, sharded):
        hs.initialize_(model, method, data=[token_batch()], progress=False)
    expected = factors(plain)
    for name, (A, B) in factors(sharded).items():
        assert torch.allclose(A, expected[name][0], atol=1e-6)
        assert torch.allclose(B, expected[name][1], atol=1e-6)
