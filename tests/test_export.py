"""Leaving: what save_lora writes, read back by PEFT in a process that never imported headstart."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import headstart as hs
from conftest import ARCHITECTURES, factors_of, logits, perturb, started, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from headstart.layers.export import save_config, write_merged
from headstart.layers.find import lora_layers


def reloaded(base, path):
    return PeftModel.from_pretrained(base, path)


@torch.no_grad()
def deltas(model):
    """Each layer's whole update s (B A - B0 A0), dense and in float64."""
    from headstart.layers.anchored import anchors

    found = {}
    for target in lora_layers(model, "default"):
        A, B = (factor.double() for factor in factors_of(target.module))
        held = anchors(target.module, "default")
        A0, B0 = (part.double() for part in held) if held else (A * 0, B * 0)
        found[target.name] = target.scaling * (B @ A - B0 @ A0)
    return found


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["lora", "init-ab:beta=3", "init-ab-plus", "pissa"])
def test_plain_lora_has_the_same_logits(method, use_rslora, tmp_path, batch):
    model = started(
        tiny_llama(),
        method,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"down_proj": 3, "q_proj": 5},
    )
    perturb(model)
    assert hs.save_lora(model, tmp_path / "adapter") == 0.0
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = reloaded(tiny_llama(), tmp_path / "adapter")
    expected = logits(model, batch)
    assert (logits(plain, batch) - expected).norm() <= 1e-5 * expected.norm()
    assert not any("lora_start" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    factor = 1 if method in ("lora", "init-ab-plus") else 2
    assert plain.peft_config["default"].r == 4 * factor
    for mine, theirs in zip(lora_layers(model, "default"), lora_layers(plain, "default"), strict=True):
        assert theirs.r == factor * mine.r
        assert theirs.scaling == pytest.approx(mine.scaling, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_leaves(architecture, tmp_path):
    make, batch_of, targets = ARCHITECTURES[architecture]
    model = started(make(), "init-ab:beta=2", target_modules=targets)
    perturb(model)
    hs.save_lora(model, tmp_path / "adapter")
    expected = logits(model, batch_of())
    found = logits(reloaded(make(), tmp_path / "adapter"), batch_of())
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_residual_leaves_for_the_untouched_base(tmp_path, batch):
    model = started(tiny_llama(), "pissa", form="residual")
    perturb(model)
    hs.save_lora(model, tmp_path / "adapter")
    expected = logits(model, batch)
    found = logits(reloaded(tiny_llama(), tmp_path / "adapter"), batch)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_trained_head_goes_along(tmp_path):
    batch = ARCHITECTURES["bert"][1]()
    model = started(tiny_bert(), "pissa", target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    perturb(model)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    hs.save_lora(model, tmp_path / "adapter")
    expected = logits(model, batch)
    found = logits(reloaded(tiny_bert(), tmp_path / "adapter"), batch)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_truncation_is_the_best_of_its_rank(rank, tmp_path, batch):
    model = started(tiny_llama(), "init-ab:beta=2")
    perturb(model, scale=0.2)
    error = hs.save_lora(model, tmp_path / "adapter", rank=rank)
    whole = deltas(model)
    plain = deltas(reloaded(tiny_llama(), tmp_path / "adapter"))
    lost = size = best = 0.0
    for name, delta in whole.items():
        assert torch.linalg.matrix_rank(plain[name], rtol=1e-5) <= rank
        lost += float((delta - plain[name]).square().sum())
        size += float(delta.square().sum())
        best += float(torch.linalg.svdvals(delta)[rank:].square().sum())
    assert error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert error == pytest.approx((best / size) ** 0.5, rel=1e-4)
    assert error > 0


def test_a_rank_that_is_enough_loses_nothing(tmp_path, batch):
    model = started(tiny_llama(), "init-ab:beta=2")
    perturb(model)
    assert hs.save_lora(model, tmp_path / "adapter", rank=8) == 0.0
    assert hs.save_lora(model, tmp_path / "more", rank=100) == 0.0


def test_an_unaware_process_gets_the_same_logits(tmp_path, fresh):
    model = started(tiny_gpt2(), "init-ab:beta=2", target_modules=["c_attn", "c_proj"])
    perturb(model)
    hs.save_lora(model, tmp_path / "adapter")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    batch = token_batch()
    save_file({**batch, "expected": logits(model, batch)}, tmp_path / "case.safetensors")
    script = f"""
import sys
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
case = load_file({str(tmp_path / "case.safetensors")!r})
expected = case.pop("expected")
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
assert "headstart" not in sys.modules
for each in (model, model.merge_and_unload()):
    found = each(**case).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
"""
    fresh.run(script)


@pytest.mark.parametrize("save", [hs.save_lora, hs.save_checkpoint])
def test_only_an_adapters_own_files_are_replaced(save, tmp_path, batch):
    """A Trainer's output folder holds what nobody wants to lose."""
    model = started(tiny_llama(), "pissa")
    out = tmp_path / "run"
    arguments = TrainingArguments(out, max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    (out / "eval_results.json").write_text("{}")
    hs.save_checkpoint(model, tmp_path / "c")
    shutil.copy(tmp_path / "c" / "headstart.json", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ours = {out / name for name in ("adapter_model.safetensors", "adapter_config.json", "headstart.json")}
    with pytest.raises(
        hs.CheckpointError,
        match=r"replaces adapter_config.json, adapter_model.safetensors and headstart.json there, and leaves "
        r"README.md, checkpoint-1, checkpoint-2, eval_results.json and 1 more as they are",
    ):
        save(model, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    perturb(model)
    save(model, out, force=True)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert before.keys() - ours <= after.keys() <= before.keys()
    assert all(after[path] == before[path] for path in before.keys() - ours)
    load = {hs.save_lora: PeftModel.from_pretrained, hs.save_checkpoint: hs.load_checkpoint}[save]
    wanted = logits(model, batch)
    assert (logits(load(tiny_llama(), out), batch) - wanted).norm() <= 1e-6 * wanted.norm()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "run"]


def test_a_merged_model_replaces_a_model_and_never_an_adapter(tmp_path, batch):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    model = started(tiny_llama(), "pissa")
    perturb(model)
    wanted, out = logits(model, batch), tmp_path / "out"
    tiny_llama().save_pretrained(out, max_shard_size="20KB")
    (out / "notes").write_text("mine")
    hs.save_lora(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(hs.CheckpointError, match="holds an adapter, which Transformers would add"):
        write_merged(model, Tokenizer(), tmp_path / "adapter", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    write_merged(model, Tokenizer(), out, force=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes", "tokenizer.json",
    ]  # fmt: skip
    assert (logits(LlamaForCausalLM.from_pretrained(out), batch) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_others_may_read_what_the_user_lets_them_read(tmp_path):
    before = os.umask(0o027)
    try:
        hs.save_lora(started(tiny_llama()), tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in [tmp_path / "adapter", *(tmp_path / "adapter").iterdir()]
    }
    assert modes == {"adapter": "0o750", "adapter_config.json": "0o640", "adapter_model.safetensors": "0o640"}


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import headstart.layers.export as export

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_config", broken)
    with pytest.raises(OSError, match="disk full"):
        hs.save_lora(started(tiny_llama()), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


class Alike(torch.nn.Module):
    """Layers whose names end alike, are parts of each other, or hold what regular expressions give a meaning to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = torch.nn.ModuleDict({"proj": torch.nn.Linear(16, 16), "my_proj": torch.nn.Linear(16, 16)})
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": torch.nn.Linear(16, 16)}) for _ in range(12))
        self.blockXproj = torch.nn.Linear(16, 16)
        self.proj = torch.nn.Linear(16, 16)

    def forward(self, x):
        # Side by side, because in a row they would blow up the rounding of float32.
        beside = (self.block["proj"], self.block["my_proj"], *(each["proj"] for each in self.blocks))
        return self.proj(self.blockXproj(sum(layer(x).tanh() for layer in beside)).tanh())


@pytest.mark.parametrize("save", ["save_lora", "rank", "uniform", "checkpoint"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_patterns_are_of_the_layers_that_they_name_and_no_others(method, use_rslora, save, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*proj",
        rank_pattern={"^proj": 2, "blocks.1.proj": 3, "block.proj": 1},
        alpha_pattern={"^proj": 3, "my_proj": 5, r"blocks\.1[01]\.proj": 7},
        use_rslora=use_rslora,
    )
    model = get_peft_model(Alike(), config)
    assert len({(target.r, target.scaling) for target in lora_layers(model, "default")}) >= 5
    hs.initialize_(model, method, progress=False)
    perturb(model, scale=0.2)
    if save == "checkpoint":
        hs.save_checkpoint(model, tmp_path / "a")
        loaded = hs.load_checkpoint(Alike(), tmp_path / "a")
    else:
        options = {"save_lora": {}, "rank": {"rank": 8}, "uniform": {"uniform": True}}[save]
        hs.save_lora(model, tmp_path / "a", **options)
        loaded = PeftModel.from_pretrained(Alike(), tmp_path / "a")
    x = torch.randn(3, 16, dtype=torch.float64)
    wanted = model.double()(x)
    assert (loaded.double()(x) - wanted).norm() <= 1e-6 * wanted.norm()
    for there, here in zip(lora_layers(loaded, "default"), lora_layers(model, "default"), strict=True):
        assert there.name == here.name
        found, expected = (each.module.get_delta_weight("default") for each in (there, here))
        if method == "lora":
            assert (found - expected).norm() <= 1e-5 * expected.norm(), there.name


def test_rank_must_be_positive(tmp_path):
    with pytest.raises(hs.CheckpointError, match="rank=0"):
        hs.save_lora(started(tiny_llama()), tmp_path / "adapter", rank=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 80))
def test_exported_ranks_and_scalings_fit_the_tensors(r, rank):
    """Over all ranks, with both scalings: what the config says is what the tensors are."""
    from headstart.layers.adapter import make_plain, split

    A, B = torch.randn(r, 90), torch.randn(95, r)
    tensors = {
        "base_model.model.layer.lora_A.weight": torch.ones_like(A),
        "base_model.model.layer.lora_B.weight": -torch.ones_like(B),
        "base_model.model.layer.lora_start_A.weight": A,
        "base_model.model.layer.lora_start_B.weight": B,
    }
    for use_rslora in (False, True):
        config = LoraConfig(r=r, lora_alpha=12, use_rslora=use_rslora)
        layers, rest = split(tensors, config)
        plain = make_plain(layers, rest, config, rank)
        again, _ = split(plain.tensors, plain.config)
        assert plain.config.r == again["layer"].A.shape[0] == min(rank, 2 * r)
        assert again["layer"].scaling == pytest.approx(layers["layer"].scaling, rel=1e-6)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "target_parameters"])
def test_names_are_written_in_one_order_whatever_the_process_has_them_in(tmp_path, field):
    names = {f"layers.{place}.proj" for place in range(10)}  # PEFT makes a set of target_parameters for mixtures
    save_config(LoraConfig(**{"target_modules": ["q_proj"]} | {field: names}), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())[field]
    assert written == sorted(names)
