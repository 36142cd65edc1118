"""The reports' arithmetic against direct computation."""

from __future__ import annotations

import functools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_llama, word_tokenizer
from headstart.evaluation.answers import answered
from headstart.evaluation.intervals import wilson
from headstart.tasks.base import Example


def test_batched_answers_are_those_of_one_at_a_time():
    tokenizer = word_tokenizer(["<pad>", "<eos>", "<unk>", "#", "####", *map(str, range(80))])
    examples = [Example(" ".join(str(n) for n in range(1, 3 + i))) for i in range(5)]
    ask = functools.partial(answered, tiny_llama(), tokenizer, examples, max_new_tokens=6)
    assert len(set(alone := ask(batch_size=1))) > 1
    assert ask(batch_size=4) == alone


@settings(deadline=None)
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
