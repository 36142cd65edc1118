"""Ways to fine-tune from any start: weight decay, LoRA+, rsLoRA, LoRA-FA, DoRA, heads and biases beside the adapter."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

import headstart as hs
from conftest import (
    KINDS,
    class_batch,
    logits,
    perturb,
    started,
    tiny_bert,
    tiny_experts,
    tiny_llama,
    token_batch,
    wrap,
)
from headstart.layers.anchored import anchors
from headstart.layers.core import core_of
from headstart.layers.find import lora_layers
from test_architectures import small

LR, DECAY = 0.05, 2.0
DECOUPLED = {
    "loop": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY, fused=True),
    "tensor rate": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(LR, dtype=torch.float64), weight_decay=DECAY, foreach=False
    ),
}
OTHERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=DECAY),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=LR, weight_decay=DECAY),
}
if hasattr(torch.optim, "Muon"):
    OTHERS["muon"] = lambda p: torch.optim.Muon(p, lr=LR, weight_decay=DECAY)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def anchored(method="init-ab", base=tiny_llama, form="anchored", **changes):
    """In float64, and in evaluation mode."""
    changes = dict(target_modules=["q_proj", "v_proj"]) | changes
    return started(base(), method, form=form, data=[token_batch()], **changes).double().eval()


def starts(model):
    """The anchors by the names of the parameters that started there."""
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for target in lora_layers(model, "default"):
        for part, anchor in zip(
            (target.module.lora_A, target.module.lora_B), anchors(target.module, "default") or (), strict=False
        ):
            found[names[id(part["default"].weight)]] = anchor.detach().clone()
    return found


def by_hand(values, gradients, anchor, rates, decay=DECAY, betas=(0.9, 0.999), eps=1e-8):
    """AdamW (Loshchilov and Hutter, Algorithm 2) with the decay of ``x - anchor``."""
    x, m, v = values.clone(), torch.zeros_like(values), torch.zeros_like(values)
    for step, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        along = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        x = x - lr * along - lr * decay * (x - anchor)
    return x


def run(model, optimizer, schedule=None, steps=4, batch_of=token_batch):
    """Train; return every step's gradients and rates by parameter name."""
    seen = {name: ([], []) for name in trained(model)}
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch_of(seed=step)).loss.backward()
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for name, p in trained(model).items():
            seen[name][0].append(p.grad.clone())
            seen[name][1].append(rates[id(p)])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return seen


# Weight decay: what trains in an anchored layer is zero at the start, so every optimizer's own decay leads back there.


@pytest.mark.parametrize("make", DECOUPLED.values(), ids=DECOUPLED)
def test_adamw_by_hand_decays_a_factor_to_its_start(make):
    model = anchored()
    perturb(model)
    optimizer = make(trained(model).values())
    before, anchor = {name: p.detach().clone() for name, p in trained(model).items()}, starts(model)
    seen = run(model, optimizer)
    assert before.keys() == anchor.keys()
    for name, p in trained(model).items():
        whole = by_hand(anchor[name] + before[name], *seen[name][:1], anchor[name], seen[name][1])
        assert torch.allclose(anchor[name] + p, whole, rtol=1e-9, atol=1e-13)


def decayed(model, make, steps):
    """Let an optimizer's decay alone move the model."""
    optimizer = make(trained(model).values())
    for _ in range(steps):
        for p in trained(model).values():
            p.grad = torch.zeros_like(p)
        optimizer.step()


@pytest.mark.parametrize("make", (DECOUPLED | OTHERS).values(), ids=DECOUPLED | OTHERS)
def test_decay_alone_takes_the_model_back_to_the_base(make):
    model = anchored("pissa")
    base = logits(anchored("lora"), token_batch())
    perturb(model, scale=0.3)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    assert not torch.allclose(logits(model, token_batch()), base, atol=1e-3)
    decayed(model, make, 100)
    for name, p in trained(model).items():
        assert torch.allclose(p, (1 - LR * DECAY) ** 100 * before[name], rtol=1e-9, atol=1e-13)
    decayed(model, make, 150)
    assert torch.allclose(logits(model, token_batch()), base, atol=1e-8)


def test_a_residual_layer_decays_away_from_the_base_as_the_papers_do():
    """Towards W - s B0 A0, the weight that the layer holds."""
    model = anchored("pissa", form="residual")
    decayed(model, DECOUPLED["loop"], 300)
    with torch.no_grad():
        found = logits(model, token_batch())
        with model.disable_adapter():
            assert torch.allclose(found, logits(model, token_batch()), atol=1e-8)
    assert not torch.allclose(found, logits(anchored("lora"), token_batch()), atol=1e-3)


