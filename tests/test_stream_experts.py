"""Streamed starts of experts and routers are those in memory, whatever tensors the checkpoint keeps them as."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import headstart as hs
from conftest import KINDS, logits, quick
from headstart.cli import main
from headstart.errors import LayerError
from headstart.methods import ANY_LAYER, method_class
from headstart.stream import load_residual, stream_start
from headstart.stream.tensors import TensorFile
from headstart.stream.work import Work
from mixtures import CONFIGS, EXPERTS, batch, moe, trained, wrapped
from streamed import checkpoints, comparable, top_files

# o_proj is a linear layer of all of them.
DEFAULTS = {"r": 4, "target_modules": ["o_proj"]}
METHODS = [quick(name) for name in KINDS if not method_class(name)().wants(ANY_LAYER).data]
METHODS = [name for name in METHODS if method_class(name.partition(":")[0])().form != "core"]
METHODS += ["inilora:solver=svd"]
ROUTERS = {"gpt-oss": "router.weight", "llama4": None}  # a linear layer in Llama 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make a checkpoint once: ``folders(kind, dtype, shards)``."""
    return checkpoints(tmp_path_factory, moe)


def config_for(**changes):
    settings = DEFAULTS | {"target_parameters": EXPERTS} | changes
    return LoraConfig(lora_alpha=6, task_type="CAUSAL_LM", **settings)


def in_memory(folder, method, out, form="anchored", seed=0, **changes):
    model = wrapped(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), **DEFAULTS | changes)
    report = hs.initialize_(model, method, form=form, seed=seed, progress=False, cache=False)
    hs.save_checkpoint(model, out)
    return model, report


def streamed(folder, method, out, form="anchored", seed=0, **changes):
    return stream_start(folder, method, config_for(**changes), out, form=form, seed=seed, progress=False, cache=False)


@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_in_memory_byte_for_byte(folders, tmp_path, method):
    folder = folders("qwen3-moe", torch.bfloat16, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert any(".experts.3.up_proj." in name for file in folder.glob("*.safetensors") for name in load_file(file))
    _, expected = in_memory(folder, method, tmp_path / "memory", seed=3)
    report = streamed(folder, method, tmp_path / "stream", seed=3)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert comparable(report) == comparable(expected)
    assert len([layer for layer in report.layers if ".experts.3." in layer.name]) == 4
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("mixtral", method) for method in ("lora", "loram")]
    + [(kind, method) for kind in CONFIGS for method in ("pissa", "mica")],
)
def test_every_mixture(folders, tmp_path, kind, method):
    folder = folders(kind)
    router = ROUTERS.get(kind, "gate.weight")
    changes = {"target_parameters": [*EXPERTS, *([router] if router else [])]}
    model, expected = in_memory(folder, method, tmp_path / "memory", **changes)
    report = streamed(folder, method, tmp_path / "stream", **changes)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert comparable(report) == comparable(expected)
    assert any(layer.name.endswith(("mlp.gate", "mlp.router")) for layer in report.layers) == bool(router)
    again = hs.load_checkpoint(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "stream")
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    trained(again, steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_residual_shards_hold_the_weights_in_memory_in_the_checkpoints_layout(folders, tmp_path, kind, dtype):
    folder, out = folders(kind, dtype, "20KB"), tmp_path / "stream"
    expected, _ = in_memory(folder, "pissa", tmp_path / "memory", form="residual")
    streamed(folder, "pissa", out, form="residual")
    assert top_files(out) == top_files(tmp_path / "memory")
    untouched = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    residual = {file.name: load_file(file) for file in (out / "base").glob("*.safetensors")}
    shapes = [
        {(file, name): (tensor.shape, tensor.dtype) for file, own in files.items() for name, tensor in own.items()}
        for files in (untouched, residual)
    ]
    assert shapes[0] == shapes[1]
    changed = {
        name for file, own in untouched.items() for name in own if not torch.equal(own[name], residual[file][name])
    }
    adapted = [name for own in untouched.values() for name in own if "o_proj" in name or ".experts." in name]
    assert changed == {name for name in adapted if not name.endswith("bias")}
    model = load_residual(out)
    loaded, in_place = model.state_dict(), expected.state_dict()
    assert set(loaded) == set(in_place)
    assert all(torch.equal(loaded[name], in_place[name]) for name in loaded)
    assert torch.equal(logits(model, batch()), logits(expected, batch()))
    hs.save_lora(model, tmp_path / "plain")


@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_change_no_bit(folders, tmp_path, threads):
    folder = folders("mixtral")
    in_memory(folder, "pissa", tmp_path / "memory")
    torch.set_num_threads(threads)
    try:
        streamed(folder, "pissa", tmp_path / "stream")
    finally:
        torch.set_num_threads(1)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


@pytest.mark.parametrize(
    "changes",
    [
        dict(rank_pattern={"experts.gate_up_proj": 1, "experts.down_proj": 2}, use_rslora=True),
        dict(target_modules="all-linear", target_parameters=None),
        dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=[], target_parameters=["layers.1.mlp.experts.gate_up_proj"]),
    ],
)
def test_peft_resolves_the_config(folders, tmp_path, changes):
    folder = folders("mixtral", torch.bfloat16)
    _, expected = in_memory(folder, "pissa", tmp_path / "memory", **changes)
    report = streamed(folder, "pissa", tmp_path / "stream", **changes)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert comparable(report) == comparable(expected)


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_experts_of_one_parameter_may_have_several_methods(folders, tmp_path, form):
    folder = folders("qwen3-moe")
    method = hs.PerLayer({r"experts\.[02]\.\w+": hs.PiSSA(), "experts.*": hs.OLoRA(), "*": hs.LoRA()})
    _, expected = in_memory(folder, method, tmp_path / "memory", form=form)
    report = streamed(folder, method, tmp_path / "stream", form=form)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert comparable(report) == comparable(expected)


