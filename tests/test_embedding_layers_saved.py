"""Embeddings with a start: saved, loaded, exported, merged; beside layers of other kinds and parts trained whole."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import headstart as hs
from conftest import logits, token_batch, wrap
from embedded import BESIDE, MODELS, base_of, embeddings, update
from headstart.errors import CheckpointError, LayerError
from headstart.layers.checkpoint import read_adapter
from headstart.layers.export import write_merged
from headstart.layers.factors import both
from headstart.layers.inspection import inspect_adapter
from oracles import relative
from snapshots import assert_unchanged, snapshot


def adapted(name, dtype=torch.float32, **changes):
    return wrap(base_of(name, dtype), **({"target_modules": [*MODELS[name][2], BESIDE[name]]} | changes))


def trained(model, batches):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def batches_of(name, count=3):
    return [MODELS[name][1](seed=seed) for seed in range(count)]


METHODS = ["lora", "pissa", "lora-one:samples=4", "mica", "residual"]


@pytest.mark.parametrize(
    ("name", "method"),
    # Residual weights of tied embeddings are refused.
    [(name, method) for name in MODELS for method in METHODS if method != "residual" or name in ("llama", "bert")],
)
def test_a_trained_start_is_exported_saved_and_merged(name, method, tmp_path):
    base, model, (batch, *more) = base_of(name), adapted(name, use_rslora=True), batches_of(name)
    before = logits(model, batch)
    form = "residual" if method == "residual" else "anchored"
    hs.initialize_(model, "pissa" if form == "residual" else method, data=[batch], cache=False, form=form)
    trained(model, more)
    expected = logits(model, batch)
    assert relative(expected, before) > 1e-3
    hs.save_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(base_of(name), tmp_path / "plain")
    assert relative(logits(plain, batch), expected) < 1e-4
    rank = 4 if method in ("lora", "lora-one:samples=4", "mica") else 8
    assert {both(module, "default")[0].shape[0] for module in embeddings(plain).values()} == {rank}
    keys = set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert not any("lora_start" in key for key in keys)
    for layer in embeddings(model):
        assert {f"base_model.model.{layer}.lora_embedding_{which}" for which in "AB"} <= keys
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    again = hs.load_checkpoint(base_of(name), tmp_path / "checkpoint")
    assert relative(logits(again, batch), expected) < 1e-6
    if form == "anchored":
        model.save_pretrained(tmp_path / "peft")
        native = PeftModel.from_pretrained(base_of(name), tmp_path / "peft")
        assert relative(logits(native, batch), expected) < 1e-6
        assert {type(m.lora_variant.get("default")) for m in embeddings(native).values()} == {
            type(m.lora_variant.get("default")) for m in embeddings(model).values()
        }
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), before)
    described = {line.name: line for line in inspect_adapter(read_adapter(tmp_path / "checkpoint")).layers}
    for layer, module in embeddings(model).items():
        line = described[layer]
        assert (line.d_out, line.d_in, line.r) == (32, module.get_base_layer().num_embeddings, 4)
        assert line.norm == pytest.approx(float(update(module).norm()), rel=1e-4)
    other = base_of(name)
    with torch.no_grad():
        other.get_input_embeddings().weight += 0.1
    with pytest.raises(CheckpointError, match=r"another base model.*embed"):
        hs.load_checkpoint(other, tmp_path / "checkpoint")
    if name in ("llama", "bert"):
        model.merge_adapter()
        assert relative(logits(model, batch), expected) < 1e-4
        model.unmerge_adapter()
        assert relative(logits(model, batch), expected) < 1e-4
        merged = model.merge_and_unload(safe_merge=True)
        assert relative(logits(merged, batch), expected) < 1e-4
    assert base.config.vocab_size == 97


@pytest.mark.parametrize("method", ["pissa", "lora-one:samples=4"])
def test_truncation_is_the_best_of_the_rank(method, tmp_path):
    model = adapted("llama", target_modules=["embed_tokens"])
    hs.initialize_(model, method, data=batches_of("llama", 1), cache=False, progress=False)
    trained(model, batches_of("llama"))
    (module,) = embeddings(model).values()
    whole = update(module)
    U, S, Vh = torch.linalg.svd(whole)
    error = hs.save_lora(model, tmp_path / "less", rank=2)
    assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    less = PeftModel.from_pretrained(base_of("llama"), tmp_path / "less")
    (module,) = embeddings(less).values()
    torch.testing.assert_close(update(module), (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_the_embeddings_that_peft_writes_beside_are_written_once_and_untouched(form, tmp_path):
    """PEFT writes an adapted embedding's own weight, too."""
    for name in ("llama", "tied") if form == "anchored" else ("llama",):
        model = adapted(name)
        own = base_of(name).get_input_embeddings().weight.detach()
        model.save_pretrained(tmp_path / name / "pefts")
        hs.initialize_(model, "pissa", form=form, cache=False, progress=False)
        hs.save_lora(model, tmp_path / name / "plain")
        hs.save_lora(model, tmp_path / name / "without", save_embedding_layers=False)
        plain, without, pefts = (
            load_file(tmp_path / name / folder / "adapter_model.safetensors")
            for folder in ("plain", "without", "pefts")
        )
        assert plain.keys() == pefts.keys()
        (key,) = plain.keys() - without.keys()
        assert key == "base_model.model.model.embed_tokens.base_layer.weight"
        torch.testing.assert_close(plain[key], own, rtol=1e-6, atol=1e-6)
        batch = token_batch()
        for folder in ("plain", "without"):
            loaded = PeftModel.from_pretrained(base_of(name), tmp_path / name / folder)
            assert relative(logits(loaded, batch), logits(model, batch)) < 1e-5


