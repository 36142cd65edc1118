"""A streamed start is the start in memory, byte for byte: files, configs, reports; whatever model, shards and type."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import headstart as hs
from conftest import (
    ANY_BASE,
    class_batch,
    logits,
    quick,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_tied,
    tiny_vit,
    token_batch,
)
from headstart.errors import CheckpointError, LayerError, MethodError, ModelError
from headstart.linalg.svd import truncated_svd_batch
from headstart.methods import ANY_LAYER, method_class
from headstart.stream import load_residual, stream_start
from headstart.stream.run import _own_device
from headstart.stream.tensors import Planned, TensorFile, write_file
from streamed import checkpoints, comparable, top_files

METHODS = [quick(name) for name in ANY_BASE if not method_class(name)().wants(ANY_LAYER).data]
METHODS += ["init-ab:beta=2", "inilora:solver=svd"]


MODELS = {
    "llama": (tiny_llama, "all-linear"),
    "tied": (tiny_tied, "all-linear"),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc", "c_proj"]),
    "t5": (tiny_t5, ["q", "v", "wi", "wo"]),
    "bert": (tiny_bert, r".*\.(query|value|dense)"),
    "vit": (tiny_vit, ["q_proj", "v_proj", "fc1", "fc2"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make a checkpoint once: ``folders(model, dtype, shards)``."""
    return checkpoints(tmp_path_factory, lambda name, dtype: MODELS[name][0]().to(dtype))


def config_for(name, **changes):
    settings = dict(r=4, lora_alpha=8, target_modules=MODELS[name][1])
    if name == "gpt2":
        settings["fan_in_fan_out"] = True
    return LoraConfig(**(settings | changes))


def in_memory(folder, name, method, out, form="anchored", seed=0, **changes):
    model = MODELS[name][0]().__class__.from_pretrained(folder, dtype="auto")
    model = get_peft_model(model, config_for(name, **changes))
    report = hs.initialize_(model, method, form=form, seed=seed, progress=False)
    hs.save_checkpoint(model, out)
    return model, report


@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_in_memory_byte_for_byte(folders, tmp_path, method):
    folder = folders("llama", torch.bfloat16, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    _, expected = in_memory(folder, "llama", method, tmp_path / "memory", seed=3)
    report = stream_start(folder, method, config_for("llama"), tmp_path / "stream", seed=3, progress=False)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert comparable(report) == comparable(expected)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", method) for method in ("init-ab", "geora", "loram", "inilora:solver=svd")]
    + [(name, method) for name in MODELS for method in ("pissa", "lora-xs")],
)
def test_every_architecture(folders, tmp_path, name, method):
    folder = folders(name)
    in_memory(folder, name, method, tmp_path / "memory")
    stream_start(folder, method, config_for(name), tmp_path / "stream", progress=False)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_change_no_bit_of_a_batched_method(folders, tmp_path, threads):
    folder = folders("llama")
    in_memory(folder, "llama", "pissa", tmp_path / "memory")
    torch.set_num_threads(threads)
    try:
        stream_start(folder, "pissa", config_for("llama"), tmp_path / "stream", progress=False)
    finally:
        torch.set_num_threads(1)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


def test_triplets_depend_neither_on_company_nor_on_threads():
    torch.manual_seed(0)
    matrices = [torch.randn(320, 290) + 3 * torch.randn(320, 1) @ torch.randn(1, 290) for _ in range(3)]
    alone = [truncated_svd_batch([matrix], 4)[0] for matrix in matrices]
    torch.set_num_threads(2)
    try:
        together = truncated_svd_batch(matrices, 4)
        single = [truncated_svd_batch([matrix], 4)[0] for matrix in matrices]
    finally:
        torch.set_num_threads(1)
    for one, two, three in zip(alone, together, single, strict=True):
        assert torch.equal(one.U, two.U) and torch.equal(one.V, two.V) and one.residual == two.residual
        assert torch.equal(one.U, three.U) and torch.equal(one.S, three.S) and one.residual == three.residual


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 5}),
        dict(target_modules=r".*layers\.1\..*(q|up)_proj", task_type="CAUSAL_LM"),
        dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], lora_dropout=0.1),
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
        dict(target_modules=None),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
)
def test_peft_resolves_the_config(folders, tmp_path, changes):
    folder = folders("llama", torch.bfloat16)
    in_memory(folder, "llama", "init-ab", tmp_path / "memory", **changes)
    stream_start(folder, "init-ab", config_for("llama", **changes), tmp_path / "stream", progress=False)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


