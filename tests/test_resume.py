"""Trainers that save and resume by themselves: a run cut in two against one that was not."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import headstart as hs
from conftest import started, tiny_llama, token_batch, word_tokenizer, wrap


def rows():
    batch = token_batch(16, 12)
    return [{key: value[i] for key, value in batch.items()} for i in range(16)]


def arguments(folder, **changes):
    settings = dict(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        use_cpu=True,
    )
    return TrainingArguments(**(settings | changes))


def losses(trainer):
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("prepared", ["initialised again", "fresh"])
@pytest.mark.parametrize("method", ["pissa", "init-ab-plus", "lora-xs:std=0.01"])
def test_trainer_resumes(method, prepared, tmp_path):
    whole = Trainer(started(tiny_llama(), method, lora_dropout=0.1), arguments(tmp_path / "run"), train_dataset=rows())
    whole.train()
    again = started(tiny_llama(), method, lora_dropout=0.1, seed=99)
    if prepared == "fresh":
        again = wrap(tiny_llama(), lora_dropout=0.1)
    rest = Trainer(again, arguments(tmp_path / "rest"), train_dataset=rows())
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(rest) == losses(whole)
    expected = weights(whole.model)
    assert expected.keys() == weights(rest.model).keys()
    for name, value in weights(rest.model).items():
        assert torch.equal(value, expected[name]), name


def test_best_checkpoint_is_loaded_with_its_anchors(tmp_path):
    model = started(tiny_llama(), "pissa")
    trainer = Trainer(
        model,
        arguments(
            tmp_path / "run",
            eval_strategy="steps",
            eval_steps=4,
            load_best_model_at_end=True,
            learning_rate=5e-2,
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    trainer.train()
    best = hs.load_checkpoint(tiny_llama(), trainer.state.best_model_checkpoint)
    expected = weights(best)
    for name, value in weights(model).items():
        assert torch.equal(value, expected[name]), name


def test_sft_trainer_resumes(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = word_tokenizer(["<pad>", "<eos>", *map(str, range(90))], unknown="<pad>")
    rows = Dataset.from_list([{"prompt": f"{i} {i + 1} ", "completion": f"{i + 2} {i + 3}"} for i in range(16)])

    def trainer(model, folder):
        settings = trl.SFTConfig(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            seed=3,
            use_cpu=True,
            bf16=False,
        )
        return trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)

    whole = trainer(started(tiny_llama(), "pissa"), tmp_path / "run")
    whole.train()
    rest = trainer(started(tiny_llama(), "pissa", seed=99), tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(rest) == losses(whole)
    expected = weights(whole.model)
    for name, value in weights(rest.model).items():
        assert torch.equal(value, expected[name]), name
