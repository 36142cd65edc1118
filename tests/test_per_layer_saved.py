"""Different methods for different layers, from the start on: forms side by side, files, streams, commands, runs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import headstart as hs
from conftest import all_factors, factors_of, logits, tiny_llama, token_batch, wrap
from headstart.errors import RunError
from headstart.layers import install as installing
from headstart.layers.checkpoint import read_adapter
from headstart.layers.core import core_of, form_of
from headstart.layers.find import lora_layers, record
from headstart.layers.inspection import inspect_adapter
from headstart.runs.plan import planned
from headstart.runs.read import flat_settings, read_run, validated
from headstart.runs.stages import execute
from headstart.runs.tree import Run
from headstart.stream import load_residual, stream_start
from oracles import relative
from running import llama_folder, small_run, sums
from test_cli import run as command
from test_processes import batches

MIXED = hs.PerLayer(
    {
        "q_proj|v_proj": "pissa",
        "up_proj": "lora-xs:std=0.1",
        "gate_proj": "lora-one:samples=4",
        "down_proj": "mica",
        "*": "lora",
    }
)
FORMS = {"q_proj": "anchored", "v_proj": "anchored", "up_proj": "core"}


def mixed(form="anchored"):
    model = wrap(tiny_llama())
    report = hs.initialize_(model, MIXED, data=batches(), form=form, progress=False)
    return model, report


def last(name):
    return name.rpartition(".")[2]


def trained(model):
    """As after training: what trains has moved, and nothing else."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


# Forms side by side.


def test_each_layer_has_the_form_and_the_note_of_its_method():
    model, report = mixed()
    for target, layer in zip(lora_layers(model, "default"), report.layers, strict=True):
        assert form_of(target.module, "default") == FORMS.get(last(target.name))
        assert layer.form == FORMS.get(last(layer.name), "kept")
        note = record(target)
        assert (note["method"], note["form"]) == (layer.method, layer.form)
    assert report.form == "anchored and kept and core" and report.method == str(MIXED)
    text = str(report)
    assert "lora-xs:std=0.1" in text and "mica" in text
    assert {layer["method"] for layer in report.to_dict()["layers"]} == {str(own) for own in MIXED.methods}


def test_one_method_has_no_column_of_methods():
    model = wrap(tiny_llama())
    assert "method" not in str(hs.initialize_(model, hs.PerLayer({"*": "pissa"}), progress=False)).splitlines()[1]


def test_what_trains_is_what_each_method_leaves_to_train():
    model, report = mixed()
    for target in lora_layers(model, "default"):
        module, kind = target.module, last(target.name)
        A, B = (getattr(module, name)["default"].weight.requires_grad for name in ("lora_A", "lora_B"))
        core = core_of(module, "default")
        assert {"up_proj": (False, False), "down_proj": (True, False)}.get(kind, (True, True)) == (A, B)
        assert (core is not None and core.requires_grad) == (kind == "up_proj")
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_model_is_the_base_model_but_for_the_starts_that_are_kept():
    model, _ = mixed()
    expected = tiny_llama()
    modules = dict(expected.named_modules())
    with torch.no_grad():
        for target in lora_layers(model, "default"):
            if last(target.name) in ("up_proj", "gate_proj"):
                A, B = factors_of(target.module)
                core = core_of(target.module, "default")
                modules[target.name].weight += target.scaling * (B if core is None else B @ core) @ A
    assert torch.allclose(logits(model, token_batch()), logits(expected, token_batch()), atol=1e-5)


