from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headstart.errors import DataError, HeadstartWarning
from headstart.tasks.base import Example, Message
from headstart.tasks.rows import read
from headstart.tasks.text import Text
from headstart.training.data import batches, collate, render, tokenize_examples

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte, and the specials."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_three_ways_to_write_an_example(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"question": "How many? ", "answer": "48/2 = <<48/2=24>>24 pens.\n#### 1,024"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "#### 5"},
                {"role": "user", "content": "never answered"},
            ]
        },
    )
    examples = [dataclasses.replace(example, where="") for example in read(Text(), path).examples]
    assert examples == [
        Example("2 + 2 =", " 4"),
        Example("Question: How many?\nAnswer:", " 48/2 = 24 pens.\n#### 1,024", reference="1024"),
        Example("Hi", "#### 5", (Message("user", "Hi"), Message("assistant", "#### 5")), reference="5"),
    ]


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "is not JSON .*each line must be one JSON object"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "must be a JSON object such as {…}, but is a list"),
        ("{}", "needs 'prompt' and 'completion'.*but is empty"),
        ('{"promt": "a", "text": "b"}', "has 'promt' and 'text'. Did you mean 'prompt'?"),
        ('{"prompt": "a"}', "field 'completion' is missing"),
        ('{"prompt": "a", "completions": "b"}', "'completion' is missing. Did you mean it by 'completions'?"),
        ('{"answer": "a"}', "field 'question' is missing"),
        (
            '{"prompt": "a", "completion": "b", "id": 3}',
            "unknown field 'id' beside 'prompt' and 'completion'",
        ),
        ('{"prompt": "a", "completion": "b", "question": "c", "answer": "d"}', "has both .*keep one"),
        ('{"prompt": "a", "completion": " "}', "field 'completion' is empty"),
        ('{"question": "a", "answer": "<<1+1=2>>"}', "field 'answer' is empty"),
        ('{"prompt": 3, "completion": "b"}', "field 'prompt' must be text, but is of type int"),
        ('{"prompt": "a", "completion": "\\ud800"}', "field 'completion' holds half of a surrogate pair"),
        ('{"messages": "a"}', "'messages' must be a list, but is of type str"),
        ('{"messages": []}', "needs an assistant message, to be learned, after another one"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "needs an assistant message"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "needs an assistant message"),
        ('{"messages": ["a"]}', r"messages\[0\] must be an object"),
        (
            '{"messages": [{"role": "user"}]}',
            r"'content' of messages\[0\] is missing; the row has 'role'",
        ),
        (
            '{"messages": [{"role": "user", "contents": "a"}]}',
            "unknown field 'contents'. Did you mean 'content'?",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.warns(HeadstartWarning, match=message) as caught:
        rows = read(Text(), path)
    assert str(caught[0].message).startswith(f"{path}: 1 of 3 rows are left out: {path}, line 3: ")
    assert len(rows.examples) == 2


def test_only_completion_and_end_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    done = tokenize_examples([Example("ab", " cd")], tokenizer, max_length=50)
    (row,) = done.rows
    assert tokenizer.decode(row["input_ids"]) == "ab cd</s>"
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    assert row["attention_mask"] == [1] * 6
    assert (done.dropped, done.truncated) == (0, 0)


def test_truncation_keeps_the_start_and_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example("ab", "cdef"), Example("abcd", "e"), Example("a", "b"), Example("abc", "d")]
    done = tokenize_examples(examples, tokenizer, max_length=4)
    assert [tokenizer.decode(row["input_ids"]) for row in done.rows] == ["abcd", "ab</s>", "abcd"]
    assert (done.dropped, done.truncated) == (1, 2)
    with pytest.raises(DataError, match=r"None of the 2 examples .*max_length=3.*Use a larger max_length"):
        tokenize_examples([examples[1], examples[3]], tokenizer, max_length=3)
    with pytest.raises(DataError, match="no examples to tokenise"):
        tokenize_examples([], tokenizer, max_length=3)


def test_a_tokenizer_that_frames_every_text(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, specials)
    (row,) = tokenize_examples([Example("ab", "c")], tokenizer, max_length=9).rows
    assert tokenizer.decode(row["input_ids"]) == "<s>abc</s>"
    assert row["labels"][:3] == [-100] * 3


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        tokenize_examples([Example("a", "b")], tokenizer, max_length=9)


CHAT = {
    "messages": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2", "name": None},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
}


def test_of_a_chat_the_last_assistant_message_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Text().example(CHAT)
    with pytest.raises(DataError, match="no chat template"):
        tokenize_examples([example], tokenizer, max_length=99)
    tokenizer.chat_template = TEMPLATE
    assert render(example, tokenizer) == (
        "<user>1</s>\n<assistant>2</s>\n<user>3</s>\n<assistant>",
        "4</s>\n",
    )
    (row,) = tokenize_examples([example], tokenizer, max_length=99).rows
    assert tokenizer.decode(row["input_ids"]).endswith("<user>3</s>\n<assistant>4</s>")
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learned) == "4</s>"


def test_templates_that_will_not_do(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Text().example(CHAT)
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match="changes the prompt"):
        render(example, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses a chat: no system role"):
        render(example, tokenizer)


def test_batches_are_padded_on_the_right_and_can_be_used_again(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = tokenize_examples([Example("a", "b"), Example("abc", "d"), Example("a", "c")], tokenizer, max_length=9).rows
    made = batches(rows, 2, 0)
    assert [batch["input_ids"].shape for batch in made] == [(2, 5), (1, 3)]
    assert all(tensor.dtype == torch.int64 for batch in made for tensor in batch.values())
    first = made[0]
    assert first["input_ids"][0].tolist() == [*rows[0]["input_ids"], 0, 0]
    assert first["labels"][0].tolist() == [*rows[0]["labels"], -100, -100]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert collate(rows[2:], 0)["labels"].tolist() == made[1]["labels"].tolist()
    with pytest.raises(DataError, match="at least 1, not 0"):
        batches(rows, 0, 0)