def test_a_tied_head_trains_beside_the_layers_from_the_embeddings_that_it_shares(folders, tmp_path):
    folder, changes = folders("tied"), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    in_memory(folder, "tied", "pissa", tmp_path / "memory", **changes)
    stream_start(folder, "pissa", config_for("tied", **changes), tmp_path / "stream", progress=False)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


def test_dora_gets_its_magnitudes(folders, tmp_path):
    folder = folders("llama")
    in_memory(folder, "llama", "init-ab-plus", tmp_path / "memory", use_dora=True)
    stream_start(folder, "init-ab-plus", config_for("llama", use_dora=True), tmp_path / "stream", progress=False)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


@pytest.mark.parametrize("method", ["pissa", "init-ab-plus", "lora-xs"])
def test_what_was_streamed_trains_as_usual(folders, tmp_path, method):
    folder = folders("llama")
    stream_start(folder, method, config_for("llama"), tmp_path / "stream", progress=False)
    expected, _ = in_memory(folder, "llama", method, tmp_path / "memory")
    model = hs.load_checkpoint(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "stream")
    batch = token_batch()
    assert torch.equal(logits(model, batch), logits(expected, batch))
    model(**batch).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora" in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "method"), [("llama", "pissa"), ("gpt2", "olora"), ("llama", "inilora:solver=svd")])
def test_residual_shards_are_the_weights_in_memory(folders, tmp_path, name, method, dtype):
    folder = folders(name, dtype, "20KB")
    expected, _ = in_memory(folder, name, method, tmp_path / "memory", form="residual")
    out = tmp_path / "stream"
    stream_start(folder, method, config_for(name), out, form="residual", progress=False)
    assert top_files(out) == top_files(tmp_path / "memory")
    untouched = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    residual = {file.name: load_file(file) for file in (out / "base").glob("*.safetensors")}
    assert {name: set(held) for name, held in residual.items()} == {name: set(held) for name, held in untouched.items()}
    model = load_residual(out)
    mine, theirs = model.state_dict(), expected.state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[each], theirs[each]) and mine[each].dtype == theirs[each].dtype for each in mine)
    changed = {
        each
        for file in untouched
        for each in untouched[file]
        if not torch.equal(untouched[file][each], residual[file][each])
    }
    assert len(changed) == sum("lora_A" in each for each in theirs)
    assert torch.equal(logits(model, token_batch()), logits(expected, token_batch()))


def test_residual_models_load_without_headstart(folders, tmp_path):
    folder = folders("llama")
    out = tmp_path / "stream"
    stream_start(folder, "pissa", config_for("llama"), out, form="residual", progress=False)
    expected, _ = in_memory(folder, "llama", "pissa", tmp_path / "memory", form="residual")
    bare = AutoModelForCausalLM.from_pretrained(out / "base")
    batch = token_batch()
    with expected.disable_adapter():
        assert torch.equal(logits(bare, batch), logits(expected, batch))


def test_residual_start_goes_on_and_leaves_as_a_plain_adapter(folders, tmp_path):
    folder = folders("llama")
    stream_start(folder, "pissa", config_for("llama"), tmp_path / "stream", form="residual", progress=False)
    model = load_residual(tmp_path / "stream")
    hs.save_lora(model, tmp_path / "plain")
    assert set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    with pytest.raises(CheckpointError, match="holds no residual model"):
        load_residual(tmp_path / "plain")


def test_weights_are_found_under_other_prefixes(tmp_path):
    """A checkpoint of the bare model, loaded as one with a head, has other names."""
    model = tiny_bert()
    model.save_pretrained(tmp_path / "whole")
    model.bert.save_pretrained(tmp_path / "bare")
    for file in ("config.json",):
        (tmp_path / "bare" / file).write_bytes((tmp_path / "whole" / file).read_bytes())
    stream_start(tmp_path / "whole", "pissa", config_for("bert"), tmp_path / "a", name="bert", progress=False)
    stream_start(tmp_path / "bare", "pissa", config_for("bert"), tmp_path / "b", name="bert", progress=False)
    assert top_files(tmp_path / "a") == top_files(tmp_path / "b")
    trained = config_for("bert", task_type="SEQ_CLS")
    with pytest.raises(CheckpointError, match=r"'classifier.*drawn at random"):
        stream_start(tmp_path / "bare", "pissa", trained, tmp_path / "c", progress=False)