@pytest.mark.parametrize(
    ("target", "method"),
    [
        *(
            (target, method)
            for target in ("embed_tokens", "lm_head")
            for method in ("lora", "pissa", "lora-one:samples=4")
        ),
        ("lm_head", "lora-xs"),
    ],
)
def test_tied_weights_keep_their_other_holder_as_it_is(target, method):
    """An adapter of one of them is no business of the other's, and no gradient comes from there."""
    base, model, (batch, *more) = base_of("tied"), adapted("tied", target_modules=[target]), batches_of("tied")
    report = hs.initialize_(model, method, data=[batch], cache=False, progress=False)
    assert len(report.layers) == 1
    if report.form == "anchored" or method == "lora":
        assert torch.equal(logits(model, batch), logits(base, batch))
    trained(model, more)
    inside, weight = model.base_model.model, base.lm_head.weight
    assert inside.lm_head.weight is inside.model.embed_tokens.weight and torch.equal(inside.lm_head.weight, weight)
    untied = copy.deepcopy(base)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    (layer,) = (module for module in model.modules() if hasattr(module, "lora_variant"))
    with torch.no_grad():
        holder = untied.model.embed_tokens if target == "embed_tokens" else untied.lm_head
        variant = layer.lora_variant.get("default")
        delta = layer.get_delta_weight("default") if variant is None else variant.delta(layer, "default")
        holder.weight += delta
    assert relative(logits(model, batch), logits(untied, batch)) < 1e-4


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_weights_are_neither_subtracted_from_nor_merged_into(target, tmp_path):
    model = adapted("tied", target_modules=[target])
    before = snapshot(model)
    with pytest.raises(LayerError, match=rf"{target}' shares its weight with .*residual weights would change both"):
        hs.initialize_(model, "pissa", form="residual", cache=False, progress=False)
    assert_unchanged(model, before)
    hs.initialize_(model, "pissa", cache=False, progress=False)
    trained(model, batches_of("tied"))
    batch = token_batch()
    expected = logits(model, batch)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            LayerError, match=rf"{target}' shares its weight with .*merged, its adapter would change both"
        ):
            merge()
    assert torch.equal(logits(model, batch), expected)
    hs.save_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(base_of("tied"), tmp_path / "plain")
    assert relative(logits(plain, batch), expected) < 1e-5
    with pytest.raises(LayerError, match=rf"{target}' shares its weight"):
        write_merged(plain, None, tmp_path / "merged")
    inside = model.base_model.model
    head = inside.lm_head.get_base_layer() if target == "lm_head" else inside.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert relative(logits(model.merge_and_unload(), batch), expected) < 1e-4


