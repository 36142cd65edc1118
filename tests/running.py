"""A tiny model's folder, data and settings, for the tests of runs."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from conftest import tiny_llama, tiny_t5
from headstart.runs.tree import Run

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!'#+-*/=()\n"


def tokenizer(ended=False):
    """One character a token; ``ended`` ends every text, as T5's does."""
    words = ["<pad>", "<eos>", "<unk>", *LETTERS]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    if ended:
        raw.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama_folder(path):
    words = tokenizer()
    torch.manual_seed(0)
    model = tiny_llama(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    assert model.config.vocab_size >= len(words)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def t5_folder(path):
    """An encoder-decoder, whose tokenizer ends every text."""
    words, model = tokenizer(ended=True), tiny_t5()
    assert model.config.vocab_size >= len(words) and model.config.eos_token_id == words.eos_token_id
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def bert_folder(path):
    words = tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    BertForSequenceClassification(config).bert.save_pretrained(path)
    words.save_pretrained(path)
    return path


def sums(path, count=60):
    """Write sums of one digit, the answers worked as in GSM8K."""
    rows = [{"question": f"{i % 10} + {i % 7}?", "answer": f"It is.\n#### {i % 10 + i % 7}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentiment_folder(folder):
    """Write such sentences for training and for measuring."""
    sentiments(folder / "train.tsv")
    sentiments(folder / "dev.tsv", 20)
    return folder


def sentiments(path, count=48):
    """Write what SST-2 looks like: sentences that are good where they have an a."""
    rows = [f"{'a' if i % 2 else 'o'}{'bcd'[i % 3] * (1 + i % 4)}\t{i % 2}" for i in range(count)]
    path.write_text("\n".join(rows) + "\n")
    return path


def small_run(model, data, /, **changes):
    """A run of eight steps on a tiny model; ``changes`` are branches of the tree."""
    settings = {
        "model": {"name": str(model)},
        "data": {"task": "text", "train": str(data), "held_out_examples": 6},
        "adapter": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 8},
        "batch": {"size": 4, "max_length": 64},
    }
    for branch, change in changes.items():
        if isinstance(change, dict) and branch in settings:
            settings[branch] = {**settings[branch], **change}
        elif change is None:
            del settings[branch]
        else:
            settings[branch] = change
    return Run.model_validate(settings)
