"""Checkpoints: going on as if nothing had happened, and refusing what doesn't fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import headstart as hs
from conftest import (
    WRAPPERS,
    assert_refused_without_headstart,
    logits,
    perturb,
    started,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    wrap,
)
from headstart.layers.anchored import anchors
from headstart.layers.find import lora_layers


def steps(model, batch, count, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(count):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, optimizer


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("method", ["lora", "pissa", "init-ab-plus"])
def test_round_trip_goes_on_bit_for_bit(method, form, tmp_path, batch):
    model = started(tiny_llama(), method, form=form)
    _, optimizer = steps(model, batch, 3)
    hs.save_checkpoint(model, tmp_path / "c")
    again = hs.load_checkpoint(tiny_llama(), tmp_path / "c")
    assert torch.equal(logits(again, batch), logits(model, batch))
    state = copy.deepcopy(optimizer.state_dict())
    theirs = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    theirs.load_state_dict(state)
    assert steps(again, batch, 3, theirs)[0] == steps(model, batch, 3, optimizer)[0]


def test_into_a_model_that_is_already_wrapped_or_initialised(tmp_path, batch):
    model = started(tiny_llama(), "pissa")
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    fresh = wrap(tiny_llama())
    initialised = started(tiny_llama(), "init-ab", seed=3)
    for other in (fresh, initialised):
        hs.load_checkpoint(other, tmp_path / "c")
        assert torch.equal(logits(other, batch), logits(model, batch))


def test_as_a_second_adapter(tmp_path, batch):
    model = started(tiny_llama(), "pissa")
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    other = wrap(tiny_llama(), target_modules=["q_proj"], init_lora_weights=False)
    expected = logits(other, batch)
    hs.load_checkpoint(other, tmp_path / "c", adapter="second")
    assert torch.equal(logits(other, batch), expected)
    other.set_adapter("second")
    assert torch.equal(logits(other, batch), logits(model, batch))


def test_for_inference(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "pissa"), tmp_path / "c")
    for other in (tiny_llama(), wrap(tiny_llama())):
        model = hs.load_checkpoint(other, tmp_path / "c", trainable=False)
        assert not any(p.requires_grad for p in model.parameters())


def test_a_base_with_more_layers_is_refused_and_left_alone(tmp_path, batch):
    """The layers that the checkpoint knows are all there and all the same; only the others tell."""
    hs.save_checkpoint(started(tiny_llama(), "pissa", target_modules=["q_proj", "v_proj"]), tmp_path / "c")
    deeper = tiny_llama(num_hidden_layers=3)
    deeper.load_state_dict(tiny_llama().state_dict(), strict=False)
    names = [name for name, _ in deeper.named_parameters()]
    for wrapped in (False, True):
        other = wrap(deeper, target_modules=["q_proj"]) if wrapped else deeper
        with pytest.raises(hs.CheckpointError, match=r"'model.layers.2.*' is only in the model"):
            hs.load_checkpoint(other, tmp_path / "c", adapter="loaded")
    assert "loaded" not in other.peft_config
    assert [name for name, _ in other.unload().named_parameters()] == names


def test_a_loaded_adapter_is_not_initialised_again(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "lora"), tmp_path / "c")
    model = hs.load_checkpoint(tiny_llama(), tmp_path / "c")
    with pytest.raises(hs.LayerError, match="already initialised"):
        hs.initialize_(model, "pissa")


def test_a_head_that_trains_beside_comes_back(tmp_path):
    from conftest import class_batch

    model = started(tiny_bert(), "pissa", target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    steps(model, class_batch(), 2)
    hs.save_checkpoint(model, tmp_path / "c")
    again = hs.load_checkpoint(tiny_bert(), tmp_path / "c")
    assert torch.equal(logits(again, class_batch()), logits(model, class_batch()))


def test_truncated_weights_are_refused(tmp_path):
    hs.save_checkpoint(started(tiny_llama()), tmp_path / "c")
    file = tmp_path / "c" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(hs.CheckpointError, match="damaged or truncated"):
            hs.load_checkpoint(tiny_llama(), tmp_path / "c")
        # A Trainer's checkpoint has no checksum; safetensors' own check must be turned into words as well.
        record = tmp_path / "c" / "headstart.json"
        kept = record.read_text()
        record.unlink()
        with pytest.raises(hs.CheckpointError, match="damaged"):
            hs.load_checkpoint(tiny_llama(), tmp_path / "c")
        record.write_text(kept)


def test_a_flipped_bit_is_found(tmp_path):
    hs.save_checkpoint(started(tiny_llama()), tmp_path / "c")
    file = tmp_path / "c" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(hs.CheckpointError, match="checksum"):
        hs.load_checkpoint(tiny_llama(), tmp_path / "c")


def test_another_base_is_refused_and_left_alone(tmp_path, batch):
    hs.save_checkpoint(started(tiny_llama(), "pissa"), tmp_path / "c")
    cases = {
        "has the same shape here, but other weights": tiny_llama(),
        "is 32 x 32 here, and 16 x 32 there": tiny_llama(num_key_value_heads=4),
        "has no layer": tiny_gpt2(),
    }
    with torch.no_grad():
        cases["has the same shape here, but other weights"].model.layers[0].self_attn.q_proj.weight.add_(1e-3)
    for message, other in cases.items():
        names = [name for name, _ in other.named_parameters()]
        with pytest.raises(hs.CheckpointError, match=message):
            hs.load_checkpoint(other, tmp_path / "c")
        assert [name for name, _ in other.named_parameters()] == names


def test_a_base_in_half_precision_is_the_same_base(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "pissa"), tmp_path / "c")
    hs.load_checkpoint(tiny_llama().bfloat16(), tmp_path / "c")
    hs.save_checkpoint(started(tiny_llama().bfloat16(), "pissa"), tmp_path / "h")
    hs.load_checkpoint(tiny_llama(), tmp_path / "h")


def test_another_rank_is_refused(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "pissa", r=4), tmp_path / "c")
    with pytest.raises(hs.CheckpointError, match="r = 2 here, and 4 there"):
        hs.load_checkpoint(wrap(tiny_llama(), r=2), tmp_path / "c")


def test_other_target_modules_are_refused(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "pissa", target_modules=["q_proj"]), tmp_path / "c")
    with pytest.raises(hs.CheckpointError, match="only in the model"):
        hs.load_checkpoint(wrap(tiny_llama(), target_modules=["q_proj", "v_proj"]), tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("headstart.json", "{", "not valid JSON"),
        ("headstart.json", '{"format": 99}', "upgrade headstart"),
        ("headstart.json", "[]", "must hold a JSON object"),
        ("adapter_config.json", "{", "not valid JSON"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "reads LORA"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    hs.save_checkpoint(started(tiny_llama()), tmp_path / "c")
    (tmp_path / "c" / name).write_text(content)
    with pytest.raises(hs.CheckpointError, match=message):
        hs.load_checkpoint(tiny_llama(), tmp_path / "c")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(hs.CheckpointError, match="is not a folder"):
        hs.load_checkpoint(tiny_llama(), tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(hs.CheckpointError, match=r"holds no adapter_model\.safetensors"):
        hs.load_checkpoint(tiny_llama(), tmp_path / "empty")


def test_a_lost_anchor_is_noticed(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "pissa"), tmp_path / "c")
    (tmp_path / "c" / "headstart.json").unlink()
    file = tmp_path / "c" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("lora_start_B.weight")))
    save_file(tensors, file)
    with pytest.raises(hs.CheckpointError, match="lacks anchored B0"):
        hs.load_checkpoint(tiny_llama(), tmp_path / "c")


def test_pefts_own_folder_keeps_the_anchors(tmp_path, batch):
    model = started(tiny_llama(), "pissa")
    perturb(model)
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(hs.load_checkpoint(tiny_llama(), tmp_path / "c"), batch), logits(model, batch))
    # Loading as Trainer does, into a fresh adapter of a model that was never initialised.
    fresh = wrap(tiny_llama())
    fresh.load_adapter(tmp_path / "c", "default", is_trainable=True)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert all(anchors(target.module, "default") is not None for target in lora_layers(fresh, "default"))


def test_pefts_own_folder_of_a_residual_model(tmp_path, batch):
    model = started(tiny_llama(), "pissa", form="residual")
    perturb(model)
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(hs.load_checkpoint(tiny_llama(), tmp_path / "c"), batch), logits(model, batch))
    with pytest.raises(hs.CheckpointError, match="residual weights"):
        wrap(tiny_llama()).load_adapter(tmp_path / "c", "default")
    other = started(tiny_llama(), "pissa", form="residual")
    other.load_adapter(tmp_path / "c", "default")
    assert torch.equal(logits(other, batch), logits(model, batch))
    with pytest.raises(hs.CheckpointError, match="another start"):
        hs.load_checkpoint(started(tiny_llama(), "init-ab", form="residual"), tmp_path / "c")


def test_an_unaware_program_is_told(tmp_path, fresh):
    """PEFT without headstart must not load an anchored checkpoint as if it were a plain one."""
    hs.save_checkpoint(started(tiny_llama(), "pissa"), tmp_path / "c")
    assert_refused_without_headstart(fresh, tmp_path, "headstart.load_checkpoint")


def test_the_record_says_how_it_was_made(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "init-ab:beta=2", seed=7), tmp_path / "c")
    layers = json.loads((tmp_path / "c" / "headstart.json").read_text())["layers"]
    for found in layers.values():
        assert found["method"] == "init-ab:beta=2"
        assert found["seed"] == 7
        assert found["form"] == "anchored"


def test_another_scaling_is_refused(tmp_path):
    hs.save_checkpoint(started(tiny_llama(), "pissa", lora_alpha=8), tmp_path / "c")
    with pytest.raises(hs.CheckpointError, match="s = 16 here, and 2 there"):
        hs.load_checkpoint(wrap(tiny_llama(), lora_alpha=64), tmp_path / "c")


def state(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][0], b[n][0]) and a[n][1] == b[n][1] for n in a)


@pytest.mark.parametrize("form", ["anchored", "residual"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_failure_while_loading_leaves_the_model_as_it_was(form, failure, tmp_path, monkeypatch):
    import headstart.layers.checkpoint as checkpoint

    model = started(tiny_llama(), "pissa", form=form)
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    others = [tiny_llama(), wrap(tiny_llama())]
    if form == "anchored":
        others.append(started(tiny_llama(), "init-ab", seed=3))
    for name in ("set_peft_model_state_dict", "mark_config"):
        real = getattr(checkpoint, name)

        def broken(*args, real=real, **kwargs):
            real(*args, **kwargs)
            raise failure

        monkeypatch.setattr(checkpoint, name, broken)
        for other in others:
            before = state(other)
            with pytest.raises(failure):
                hs.load_checkpoint(other, tmp_path / "c")
            assert same(state(other), before)
        monkeypatch.setattr(checkpoint, name, real)
    for other in others:
        hs.load_checkpoint(other, tmp_path / "c")


def test_peft_does_not_load_a_plain_adapter_into_anchored_layers(tmp_path):
    started(tiny_llama(), "lora").save_pretrained(tmp_path / "plain")
    model = started(tiny_llama(), "init-ab")
    with pytest.raises(hs.CheckpointError, match="is anchored in the model, and plain in the checkpoint"):
        model.load_adapter(tmp_path / "plain", "default")


def test_peft_does_not_load_into_another_residual_base(tmp_path):
    started(tiny_llama(), "init-ab", form="residual").save_pretrained(tmp_path / "c")
    other = started(tiny_llama(), "init-ab", form="residual", seed=1)
    with pytest.raises(hs.CheckpointError, match="another start"):
        other.load_adapter(tmp_path / "c", "default")


def test_peft_does_not_combine_anchored_adapters():
    model = started(tiny_llama(), "pissa")
    model.add_adapter("plain", model.peft_config["default"].__class__(r=4, lora_alpha=8, target_modules=["q_proj"]))
    with pytest.raises(hs.LayerError, match=r"adapter 'default' is anchored"):
        model.add_weighted_adapter(["plain", "default"], [1.0, 1.0], "both", combination_type="cat")


def refused_and_unchanged(model, path, match):
    before = state(model)
    with pytest.raises(hs.CheckpointError, match=match):
        hs.load_checkpoint(model, path)
    assert same(state(model), before)


def test_a_head_of_another_size_is_refused_and_all_is_put_back(tmp_path):
    settings = dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    model = started(tiny_llama(vocab_size=101), **settings)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
        model.base_model.model.model.norm.modules_to_save["default"].weight.add_(1)
    hs.save_checkpoint(model, tmp_path / "c")
    record = json.loads((tmp_path / "c" / "headstart.json").read_text())
    record["layers"] = dict.fromkeys(record["layers"])  # so that the layers' own weights are not compared
    (tmp_path / "c" / "headstart.json").write_text(json.dumps(record))
    refused_and_unchanged(wrap(tiny_llama(), **settings), tmp_path / "c", r"another base model: .*lm_head")


def test_a_tensor_without_a_place_is_refused_and_magnitudes_are_put_back(tmp_path):
    settings = dict(target_modules=["q_proj"], use_dora=True)
    model = started(tiny_llama(), "init-ab-plus", **settings)
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.add_(1)
    hs.save_checkpoint(model, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.nowhere": torch.zeros(1)}, tmp_path / "c" / "adapter_model.safetensors")
    (tmp_path / "c" / "headstart.json").unlink()
    refused_and_unchanged(wrap(tiny_llama(), **settings), tmp_path / "c", "no place in the model for .*nowhere")


def test_a_trained_head_never_lands_on_the_base_models_own(tmp_path):
    model = started(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    hs.save_checkpoint(model, tmp_path / "c")
    refused_and_unchanged(
        wrap(tiny_llama(), target_modules=["q_proj"]), tmp_path / "c", "holds 'lm_head', trained whole"
    )


def test_a_start_that_froze_B_leaves_it_trainable_for_the_next(tmp_path):
    plain = started(tiny_llama())
    hs.save_checkpoint(plain, tmp_path / "c")
    model = started(tiny_llama(), "mica")
    assert all(not target.module.lora_B["default"].weight.requires_grad for target in lora_layers(model, "default"))
    hs.load_checkpoint(model, tmp_path / "c")
    model.set_adapter("default")
    for target in lora_layers(model, "default"):
        assert target.module.lora_A["default"].weight.requires_grad
        assert target.module.lora_B["default"].weight.requires_grad


@WRAPPERS
@pytest.mark.parametrize("trainable", [False, True])
def test_into_a_model_without_pefts_wrapper(wrapped, trainable, tmp_path, batch):
    model, other = (wrapped(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])) for _ in range(2))
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    hs.load_checkpoint(other, tmp_path / "c", trainable=trainable)
    assert torch.equal(logits(other, batch), logits(model, batch))
    assert any(each.requires_grad for each in other.parameters()) == trainable


def test_a_name_is_no_model(tmp_path):
    hs.save_checkpoint(started(tiny_llama()), tmp_path / "c")
    with pytest.raises(hs.CheckpointError, match="'llama' is not a model"):
        hs.load_checkpoint("llama", tmp_path / "c")


def test_lora_fas_A_stays_frozen_when_a_checkpoint_is_loaded(tmp_path):
    model = started(tiny_llama())
    hs.save_checkpoint(model, tmp_path / "c")
    hs.lora_fa_(model)
    hs.load_checkpoint(model, tmp_path / "c")
    for target in lora_layers(model, "default"):
        assert not target.module.lora_A["default"].weight.requires_grad
        assert target.module.lora_B["default"].weight.requires_grad


@pytest.mark.parametrize("method", ["init-ab", "lora-xs", "mica"])
def test_what_was_loaded_for_inference_trains_when_it_is_loaded_for_training(method, tmp_path):
    model = started(tiny_llama(), method)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    hs.save_checkpoint(model, tmp_path / "c")
    hs.load_checkpoint(model, tmp_path / "c", trainable=False)
    assert not any(each.requires_grad for each in model.parameters())
    hs.load_checkpoint(model, tmp_path / "c")
    assert {name for name, each in model.named_parameters() if each.requires_grad} == trained


@pytest.mark.parametrize(("method", "words"), [("pissa", "lacks the start of layer"), ("lora-xs", "lacks A, B")])
def test_a_checkpoint_without_what_does_not_train_is_refused(method, words, tmp_path):
    """So a Trainer under DeepSpeed's ZeRO-3 writes them."""
    model = started(tiny_llama(), method)
    hs.save_checkpoint(model, tmp_path / "run")
    frozen = {name.replace(".default", "") for name, value in model.named_parameters() if not value.requires_grad}
    path = tmp_path / "run" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name not in frozen}, path)
    (tmp_path / "run" / "headstart.json").unlink()
    with pytest.raises(hs.CheckpointError, match=words):
        hs.load_checkpoint(tiny_llama(), tmp_path / "run")