@pytest.mark.parametrize("fails_at", [1, 6, 13])
def test_a_failure_half_way_leaves_all_layers_as_they_were(fails_at, monkeypatch):
    model = wrap(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, plain, count = model.peft_config["default"], installing._install_one, 0

    def failing(*arguments):
        nonlocal count
        plain(*arguments)
        count += 1
        if count > fails_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(installing, "_install_one", failing)
    with pytest.raises(KeyboardInterrupt):
        hs.initialize_(model, MIXED, data=batches(), form="residual", progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.peft_config["default"] is config
    monkeypatch.undo()
    hs.initialize_(model, MIXED, data=batches(), progress=False)


# Files.


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_a_checkpoint_goes_on_and_a_plain_adapter_does_the_same(form, tmp_path):
    model, report = mixed(form)
    trained(model)
    batch = token_batch()
    expected = logits(model, batch)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    assert torch.allclose(logits(loaded, batch), expected, atol=1e-5)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == names
    hs.save_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert torch.allclose(logits(plain, batch), expected, atol=1e-4)
    # Anchored and residual layers have twice the rank, the others their own.
    ranks = {target.name: target.r for target in lora_layers(plain, "default")}
    assert ranks == {layer.name: 8 if layer.form == form else 4 for layer in report.layers}
    description = inspect_adapter(read_adapter(tmp_path / "checkpoint"))
    assert description.method == ", ".join(sorted(map(str, MIXED.methods)))
    assert {last(layer.name): layer.form for layer in description.layers}["gate_proj"] == "lora"
    if form == "anchored":
        merged = model.merge_and_unload()
        assert torch.allclose(logits(merged, batch), expected, atol=1e-4)


def test_peft_alone_builds_the_layers_from_the_config(tmp_path):
    model, _ = mixed()
    trained(model)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint")
    assert {last(t.name): form_of(t.module, "default") for t in lora_layers(loaded, "default")}["up_proj"] == "core"
    assert torch.allclose(logits(loaded, token_batch()), logits(model, token_batch()), atol=1e-5)


def test_an_adapter_whose_ranks_were_shared_out_beside_a_core(tmp_path):
    model = wrap(tiny_llama())
    method = hs.PerLayer({"q_proj|up_proj|down_proj": "eva:samples=8,rho=3", "o_proj": "lora-xs", "*": "pissa"})
    hs.initialize_(model, method, data=batches(), progress=False)
    trained(model)
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    loaded = hs.load_checkpoint(tiny_llama(), tmp_path / "checkpoint")
    assert torch.allclose(logits(loaded, token_batch()), logits(model, token_batch()), atol=1e-5)


def test_layers_that_were_quantised_and_layers_that_were_not(tmp_path):
    pytest.importorskip("bitsandbytes")
    from test_quantised import WIDE, quantised

    tiny_llama(**WIDE).save_pretrained(tmp_path)
    targets = ["q_proj", "up_proj", "lm_head"]  # the head is never quantised

    def made(method):
        model = wrap(quantised(tmp_path), target_modules=targets)
        hs.initialize_(model, method, progress=False)
        return all_factors(model)

    loftq = made(hs.PerLayer({"lm_head": "pissa", "up_proj": "loftq", "*": f"loftq:model_path={tmp_path}"}))
    with pytest.raises(hs.LayerError, match="'lm_head' is not quantised"):
        made("loftq")
    targets.remove("lm_head")
    for name, own in made("loftq").items():
        assert all(torch.equal(one, other) for one, other in zip(loftq[name], own, strict=True))
    assert loftq["lm_head"][0].count_nonzero() and len(loftq) == 5


# Streams.

STREAMED = hs.PerLayer(
    {
        r"layers\.0\.self_attn\.\w+": "inilora:solver=adam,steps=5",
        "self_attn.*": "inilora:solver=svd",
        "up_proj": "lora-xs",
        "*": "lora",
    }
)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("threads", [1, 2])
def test_streamed_is_in_memory_byte_for_byte(form, threads, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    config = dict(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**config))
    expected = hs.initialize_(model, STREAMED, form=form, progress=False)
    hs.save_checkpoint(model, tmp_path / "memory")
    torch.set_num_threads(threads)
    try:
        out, base = tmp_path / "stream", tmp_path / "base"
        report = stream_start(base, STREAMED, LoraConfig(**config), out, form=form, progress=False)
    finally:
        torch.set_num_threads(1)
    streamed = contents(out)
    assert {name: streamed[name] for name in contents(tmp_path / "memory")} == contents(tmp_path / "memory")
    assert (report.form, report.trainable) == (expected.form, expected.trainable)
    assert [layer.method for layer in report.layers] == [layer.method for layer in expected.layers]
    if form == "residual":
        loaded, own = load_residual(out), dict(model.named_parameters())
        assert {name for name, _ in loaded.named_parameters()} == own.keys()
        assert all(torch.equal(value, own[name]) for name, value in loaded.named_parameters())


def test_a_stream_refuses_what_it_cannot_make_of_any_layer(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear")
    for by_pattern, words in (
        ({"q_proj": "pissa", "*": "lora-one"}, "'lora-one' needs the whole model"),
        ({"q_porj": "pissa", "*": "lora"}, "'q_porj' takes no layer"),
    ):
        with pytest.raises(hs.MethodError, match=words):
            stream_start(tmp_path / "base", hs.PerLayer(by_pattern), config, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


# Commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


def test_init_takes_it_as_text(folder, data, tmp_path, capsys):
    text = 'per-layer:{"q_proj|v_proj": "pissa", "up_proj": "lora-one:samples=4", "*": "lora"}'
    code, out, error = command(
        capsys, "init", folder, "--method", text, "--data", data, "--rank", "4", "--out", tmp_path / "start"
    )
    assert code == 0, error
    assert "lora-one:samples=4" in out and "4 samples" in out
    methods = {
        note["method"] for note in json.loads((tmp_path / "start" / "headstart.json").read_text())["layers"].values()
    }
    assert methods == {"pissa", "lora-one:samples=4", "lora"}
    code, _, error = command(capsys, "init", folder, "--method", text, "--out", tmp_path / "other")
    assert code == 1 and "method 'lora-one' needs data" in error
    code, out, _ = command(capsys, "inspect", tmp_path / "start")
    assert code == 0 and "lora, lora-one:samples=4, pissa" in out


def test_init_gives_each_method_the_samples_that_it_has_alone(folder, tmp_path, capsys):
    data = tmp_path / "longest_first.jsonl"
    rows = [{"question": "a" * (40 - row), "answer": f"b\n#### {row}"} for row in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(method, name):
        out = tmp_path / name
        code, _, error = command(capsys, "init", folder, "--method", method, "--data", data, "--out", out)
        assert code == 0, error
        return read_adapter(out).layers

    few, many = "lora-one:samples=3", "lora-one:samples=20"
    mixed = made(str(hs.PerLayer({"up_proj": few, "*": many})), "mixed")
    own = {few: made(few, "few"), many: made(many, "many")}
    for name, layer in mixed.items():
        expected, other = (own[key][name] for key in ((few, many) if last(name) == "up_proj" else (many, few)))
        assert relative(layer.B @ layer.A, expected.B @ expected.A) < 1e-4
        assert relative(layer.B @ layer.A, other.B @ other.A) > 1e-2


def test_methods_shows_it(capsys):
    code, out, _ = command(capsys, "methods", "per-layer")
    assert code == 0 and "the first that matches wins" in " ".join(out.split())


def test_init_streams_it(folder, tmp_path, capsys):
    text = 'per-layer:{"q_proj": "pissa", "*": "lora"}'
    code, _, error = command(capsys, "init", folder, "--stream", "--method", text, "--out", tmp_path / "start")
    assert code == 0, error
    assert len(load_file(tmp_path / "start" / "adapter_model.safetensors")) > 14


# Runs.

BY_PATTERN = {"q_proj": "pissa", "*": "lora-one:samples=4"}
TEXT = 'per-layer:{"q_proj": "pissa", "*": "lora-one:samples=4"}'


def test_a_single_method_keeps_its_key_and_its_folder():
    for settings, name in (
        ({}, "smollm2-problems-lora-s0-7674a781"),
        ({"start": "pissa"}, "smollm2-problems-pissa-s0-63aad823"),
        (
            {"start": {"method": "lora-da:samples=64", "form": "residual"}, "seed": 3},
            "smollm2-problems-lora-da_samples=64-s3-319c78f0",
        ),
    ):
        assert validated(settings, "a test").folder_name == name


def test_a_mapping_in_a_file_and_on_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text('start:\n  method:\n    q_proj: pissa\n    "*": "lora-one:samples=4"\n')
    run, origins = read_run(path)
    assert run.start.method == TEXT and origins == {"start.method": "run.yaml"}
    for override in (
        'start.method={q_proj: pissa, "*": "lora-one:samples=4"}',
        'start={method: {q_proj: pissa, "*": "lora-one:samples=4"}}',
        f"start={TEXT}",
        f"start.method={TEXT}",
    ):
        changed, origins = read_run(None, [override])
        assert changed == run and changed.key == run.key and origins == {"start.method": override}
        assert origins.keys() < flat_settings(changed).keys()
    changed, origins = read_run(path, ["start.method.q_proj=milora"])
    assert changed.start.method == TEXT.replace("pissa", "milora")
    assert origins == {"start.method": "start.method.q_proj=milora"}
    # The first that fits wins, so the order is a part of the key.
    turned = Run.model_validate({"start": {"method": dict(reversed(BY_PATTERN.items()))}})
    assert turned.key != run.key
    assert Run.model_validate(json.loads(json.dumps(run.model_dump(mode="json"), sort_keys=True))) == run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{q_proj: 3}", "start.method: 'q_proj' stands for 3: write a pattern of layers and its method"),
        ("{q_proj: {v_proj: lora}}", "start.method: 'q_proj' stands for {'v_proj': 'lora'}"),
        ("{1: lora}", "start.method: 1 stands for 'lora'"),
        ("{q_proj: lora, q_proj: pissa}", "'q_proj' is given twice"),
        ("[pissa]", r"start.method=\['pissa'\] should be a valid string"),
    ],
)
def test_mappings_that_are_none_are_one_sentence(text, words, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"start: {{method: {text}}}")
    with pytest.raises(RunError, match=words) as error:
        read_run(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("by_pattern", "words"),
    [
        ({}, "needs a pattern and its method"),
        ({"q_proj": "pisa"}, "unknown method 'pisa'. Did you mean 'pissa'"),
        ({"q_proj": "per-layer:{}"}, "needs a pattern"),
    ],
)
def test_show_refuses_what_is_no_method(by_pattern, words, capsys):
    code, _, error = command(capsys, "train", f"start.method={json.dumps(by_pattern)}", "--show")
    assert code == 2 and words in error and error.count("\n") <= 3


def test_show_and_check_say_what_the_verb_says(folder, tmp_path, capsys):
    given = [f"model={folder}", "data.task=text", "adapter.r=4", "adapter.alpha=8"]
    method = 'start.method={"q_proj|v_proj": pissa, up_proj: "lora-xs", "*": lora}'
    code, out, _ = command(capsys, "train", *given, method, "--show")
    assert code == 0 and "start.method" in out and "per-layer:" in out
    run, _ = read_run(None, [*given, method])
    model = wrap(tiny_llama(vocab_size=planned_vocabulary(folder)))
    report = hs.initialize_(model, run.start.method, progress=False)
    assert planned(run).trainable == report.trainable
    for bad, words in (
        ("q_porj: pissa", "Did you mean 'q_proj'"),
        ("q_proj: pissa", "'model.layers.0.self_attn.k_proj'"),
    ):
        rest = ', "*": lora' if "porj" in bad else ""
        code, _, error = command(capsys, "train", *given, f"start.method={{{bad}{rest}}}", "--check")
        assert code == 1 and words in " ".join(error.split())


def planned_vocabulary(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_check_counts_what_lora_fa_leaves_to_train(folder):
    for method in ("pissa", {"q_proj": "pissa", "*": "lora"}):
        run = Run.model_validate(
            {"model": str(folder), "data": {"task": "text"}, "start": {"method": method}, "trains": "lora-fa"}
            | {"model": {"name": str(folder)}}
        )
        model = wrap(tiny_llama(vocab_size=planned_vocabulary(folder)), r=8)
        hs.initialize_(model, run.start.method, progress=False)
        assert planned(run).trainable == hs.lora_fa_(model)


def test_a_run_starts_its_layers_by_pattern_and_says_so(folder, data, tmp_path):
    run = small_run(folder, data, start={"method": BY_PATTERN}, schedule={"steps": 2})
    assert "per-layer" in run.folder_name and run.folder_name.endswith(run.key) and "/" not in run.folder_name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = execute(run, tmp_path / "run")
    assert result.status == "done"
    assert (result.start["method"], result.start["form"]) == (TEXT, "anchored and kept")
    assert result.start["samples"] == 4
    card = ModelCard.load(tmp_path / "run" / "trained" / "adapter" / "README.md")
    assert f"start `{TEXT}` (form anchored and kept)" in card.text and card.text.count("# tiny-per-layer\n") == 1
    notes = json.loads((tmp_path / "run" / "start" / "checkpoint" / "headstart.json").read_text())["layers"]
    assert {last(name): note["method"] for name, note in notes.items()} == {
        "q_proj": "pissa",
        "v_proj": "lora-one:samples=4",
    }
    # It is the same run when it is asked for again.
    assert execute(run, tmp_path / "run").metrics == result.metrics