def test_layers_that_start_as_lora_among_anchored_ones_decay_to_their_start():
    """A layer that no gradient reached has lora's start, in the form of all others."""
    with pytest.warns(hs.errors.HeadstartWarning):
        model = anchored("lora-ga:samples=4", tiny_experts, target_modules=["q_proj", "w1"])
    assert starts(model).keys() == trained(model).keys()
    unreached = {name: start for name, start in starts(model).items() if "experts.3.w1" in name}
    assert any(bool(start.count_nonzero()) for start in unreached.values())
    decayed(model, DECOUPLED["loop"], 300)
    assert all(float(p.detach().abs().max()) < 1e-8 for p in trained(model).values())


# LoRA+.


def groups_of(model, ratio=4.0):
    """Which rate LoRA+ gives every trainable parameter, as a multiple of the base rate."""
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] / 1e-3 for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("method", ["pissa", "lora-one:samples=4"])
def test_loraplus_speeds_up_b_alone(method):
    model = started(tiny_bert(), method, data=[class_batch()], target_modules=["query"], task_type="SEQ_CLS")
    rates = groups_of(model)
    assert rates.keys() == trained(model).keys()
    for name, rate in rates.items():
        fast = "lora_B" in name or name.endswith(".bias")
        assert rate == pytest.approx(4.0 if fast else 1.0), name


def test_loraplus_leaves_a_core_at_the_base_rate():
    """PEFT sorts by the name lora_B: a core has none that trains, and the ratio does nothing."""
    rates = groups_of(started(tiny_llama(), "lora-xs"))
    assert rates and all("lora_core" in name and rate == pytest.approx(1.0) for name, rate in rates.items())


# rsLoRA.


@pytest.mark.parametrize("method", ["lora-one:samples=4", "pissa", "lora-xs", "lora-sb:samples=4,lr=1e-3"])
def test_rslora_scales_every_form_and_leaves_with_it(method, tmp_path):
    base = tiny_llama().eval()
    model = wrap(copy.deepcopy(base), use_rslora=True, rank_pattern={"q_proj": 2})
    hs.initialize_(model, method, data=[token_batch()], preserve=[token_batch()], progress=False)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    run(model, optimizer, steps=2)
    for target in lora_layers(model, "default"):
        assert target.scaling == pytest.approx(8 / math.sqrt(2 if target.name.endswith("q_proj") else 4))
    hs.save_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    expected = logits(model, token_batch())
    assert (logits(plain, token_batch()) - expected).norm() < 1e-5 * expected.norm()
    for mine, theirs in zip(lora_layers(model, "default"), lora_layers(plain, "default"), strict=True):
        assert theirs.scaling == pytest.approx(mine.scaling)
        assert theirs.r == mine.r * (1 if anchors(mine.module, "default") is None else 2)


# DoRA.


@pytest.mark.parametrize("name", KINDS)
def test_dora_takes_every_start_that_is_kept_and_refuses_the_rest(name):
    plain = wrap(tiny_llama())
    hs.initialize_(plain, small(name), data=[token_batch()], preserve=[token_batch()], progress=False)
    targets = list(lora_layers(plain, "default"))
    formed = any(anchors(t.module, "default") or core_of(t.module, "default") is not None for t in targets)
    model = wrap(tiny_llama(), use_dora=True)
    # Of a magnitude that trains, what keeplora-plus protects would not be safe.
    if formed or name == "keeplora-plus":
        with pytest.raises(hs.LayerError, match="uses DoRA"):
            hs.initialize_(model, small(name), data=[token_batch()], preserve=[token_batch()], progress=False)
        return
    hs.initialize_(model, small(name), data=[token_batch()], preserve=[token_batch()], progress=False)
    assert torch.allclose(logits(model, token_batch()), logits(plain, token_batch()), atol=2e-5)


def test_dora_with_lora_fa_trains_b_and_the_magnitude():
    model = wrap(tiny_llama(), use_dora=True)
    hs.initialize_(model, "lora-one:samples=4", data=[token_batch()], preserve=[token_batch()], progress=False)
    hs.lora_fa_(model)
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_B", "lora_magnitude_vector"}
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    run(model, torch.optim.AdamW(trained(model).values(), lr=1e-2), steps=2)
    assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())


# LoRA-FA.


@pytest.mark.parametrize("method", ["lora-xs", "lora-sb:samples=4,lr=1e-3"])
def test_lora_fa_and_a_core_exclude_each_other_in_either_order(method):
    model = wrap(tiny_llama())
    hs.initialize_(model, method, data=[token_batch()], preserve=[token_batch()], progress=False)
    with pytest.raises(hs.LayerError, match=r"q_proj' trains a core alone.*both frozen.*LoRA-FA.*means nothing"):
        hs.lora_fa_(model)
    model = wrap(tiny_llama())
    hs.lora_fa_(model)
    before = trained(model).keys()
    with pytest.raises(hs.LayerError, match=r"q_proj': LoRA-FA has frozen its A and trains B.*freezes B as well"):
        hs.initialize_(model, method, data=[token_batch()], preserve=[token_batch()], progress=False)
    assert trained(model).keys() == before