def test_an_expert_that_starts_otherwise_than_asked_for_has_its_note(tmp_path):
    """Weights of zeros start as lora does, in memory as streamed."""
    model = moe("qwen3-moe")
    model.model.layers[1].mlp.experts.down_proj.data[2].zero_()
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(hs.errors.HeadstartWarning, match="zero"):
        _, expected = in_memory(tmp_path / "model", "pissa", tmp_path / "memory")
    with pytest.warns(hs.errors.HeadstartWarning, match=r"experts\.2\.down_proj: .*zero"):
        report = streamed(tmp_path / "model", "pissa", tmp_path / "stream")
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    assert report.trainable == expected.trainable


def test_the_cache_serves_a_start_in_memory(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("HEADSTART_CACHE_LIMIT", raising=False)
    folder, cache = folders("mixtral"), tmp_path / "cache"
    stream_start(folder, "mica", config_for(), tmp_path / "stream", progress=False, cache=cache)
    model = wrapped(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), **DEFAULTS)
    report = hs.initialize_(model, "mica", progress=False, cache=cache)
    assert report.cached == len(report.layers) == 2 + 16
    hs.save_checkpoint(model, tmp_path / "memory")
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_no_more_is_read_than_one_matrix_needs(folders, tmp_path, kind, monkeypatch):
    folder, plain, numbers = folders(kind), TensorFile.read, []

    def counting(self, name, place=None):
        tensor = plain(self, name, place)
        numbers.append(tensor.numel())
        return tensor

    monkeypatch.setattr(TensorFile, "read", counting)
    streamed(folder, "pissa", tmp_path / "stream", target_modules=[])
    assert max(numbers) == (24 * 32 if kind == "mixtral" else 48 * 32)  # gate and up are apart on Mixtral's disk
    assert sum(numbers) == 2 * 4 * (48 * 32 + 24 * 32)


@pytest.mark.parametrize("count", [1, 5, 20, 37])
def test_what_is_finished_is_not_made_again(folders, tmp_path, count):
    folder, out, put = folders("qwen3-moe"), tmp_path / "stream", []
    plain = Work.put
    in_memory(folder, "pissa", tmp_path / "memory", form="residual")

    def stopping(self, name, *rest):
        plain(self, name, *rest)
        put.append(name)
        if len(put) == count:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "put", stopping)
        if count < 2 + 16 + 1:  # o_proj, every expert's two matrices, and the shard
            with pytest.raises(KeyboardInterrupt):
                streamed(folder, "pissa", out, form="residual")
            assert not out.exists()
        streamed(folder, "pissa", out, form="residual")
    assert len(put) == len(set(put)) == 2 + 16 + 1
    assert top_files(out) == top_files(tmp_path / "memory")
    assert not list(tmp_path.glob(".*"))


def test_the_command_names_parameters(folders, tmp_path, capsys):
    folder = folders("mixtral", torch.bfloat16)
    given = ["init", str(folder), "--method", "pissa", "--stream", "--rank", "3", "--targets", "q_proj", "--parameters"]
    main([*given, ",".join(EXPERTS), "--out", str(tmp_path / "stream")])
    assert len(load_file(tmp_path / "stream" / "adapter_model.safetensors")) == 4 * 2 * 3
    model = hs.load_checkpoint(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "stream")
    trained(model, steps=1)
    with pytest.raises(SystemExit):
        main([*given, "experts.down_prj", "--out", str(tmp_path / "no")])
    assert "Did you mean 'experts.down_proj'?" in capsys.readouterr().err


def test_experts_of_one_parameter_that_can_have_no_common_form_are_refused_before_anything_is_read(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    for own in (hs.LoRA(), hs.MiCA()):
        other = hs.PiSSA() if own == hs.LoRA() else hs.LoRA()
        method = hs.PerLayer({"experts.0.*": own, "*": other})
        with pytest.raises(LayerError, match=r"experts\.0\.\w+' and '.*experts\.1\.\w+' are matrices of one parameter"):
            streamed(folders("mixtral"), method, tmp_path / "out")
    with pytest.raises(LayerError, match="a core between A and B"):
        streamed(folders("mixtral"), "lora-xs", tmp_path / "out")
    assert not (tmp_path / "out").exists()
