"""TRL's trainers given as data: supervised, preference and reward losses, one sample what the trainer takes for one."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

import headstart as hs
from conftest import tiny_llama, word_tokenizer, wrap
from headstart.layers.find import lora_layers
from headstart.statistics.trainer import from_trainer
from test_trainer_data import assert_close, chosen, gradients, oracle

trl = pytest.importorskip("trl")

WORDS = [f"w{number}" for number in range(60)]
BETA = 0.7
PROMPTS = [" ".join(WORDS[row : row + 3]) for row in range(11)]
GOOD = [" " + " ".join(WORDS[10 + row : 12 + row + row % 3]) for row in range(11)]
BAD = [" " + " ".join(WORDS[40 - row : 43 - row]) for row in range(11)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["<pad>", "<eos>", *WORDS], unknown="<pad>")


def settings(folder):
    return dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
    )


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_log_p(model, prompt, answer):
    """Return the log-probability of an answer's tokens, summed, and their number."""
    tokens = torch.tensor([prompt + answer])
    log_p = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return log_p[len(prompt) - 1 :].sum(), len(answer)


def test_sft(tmp_path, tokenizer):
    base = tiny_llama()
    model = wrap(copy.deepcopy(base))
    data = Dataset.from_list([{"prompt": p, "completion": g} for p, g in zip(PROMPTS, GOOD, strict=True)])
    config = trl.SFTConfig(**settings(tmp_path), max_length=32)
    trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    given = from_trainer(trainer, 6, seed=0)
    assert given.loss is None
    rows = [(ids(tokenizer, PROMPTS[row]), [*ids(tokenizer, GOOD[row]), tokenizer.eos_token_id]) for row in chosen(6)]

    def loss(m, prompt, answer):
        total, count = answer_log_p(m, prompt, answer)
        return -total / count

    expected = oracle(base, [lambda m, pair=pair: loss(m, *pair) for pair in rows])
    assert_close(gradients(model, given, 6), expected)
    report = hs.initialize_(trainer.model, "lora-da:samples=6", data=trainer, progress=False)
    assert report.samples == 6
    trainer.args.max_steps = 1
    trainer.train()


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_packed_rows_count_as_the_samples_that_are_read(tmp_path, tokenizer, loss):
    """The model's own loss is computed of each sequence, any other of a row as it is."""
    model = wrap(tiny_llama())
    data = Dataset.from_list([{"text": p + g} for p, g in zip(PROMPTS, GOOD, strict=True)])
    config = trl.SFTConfig(**settings(tmp_path), max_length=16, packing=True, loss_type=loss)
    trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    packed = len(trainer.train_dataset)
    assert packed < len(PROMPTS)
    expected = len(PROMPTS) if loss == "nll" else packed
    report = hs.initialize_(trainer.model, "lora-sb:share=1.0", data=trainer, progress=False)
    assert report.samples == from_trainer(trainer, 2, 0).training.population == expected


def test_dpo(tmp_path, tokenizer):
    base = tiny_llama()
    model = wrap(copy.deepcopy(base))
    data = Dataset.from_list(
        [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)]
    )
    config = trl.DPOConfig(**settings(tmp_path), beta=BETA, max_length=32)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    given = from_trainer(trainer, 5, seed=0)
    assert given.loss is not None and given.single
    end = [tokenizer.eos_token_id]
    pairs = [
        (ids(tokenizer, PROMPTS[row]), ids(tokenizer, GOOD[row]) + end, ids(tokenizer, BAD[row]) + end)
        for row in chosen(5)
    ]

    def loss(m, prompt, good, bad):
        # At the base model the policy is the reference, and the slope of -log sigmoid at 0 is -1/2.
        return -BETA / 2 * (answer_log_p(m, prompt, good)[0] - answer_log_p(m, prompt, bad)[0])

    expected = oracle(base, [lambda m, pair=pair: loss(m, *pair) for pair in pairs])
    metrics = {key: list(value) for key, value in trainer._metrics["train"].items()}
    assert_close(gradients(model, given, 5), expected)
    # What the trainer reports of its training is of its training alone, and nothing trains but what did.
    assert {key: list(value) for key, value in trainer._metrics["train"].items()} == metrics
    assert all(parameter.grad is None for parameter in model.parameters())
    report = hs.initialize_(trainer.model, "lora-one:samples=5", data=trainer, progress=False)
    assert report.samples == 5 and not any("no gradient" in warning for warning in report.warnings)


def test_reward(tmp_path, tokenizer):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(tiny_llama(num_labels=1, pad_token_id=0).config)
    model = wrap(copy.deepcopy(base), task_type="SEQ_CLS")
    data = Dataset.from_list(
        [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)]
    )
    config = trl.RewardConfig(**settings(tmp_path), max_length=32)
    trainer = trl.RewardTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    given = from_trainer(trainer, 5, seed=0)
    end = [tokenizer.eos_token_id]
    pairs = [
        [torch.tensor([ids(tokenizer, PROMPTS[row]) + ids(tokenizer, text[row]) + end]) for text in (GOOD, BAD)]
        for row in chosen(5)
    ]

    def loss(m, good, bad):
        margin = m(input_ids=good).logits[0, 0] - m(input_ids=bad).logits[0, 0]
        return -torch.nn.functional.logsigmoid(margin)

    expected = oracle(base, [lambda m, pair=pair: loss(m, *pair) for pair in pairs])
    assert_close(gradients(model, given, 5), expected)
    report = hs.initialize_(trainer.model, "lora-one:samples=5", data=trainer, progress=False)
    assert report.samples == 5
    assert {target.name for target in lora_layers(model, "default")} == {layer.name for layer in report.layers}


def test_trainers_that_make_their_data_while_they_train(tmp_path, tokenizer):
    model = wrap(tiny_llama())
    config = trl.GRPOConfig(**settings(tmp_path), num_generations=2, max_completion_length=4)
    data = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )
    with pytest.raises(hs.DataError, match="GRPOTrainer makes its data while it trains"):
        hs.initialize_(trainer.model, "lora-one:samples=2", data=trainer, progress=False)
    assert hs.initialize_(trainer.model, "pissa", data=trainer, progress=False).form == "anchored"