def test_heads_that_are_trained_whole_come_from_the_checkpoint(folders, tmp_path):
    folder = folders("bert")
    expected, _ = in_memory(folder, "bert", "pissa", tmp_path / "memory", task_type="SEQ_CLS")
    stream_start(folder, "pissa", config_for("bert", task_type="SEQ_CLS"), tmp_path / "stream", progress=False)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert torch.isfinite(logits(expected, class_batch())).all()


def test_layers_without_a_tensor_are_named(folders, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "mixtral")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    stream_start(tmp_path / "mixtral", "pissa", config, tmp_path / "attention", progress=False)
    file = tmp_path / "lacking"
    MODELS["llama"][0]().save_pretrained(file)
    tensors = load_file(file / "model.safetensors")
    tensors["model.layers.1.self_attn.qkv_proj.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, file / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 'model.layers.1.self_attn.q_proj'.*no tensor of its own"):
        stream_start(file, "pissa", config_for("llama"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_streamed_is_refused_before_anything_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    folder, out = folders("llama"), tmp_path / "out"
    for method in ("lora-one", "lora-da", "lora-sb"):
        with pytest.raises(MethodError, match=r"needs the whole model.*pissa"):
            stream_start(folder, method, config_for("llama"), out)
    with pytest.raises(LayerError, match="tied weights"):
        stream_start(folders("tied"), "pissa", config_for("tied", target_modules=["lm_head"]), out)
    with pytest.raises(LayerError, match="is an embedding, which is not streamed"):
        stream_start(folder, "pissa", config_for("llama", target_modules=["embed_tokens"]), out)
    with pytest.raises(LayerError, match=r"'q_prj' is not in the model.*q_proj"):
        stream_start(folder, "pissa", config_for("llama", target_modules=["q_prj"]), out)
    with pytest.raises(LayerError, match="rank 64 is more than its smaller side"):
        stream_start(folder, "pissa", config_for("llama", r=64), out)
    with pytest.raises(LayerError, match="layer_replication"):
        stream_start(folder, "pissa", config_for("llama", layer_replication=[[0, 2], [1, 2]]), out)
    with pytest.raises(ModelError, match="no model folder"):
        stream_start(tmp_path / "nowhere", "pissa", config_for("llama"), out)
    with pytest.raises(CheckpointError, match="holds the checkpoint itself"):
        stream_start(folder, "pissa", config_for("llama"), folder, force=True)
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="exists"):
        stream_start(folder, "pissa", config_for("llama"), out)
    (out / "base").mkdir()
    with pytest.raises(CheckpointError, match="holds no residual model"):
        stream_start(folder, "pissa", config_for("llama"), out, form="residual", force=True)


def test_files_are_written_as_the_library_writes_them(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "ä": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.zeros((), dtype=torch.float64),
        "long": torch.arange(5),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "byte": torch.ones(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_file(tmp_path / "mine", {name: Planned.of(each) for name, each in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = TensorFile.open(tmp_path / "theirs")
    for name, each in tensors.items():
        assert torch.equal(file.read(name), each)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_command_writes_what_it_writes_without_stream(tmp_path, folders):
    from headstart.cli import main

    folder = folders("llama", torch.bfloat16)
    main(["init", str(folder), "--method", "pissa", "--stream", "--out", str(tmp_path / "stream"), "--rank", "4"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    hs.initialize_(model, "pissa", progress=False)
    hs.save_checkpoint(model, tmp_path / "memory")
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    main(["export", str(tmp_path / "stream"), "--out", str(tmp_path / "plain")])
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["r"] == 8


def test_nothing_subtracted_is_no_residual_model(folders, tmp_path):
    folder, out = folders("llama"), tmp_path / "stream"
    stream_start(folder, "lora-xs", config_for("llama"), out, form="residual", progress=False)
    in_memory(folder, "llama", "lora-xs", tmp_path / "memory", form="residual")
    assert top_files(out) == top_files(tmp_path / "memory") and not (out / "base").exists()


def test_a_residual_model_is_told_from_the_one_it_was_made_of(folders, tmp_path):
    folder, out = folders("llama"), tmp_path / "stream"
    stream_start(folder, "pissa", config_for("llama"), out, form="residual", progress=False)
    with pytest.raises(CheckpointError, match=r"headstart.stream.load_residual loads both"):
        hs.load_checkpoint(AutoModelForCausalLM.from_pretrained(out / "base"), out)
    with pytest.raises(ModelError, match="is the residual model of an adapter"):
        stream_start(out / "base", "pissa", config_for("llama"), tmp_path / "again", progress=False)


@pytest.mark.parametrize(
    "given", [("--data", "x"), ("--lr", "1"), ("--memory-budget", "1GiB"), ("--batch-size", "8"), ("--max-length", "9")]
)
def test_the_command_refuses_what_streaming_has_no_use_for(tmp_path, folders, given, capsys):
    from headstart.cli import main

    out = tmp_path / "stream"
    with pytest.raises(SystemExit):
        main(["init", str(folders("llama")), "--method", "pissa", "--stream", "--out", str(out), *given])
    assert given[0] in capsys.readouterr().err and not out.exists()


def test_strict_refuses_a_fallback_before_anything_is_written(folders, tmp_path, monkeypatch):
    plain = hs.PiSSA.factors_batch

    def noted(self, layers, show):
        return [dataclasses.replace(each, note="something else was done") for each in plain(self, layers, show)]

    monkeypatch.setattr(hs.PiSSA, "factors_batch", noted)
    config, out = config_for("llama", target_modules=["q_proj"]), tmp_path / "out"
    with pytest.raises(LayerError, match=r"model.layers.0.self_attn.q_proj: something else was done"):
        stream_start(folders("llama"), "pissa", config, out, strict=True, progress=False)
    assert not out.exists()
    report = stream_start(folders("llama"), "pissa", config, out, progress=False)
    assert len(report.warnings) == 2 and out.is_dir()


def test_each_process_takes_its_own_accelerator(monkeypatch):
    cuda, numbered, cpu = torch.device("cuda"), torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _own_device(cuda) == cuda
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert _own_device(cuda) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each sees its own alone
    assert _own_device(cuda) == torch.device("cuda", 0)
    assert _own_device(numbered) == numbered and _own_device(cpu) == cpu


def test_processes_share_the_layers(folders, tmp_path):
    folder = folders("llama", torch.bfloat16, "20KB")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "stream"
    arguments = [
        "init",
        folder,
        "--method",
        "inilora:solver=svd",
        "--stream",
        "--out",
        out,
        "--rank",
        4,
        "--base",
        "residual",
    ]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port}", "-m", "headstart.cli"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^wrote ", done.stdout, re.MULTILINE)) == 1
    config = dict(lora_alpha=16, task_type="CAUSAL_LM")
    in_one, _ = in_memory(folder, "llama", "inilora:solver=svd", tmp_path / "memory", "residual", **config)
    mine, theirs = top_files(out), top_files(tmp_path / "memory")
    settings, expected = (json.loads(each.pop("adapter_config.json")) for each in (mine, theirs))
    assert mine == theirs
    # PEFT writes a set, whose order is each process's own.
    assert set(settings.pop("target_modules")) == set(expected.pop("target_modules")) and settings == expected
    model = load_residual(out)
    assert torch.equal(logits(model, token_batch()), logits(in_one, token_batch()))
    assert not list(tmp_path.glob(".*"))


def test_methods_that_need_no_weight_say_so_in_one_list():
    for method in METHODS:
        assert str(method_class(method.partition(":")[0])().wants(ANY_LAYER)) in (
            "shapes",
            "weight",
            "weight + moments",
        )


def test_a_name_with_brackets_leaves_no_pieces(folders, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    other = tmp_path / ".run1.stream-0123456789abcdef"  # what the pattern run[1] would match
    other.mkdir()
    stream_start(folders("llama"), "pissa", config, tmp_path / "run[1]", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "run[1]"]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_refused(folders, tmp_path, bias):
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias=bias)
    with pytest.raises(LayerError, match=bias):
        stream_start(folders("gpt2"), "pissa", config, tmp_path / "out", progress=False)