def test_adapters_that_peft_ties_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted("tied", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(LayerError, match="ensure_weight_tying=True ties their adapters"):
        hs.initialize_(model, "pissa", progress=False)


def test_a_residual_checkpoint_is_not_loaded_into_tied_weights(tmp_path):
    model = adapted("llama", target_modules=["embed_tokens"])
    hs.initialize_(model, "pissa", form="residual", cache=False, progress=False)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    tied = base_of("llama")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(CheckpointError, match=r"embed_tokens' is residual there.* 'lm_head' as well"):
        hs.load_checkpoint(tied, tmp_path / "checkpoint")


def test_layers_of_different_forms_are_loaded_by_peft(tmp_path):
    """PEFT builds embeddings without telling their names; the tensors tell their form."""
    methods = {".*embed.*": hs.LoRA(), "*": hs.PiSSA()}
    for start in (methods, {".*embed.*": hs.PiSSA(), "*": hs.LoRA()}):
        model, batch = adapted("bert"), MODELS["bert"][1]()
        hs.initialize_(model, hs.PerLayer(start), cache=False, progress=False)
        trained(model, batches_of("bert"))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(folder)
        native = PeftModel.from_pretrained(base_of("bert"), folder)
        assert relative(logits(native, batch), logits(model, batch)) < 1e-6
        base = get_peft_model(base_of("bert"), LoraConfig(r=2, target_modules=["value"]))
        base.load_adapter(folder, "second")
        base.set_adapter("second")
        assert relative(logits(base, batch), logits(model, batch)) < 1e-6


@pytest.mark.parametrize("method", ["pissa", "lora-one:samples=4"])
def test_a_trainer_resumes(method, tmp_path):
    rows = [{k: v[row] for k, v in token_batch(8, padded=False).items()} for row in range(8)]

    def trainer(steps, folder):
        model = adapted("llama")
        hs.initialize_(model, method, data=[token_batch()], cache=False, progress=False)
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True
        )
        return Trainer(model, arguments, train_dataset=rows)

    whole = trainer(4, tmp_path / "whole")
    whole.train()
    cut = trainer(4, tmp_path / "cut")
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    batch = token_batch()
    assert relative(logits(cut.model, batch), logits(whole.model, batch)) < 1e-6
    loaded = hs.load_checkpoint(base_of("llama"), tmp_path / "whole" / "checkpoint-4")
    assert relative(logits(loaded, batch), logits(whole.model, batch)) < 1e-6


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=4"])
def test_offloaded_by_accelerate(method):
    model, batch = adapted("llama"), token_batch()
    hs.initialize_(model, method, data=[batch], cache=False, progress=False)
    base = base_of("llama")
    cpu_offload(base, execution_device=torch.device("cpu"))
    offloaded = wrap(base, target_modules=["embed_tokens", "q_proj"])
    assert offloaded.get_input_embeddings().weight.is_meta
    hs.initialize_(offloaded, method, data=[batch], cache=False, progress=False)
    assert relative(logits(offloaded, batch), logits(model, batch)) < 1e-6


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=4"])
@pytest.mark.parametrize("sharded", ["before", "after"])
def test_sharded_by_fsdp2(method, sharded, process_group):
    def shard(model):
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    model, wanted, batch = adapted("llama"), adapted("llama"), token_batch()
    hs.initialize_(wanted, method, data=[batch], cache=False, progress=False)
    if sharded == "before":
        shard(model)
    hs.initialize_(model, method, data=[batch], cache=False, progress=False)
    if sharded == "after":
        shard(model)
    for one in (model, wanted):
        one(**batch).loss.backward()
    (own,), (expected,) = embeddings(model).values(), embeddings(wanted).values()
    for part, other in zip(both(own, "default"), both(expected, "default"), strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), other.grad)
    assert relative(logits(model, batch), logits(wanted, batch)) < 1e-6


class Mixed(nn.Module):
    """A convolution over embedded tokens, a linear layer, and two heads that are trained whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 12, 3, padding=1)
        self.mix = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, input_ids, labels=None):
        hidden = torch.tanh(self.conv(self.embed(input_ids).mT)).mT
        scores = self.head(self.norm(torch.tanh(self.mix(hidden))).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return {"loss": loss, "logits": scores}


def mixed_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (4, 9), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 5, (4,), generator=generator)}


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ["lora", "pissa", "lora-one:samples=4"])
def test_parts_trained_whole_are_saved_beside_every_kind_of_layer(method, form, tmp_path):
    config = LoraConfig(r=3, target_modules=["embed", "conv", "mix"], modules_to_save=["head", "norm"])
    model, batch = get_peft_model(Mixed(), config), mixed_batch()
    report = hs.initialize_(model, method, data=[batch], form=form, cache=False, progress=False)
    assert {layer.name for layer in report.layers} == {"embed", "conv", "mix"}
    assert report.left_out.parameters == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        model(**mixed_batch(seed))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def scores(model):
        return model.eval()(**batch)["logits"].detach()

    expected = scores(model)
    assert not torch.equal(model.base_model.model.head.modules_to_save["default"].weight, Mixed().head.weight)
    hs.save_lora(model, tmp_path / "plain")
    assert relative(scores(PeftModel.from_pretrained(Mixed(), tmp_path / "plain")), expected) < 1e-4
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    assert relative(scores(hs.load_checkpoint(Mixed(), tmp_path / "checkpoint")), expected) < 1e-5
    if form == "anchored" or method != "pissa":
        model.save_pretrained(tmp_path / "peft")
        assert relative(scores(PeftModel.from_pretrained(Mixed(), tmp_path / "peft")), expected) < 1e-5
    assert relative(scores(model.merge_and_unload()), expected) < 1e-4
