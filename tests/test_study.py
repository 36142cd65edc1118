"""Evaluation and the reports' arithmetic against direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_llama, word_tokenizer
from headstart.study.tables import markdown, wilson
from headstart.tasks.base import Example
from headstart.training.evaluate import exact_match, held_out_loss
from headstart.training.run import Result


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["<pad>", "<eos>", "<unk>", "#", "####", *map(str, range(80))])


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(2, 90, (5 + index % 7,), generator=generator).tolist()
        labels = [-100] * (1 + index % 3) + ids[1 + index % 3 :]
        made.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return made


def test_held_out_loss_is_the_mean_over_label_tokens():
    model = tiny_llama().double().train()
    data = rows(11)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in data:
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
            for place in range(1, len(row["labels"])):
                if row["labels"][place] != -100:
                    total -= float(logits[place - 1].log_softmax(-1)[row["labels"][place]])
                    tokens += 1
    model.train()
    for batch_size in (1, 4, 16):
        assert held_out_loss(model, data, 0, batch_size=batch_size) == pytest.approx(total / tokens, rel=1e-6)
    assert model.training


class Parrot(torch.nn.Module):
    """Answers with fixed texts, by the last token of the prompt."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answers = tokenizer, answers

    def generate(self, input_ids, attention_mask, **_):
        texts = [self.answers[self.tokenizer.decode([row[-1]])] for row in input_ids]
        written = [self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id] for text in texts]
        width = max(len(row) for row in written)
        padded = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in written])
        return torch.cat((input_ids, padded), dim=1)


def test_exact_match_grades_the_final_number(tokenizer):
    examples = [Example(f"5 6 {i}", f"#### {i + 1}", reference=str(i + 1)) for i in range(7)] + [Example("5", "6")]
    answers = {str(i): f"7 8 #### {i + 1 if i % 2 else i}" for i in range(7)}
    answers["1"] = "2"  # the right number, but not marked as the answer
    graded = exact_match(Parrot(tokenizer, answers), tokenizer, examples, batch_size=3, max_new_tokens=9)
    assert (graded.right, graded.total) == (2, 7)
    assert graded.accuracy == pytest.approx(2 / 7)
    assert graded.texts[3] == answers["3"]


def test_batched_answers_are_those_of_one_at_a_time(tokenizer):
    model = tiny_llama()
    examples = [Example(" ".join(str(n) for n in range(1, 3 + i)), "#### 1", reference="1") for i in range(5)]
    alone = exact_match(model, tokenizer, examples, batch_size=1, max_new_tokens=6).texts
    assert exact_match(model, tokenizer, examples, batch_size=4, max_new_tokens=6).texts == alone


@given(st.integers(1, 500), st.data())
def test_wilson_interval(total, data):
    right = data.draw(st.integers(0, total))
    low, high = wilson(right, total)
    share = right / total
    assert -1e-12 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1 + 1e-12
    # Its ends are where the normal test of that proportion is at its threshold: the definition.
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-6, abs=1e-9)


def test_markdown_table():
    result = Result("lora", 1.5, 0.5, 100, 0.5, 2.0, 0, [1.0], right=3, graded=4)
    text = markdown([result])
    assert "| lora | 1.5000 | 0.5000 | 75.0 % (3/4) | 30 to 95 % | 100 | 0.50 | 2.0 |" in text