def test_lora_fa_first_refuses_a_start_with_a_at_zero_and_takes_others():
    model = wrap(tiny_llama())
    hs.lora_fa_(model)
    with pytest.raises(hs.LayerError, match=r"q_proj': LoRA-FA has frozen its A.*starts A at zero"):
        hs.initialize_(model, "init-b", progress=False)
    hs.initialize_(model, "pissa", progress=False)
    assert trained(model) and all("lora_B" in name for name in trained(model))


@pytest.mark.parametrize("method", ["pissa", "lora-xs"])
def test_pefts_lora_fa_optimizer_stops_at_parameters_that_it_does_not_know(method):
    """It pairs off all that is called lora_; the documentation names lora_fa_ instead."""
    model = started(tiny_llama(), method)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    with pytest.raises((TypeError, RuntimeError)):
        model(**token_batch()).loss.backward()
        optimizer.step()


# The core's best gradient.


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_the_best_gradient_is_a_cores(method):
    with (
        pytest.raises(hs.LayerError, match=r"'default' has no core layer.*lora-xs or lora-sb"),
        hs.optimal_gradient(started(tiny_llama(), method)),
    ):
        pass


# Heads and biases that train beside the adapter.

BESIDE = ["lora", "pissa", "lora-one:samples=4", "lora-xs", "lora-sb:samples=4,lr=1e-3"]


@pytest.mark.parametrize("beside", ["head", "bias all", "bias lora_only"])
@pytest.mark.parametrize("method", BESIDE)
def test_what_trains_beside_an_adapter_leaves_and_comes_back(method, beside, tmp_path):
    changes = dict(target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    if beside != "head":
        changes["bias"] = beside.removeprefix("bias ")
    base = tiny_bert().eval()
    model = wrap(copy.deepcopy(base), **changes).eval()
    hs.initialize_(model, method, data=[class_batch()], preserve=[class_batch()], progress=False)
    others = {name: p.detach().clone() for name, p in trained(model).items() if "lora_" not in name}
    assert len(others) == {"head": 2, "bias all": 20, "bias lora_only": 6}[beside]
    run(model, torch.optim.AdamW(trained(model).values(), lr=1e-2), steps=3, batch_of=class_batch)
    reached = {name for name, p in trained(model).items() if name in others and not torch.equal(p, others[name])}
    assert any("classifier" in name for name in reached)
    assert beside == "head" or any("query.base_layer.bias" in name for name in reached)

    expected = logits(model, class_batch())
    hs.save_lora(model, tmp_path / "lora")
    hs.save_checkpoint(model, tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "peft")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert torch.allclose(logits(plain, class_batch()), expected, atol=1e-6)
    for folder in ("checkpoint", "peft"):
        again = hs.load_checkpoint(copy.deepcopy(base), tmp_path / folder).eval()
        assert torch.equal(logits(again, class_batch()), expected)
        assert trained(again).keys() == trained(model).keys()
    fresh = [run(m, torch.optim.AdamW(trained(m).values(), lr=1e-2), batch_of=class_batch) for m in (model, again)]
    assert all(
        torch.equal(a, b) for name in fresh[0] for a, b in zip(fresh[0][name][0], fresh[1][name][0], strict=True)
    )


# The page in docs.


PAGE = Path(__file__).parent.parent / "docs" / "training.md"
EVERY_BLOCK = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
# Those that start from data are run by test_trainer_pages.py, and that of GRPO by test_grpo.py.
BLOCKS = [block for block in EVERY_BLOCK if "report = hs.initialize_" not in block and "GRPOTrainer(" not in block]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_the_page_runs(block, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    method = "lora-xs" if "optimal_gradient" in block else "pissa"
    model = started(tiny_bert(), method, target_modules=["query", "value"], task_type="SEQ_CLS").eval()
    batch = class_batch()
    arguments = TrainingArguments(output_dir="run", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    names = dict(hs=hs, torch=torch, model=model, base=tiny_bert().eval(), batch=batch, arguments=arguments)
    names["data"] = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    exec(block, names)
    if "step()" in block or "train()" in block:
        assert any(not torch.equal(p, before[name]) for name, p in trained(model).items())
    if "again" in names:
        assert torch.equal(logits(names["again"], batch), logits(model, batch))


def test_the_page_has_code():
    assert len(BLOCKS) >= 6
