"""TRL's preference and reinforcement trainers: the reference of a prepared model is what its start stands for."""

from __future__ import annotations

import pytest
import torch

import headstart as hs
from conftest import VOCABULARY, logits, perturb, started, tiny_llama, token_batch, word_tokenizer, wrap

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

FORMS = {"anchored": "pissa", "kept": "init-ab-plus", "core": "lora-xs:std=0.5"}
TRAINERS = ["DPO", "KTO", "GRPO", "RLOO"]
COMMON = dict(
    per_device_train_batch_size=4,
    logging_steps=1,
    learning_rate=1e-2,
    use_cpu=True,
    report_to=[],
    bf16=False,
    save_strategy="no",
    gradient_checkpointing=False,
    disable_tqdm=True,
)


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token."""
    return word_tokenizer(["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3))])


PAIRS = [
    dict(prompt=f"w{i} w{i + 1}", chosen=f" w{i + 2} w{i + 3}", rejected=f" w{i + 4} w{i + 5} w{i + 6}")
    for i in range(4)
]


def letters(completions, **_):
    """A reward: something that differs from completion to completion."""
    return [float(len(completion) % 5) for completion in completions]


def rows(name):
    if name == "DPO":
        return PAIRS
    if name == "KTO":
        sides = ["chosen", "rejected", "chosen", "rejected"]
        return [
            dict(prompt=pair["prompt"], completion=pair[side], label=side == "chosen")
            for pair, side in zip(PAIRS, sides, strict=True)
        ]
    return [dict(prompt=pair["prompt"]) for pair in PAIRS]


def trainer_of(name, model, tokenizer, folder, max_steps=1, **changes):
    settings = COMMON | dict(output_dir=str(folder), max_steps=max_steps)
    given = {}
    if name in ("GRPO", "RLOO"):
        settings |= dict(num_generations=2, max_completion_length=4, beta=0.1)
        given["reward_funcs"] = letters
    settings |= {key: changes.pop(key) for key in ("precompute_ref_log_probs",) if key in changes}
    arguments = getattr(trl, f"{name}Config")(**settings)
    data = datasets.Dataset.from_list(rows(name))
    made = getattr(trl, f"{name}Trainer")
    return made(model, args=arguments, train_dataset=data, processing_class=tokenizer, **given, **changes)


def distance(log):
    """How far the policy is from its reference, as the trainers report it."""
    found = [abs(log[name]) for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "kl") if name in log]
    assert found
    return max(found)


@pytest.mark.parametrize(
    ("name", "form"), [*(("DPO", form) for form in FORMS), *((name, "anchored") for name in TRAINERS[1:])]
)
def test_the_first_step_is_at_the_reference_and_the_reference_stays(name, form, tokenizer, tmp_path):
    batch = token_batch()
    model = started(tiny_llama(), FORMS[form])
    start = logits(model, batch)
    trainer = trainer_of(name, model, tokenizer, tmp_path, max_steps=3)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert distance(steps[0]) < 1e-6
    model = trainer.accelerator.unwrap_model(trainer.model)
    if name in ("DPO", "KTO"):
        assert distance(steps[-1]) > 1e-4
        assert not torch.allclose(logits(model, batch), start, atol=1e-4)
    model.set_adapter("ref")
    assert torch.allclose(logits(model, batch), start, atol=1e-6)
    if form == "anchored":
        assert torch.allclose(start, logits(tiny_llama(), batch), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moved", ["default", "ref"])
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_policy_apart_from_its_reference_is_reported(name, moved, form, tokenizer, tmp_path):
    """So that the zero reported of a first step says something: either side moved, the other one stays."""
    trainer = trainer_of(name, started(tiny_llama(), FORMS[form]), tokenizer, tmp_path)
    perturb(trainer.model, 0.1, adapter=moved)
    trainer.train()
    assert distance(trainer.state.log_history[0]) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_reference_computed_beforehand(form, tokenizer, tmp_path):
    model = started(tiny_llama(), FORMS[form])
    trainer = trainer_of("DPO", model, tokenizer, tmp_path, precompute_ref_log_probs=True)
    trainer.train()
    assert distance(trainer.state.log_history[0]) < 1e-5


def test_an_anchored_start_inside_the_trainer_has_the_base_model_as_its_reference(tokenizer, tmp_path):
    """There the trainer switches the adapter off for its reference."""
    config = wrap(tiny_llama()).peft_config["default"]
    trainer = trainer_of("DPO", tiny_llama(), tokenizer, tmp_path, peft_config=config)
    hs.initialize_(trainer.model, "pissa", progress=False)
    trainer.train()
    assert distance(trainer.state.log_history[0]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_the_trained_adapter_leaves_without_its_reference(form, tokenizer, tmp_path):
    from peft import PeftModel

    trainer = trainer_of("DPO", started(tiny_llama(), FORMS[form]), tokenizer, tmp_path / "run", max_steps=2)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    hs.save_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert torch.allclose(logits(plain, token_batch()), logits(model, token_batch()), atol=1e-5)
