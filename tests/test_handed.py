"""PEFT's own starts: asked for by name, computed by PEFT, installed like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

import headstart as hs
from conftest import class_batch, image_batch, logits, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit, token_batch, wrap
from headstart.errors import DataError, HeadstartError, LayerError, MethodError
from headstart.layers.find import lora_layers
from headstart.layers.weights import base_weight

METHODS = ["pissa-niter", "mica", "eva:samples=8", "eva:samples=8,rho=1", "corda:samples=8", "corda:samples=8,mode=kpm"]


def big_batch():
    return token_batch(size=8, length=40, padded=False)


def factors(model):
    return {
        target.name: [part["default"].weight.detach().clone() for part in (target.module.lora_A, target.module.lora_B)]
        for target in lora_layers(model, "default")
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_base_model_and_can_train(method):
    base, batch = tiny_llama(), big_batch()
    before, held = logits(base, batch), {n: p.clone() for n, p in base.named_parameters()}
    model = wrap(base)
    model.base_model.model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    report = hs.initialize_(model, method, data=[batch])
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in modes} == modes
    assert torch.allclose(logits(model, batch), before, atol=1e-6)
    for target in lora_layers(model, "default"):
        assert torch.equal(target.module.get_base_layer().weight, held[f"{target.name}.weight"])
        assert not hasattr(target.module.get_base_layer(), "eigens")
    model(**batch).loss.backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == trained
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_mica_is_pefts_to_the_bit():
    model = wrap(tiny_llama())
    hs.initialize_(model, "mica")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="mica")
    theirs = factors(get_peft_model(tiny_llama(), config))
    for name, pair in factors(model).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, theirs[name], strict=True)), name


def test_pissa_niter_approximates_pissa():
    model = wrap(tiny_llama())
    hs.initialize_(model, "pissa-niter:iterations=16", seed=3)
    other = wrap(tiny_llama())
    hs.initialize_(other, "pissa-niter:iterations=16", seed=3)
    for target in lora_layers(model, "default"):
        A, B = factors(model)[target.name]
        assert torch.equal(A, factors(other)[target.name][0])
        W = base_weight(target.module)
        best = torch.linalg.svdvals(W)[4:].norm()
        assert best * 0.999 <= torch.linalg.matrix_norm(W - target.scaling * B @ A) <= best * 1.02, target.name


def test_mica_keeps_B_frozen_through_switches_and_checkpoints(tmp_path):
    model = wrap(tiny_llama())
    hs.initialize_(model, "mica")
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_B" in n)
    hs.save_checkpoint(model, tmp_path / "saved")
    again = hs.load_checkpoint(tiny_llama(), tmp_path / "saved")
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_B" in n)
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora_A" in n)
    with pytest.raises(LayerError, match="B is frozen by its start"):
        hs.lora_fa_(model)


def test_corda_is_pefts_own_with_the_product_subtracted():
    batch = big_batch()
    model = wrap(tiny_llama(), r=4)
    hs.initialize_(model, "corda:samples=8", data=[batch])
    base = tiny_llama()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )

    def read():
        for index in range(8):
            base(input_ids=batch["input_ids"][index : index + 1])

    preprocess_corda(base, config, read)
    theirs = factors(get_peft_model(base, config))
    for name, (A, B) in factors(model).items():
        assert torch.allclose(B @ A, theirs[name][1] @ theirs[name][0], atol=1e-4), name


def test_eva_with_rho_1_finds_the_leading_directions_of_the_inputs():
    batch = big_batch()
    base = tiny_llama()
    seen = {}
    handle = base.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.update(x=i[0]))
    logits(base, batch)
    handle.remove()
    model = wrap(base)
    hs.initialize_(model, "eva:samples=8,rho=1,tokens=attention", data=[batch])
    x = seen["x"].flatten(0, 1).double()
    leading = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4]
    A = factors(model)["model.layers.0.mlp.down_proj"][0].double()
    assert torch.linalg.svdvals(leading @ A.T).min() > 0.9


def test_eva_may_move_ranks_and_the_report_follows(tmp_path):
    batch = big_batch()
    model = wrap(tiny_llama())
    report = hs.initialize_(model, "eva:samples=8,rho=3", data=[batch])
    ranks = [layer.r for layer in report.layers]
    assert len(set(ranks)) > 1 and sum(ranks) <= 14 * 4
    hs.save_lora(model, tmp_path / "out")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-6)


@pytest.mark.parametrize(
    ("base", "make"), [(tiny_gpt2, token_batch), (tiny_bert, class_batch), (tiny_vit, image_batch)]
)
@pytest.mark.parametrize("method", ["eva:samples=4,rho=1", "corda:samples=4", "mica", "pissa-niter"])
def test_other_architectures(base, make, method):
    model, batch = base(), make()
    targets = {"gpt2": ["c_attn"], "bert": ["query", "dense"], "vit": ["q_proj", "fc1"]}[model.config.model_type]
    before = logits(model, batch)
    wrapped = wrap(model, target_modules=targets, r=2)
    try:
        hs.initialize_(wrapped, method, data=[batch])
    except HeadstartError as error:
        # CorDA's code takes inputs of two dimensions only, which pooled outputs aren't.
        assert method.startswith(("corda", "eva")) and "PEFT says" in str(error)
        return
    assert torch.allclose(logits(wrapped, batch), before, atol=1e-5)


def test_what_cannot_work_says_why():
    batch = big_batch()
    with pytest.raises(DataError, match="'eva' needs data"):
        hs.initialize_(wrap(tiny_llama()), "eva")
    with pytest.raises(LayerError, match="not quantised to 4 bits"):
        hs.initialize_(wrap(tiny_llama()), "loftq")
    with pytest.raises(MethodError, match="rho must be at least 1"):
        hs.initialize_(wrap(tiny_llama()), "eva:rho=0.5")
    model = wrap(tiny_llama())
    untouched = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="did not stand still"):
        hs.initialize_(model, "eva:samples=1,rho=4", data=[{k: v[:1, :6] for k, v in batch.items()}])
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.peft_config["default"].init_lora_weights is True


def test_loftq_brings_a_four_bit_base_nearer_to_its_original(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    original = tiny_llama(hidden_size=64, intermediate_size=128)
    original.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = wrap(base, r=16, lora_alpha=16)
    with pytest.raises(LayerError, match="quantised"):
        hs.initialize_(model, "mica")
    if not torch.accelerator.is_available():
        with pytest.raises(MethodError, match="accelerator only"):
            hs.initialize_(model, "loftq")
        return
    hs.initialize_(model, "loftq")
    weights = dict(original.named_modules())
    for target in lora_layers(model, "default"):
        W, Q = weights[target.name].weight.detach(), base_weight(target.module)
        B, A = (part["default"].weight.detach() for part in (target.module.lora_B, target.module.lora_A))
        assert torch.linalg.matrix_norm(W - Q - B @ A) < 0.9 * torch.linalg.matrix_norm(W - Q), target.name


@pytest.mark.parametrize("method", ["eva:samples=8", "corda:samples=8"])
@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, KeyboardInterrupt])
def test_a_failure_in_the_data_leaves_nothing_behind(method, error):
    model = wrap(tiny_llama()).train()
    model.base_model.model.model.embed_tokens.eval()

    def fail(*_):
        raise error("in the model")

    handle = model.base_model.model.lm_head.register_forward_hook(fail)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    notes = [set(vars(target.module.get_base_layer())) for target in lora_layers(model, "default")]
    with pytest.raises(MethodError if error is ValueError else error):
        hs.initialize_(model, method, data=[big_batch()], progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [set(vars(target.module.get_base_layer())) for target in lora_layers(model, "default")] == notes
    handle.remove()
    hs.initialize_(model, method, data=[big_batch()], progress=False)


def test_what_a_layer_cannot_take_is_refused():
    with pytest.raises(LayerError, match="DoRA"):
        hs.initialize_(wrap(tiny_llama(), use_dora=True), "pissa-niter")
    model = wrap(tiny_llama())
    hs.lora_fa_(model)
    with pytest.raises(LayerError, match="LoRA-FA"):
        hs.initialize_(model, "mica")


def test_eva_leaves_modes_and_the_config_alone():
    model = wrap(tiny_llama(), init_lora_weights="gaussian").train()
    model.base_model.model.model.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    hs.initialize_(model, "eva:samples=8,rho=1", data=[big_batch()])
    assert [module.training for module in model.modules()] == modes
    assert model.peft_config["default"].init_lora_weights == "gaussian"


def test_no_two_weights_are_held_twice_at_a_time():
    model = wrap(tiny_llama())
    held = {target.name: target.module.get_base_layer().weight.data_ptr() for target in lora_layers(model, "default")}
    changed = []

    def look(step, done, total):
        now = {t.name: t.module.get_base_layer().weight.data_ptr() for t in lora_layers(model, "default")}
        changed.append(sum(now[name] != held[name] for name in held))

    hs.initialize_(model, "pissa-niter", progress=look)
    assert len(changed) == len(held) and not any(changed)


@pytest.mark.parametrize("served", [False, True])
def test_eva_leaves_a_four_bit_base_as_it_computes(tmp_path, served):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    batch = big_batch()
    model = wrap(base, target_modules=["q_proj", "v_proj"]).train(not served)
    with torch.no_grad():
        before = model(**batch).logits
        hs.initialize_(model, "eva:samples=8,rho=1", data=[batch])
        after = model(**batch).logits
    assert torch.equal(before, after)


def test_what_peft_says_on_the_way_is_not_passed_on(capsys, recwarn):
    batch = big_batch()
    hs.initialize_(wrap(tiny_llama()), "corda:samples=8", data=[batch])
    with pytest.raises(DataError, match="did not stand still"):
        hs.initialize_(wrap(tiny_llama()), "eva:samples=1,rho=4", data=[{k: v[:1, :6] for k, v in batch.items()}])
    assert "skipping" not in capsys.readouterr().out
    assert not [each for each in recwarn if "corda_config" in str(each.message)]
