"""Plain examples in three ways, and conversations: what is made of them, and each refusal."""

from __future__ import annotations

import json

import pytest

from headstart.errors import DataError
from headstart.tasks import Example, Message, parse_task, read

TEXT, SHAREGPT = parse_task("text"), parse_task("sharegpt")


def test_three_ways_to_write_an_example():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "#### 5", "name": None},
        {"role": "user", "content": "never answered"},
    ]
    messages = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "#### 5"))
    assert TEXT.example({"prompt": "2 + 2 =", "completion": " 4"}) == Example("2 + 2 =", " 4")
    assert TEXT.example({"messages": chat}) == Example("Hi", "#### 5", messages, reference="5")
    worked = "48/2 = <<48/2=24>>24 pens.\n#### 1,024"
    assert TEXT.example({"question": "How many? ", "answer": worked}) == Example(
        "Question: How many?\nAnswer:", " 48/2 = 24 pens.\n#### 1,024", reference="1024"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "needs 'prompt' and 'completion', 'question' and 'answer', or 'messages', but is empty"),
        ({"promt": "a", "text": "b"}, r"has 'promt' and 'text'\. Did you mean 'prompt'\?"),
        ({"prompt": "a"}, "field 'completion' is missing"),
        ({"prompt": "a", "completions": "b"}, r"'completion' is missing\. Did you mean it by 'completions'\?"),
        ({"answer": "a"}, "field 'question' is missing"),
        ({"prompt": "a", "completion": "b", "id": 3}, "unknown field 'id' beside 'prompt' and 'completion'"),
        (dict(prompt="a", completion="b", question="c", answer="d"), "has both .*keep one of them"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"question": "a", "answer": "<<1+1=2>>"}, "field 'answer' is empty"),
        ({"prompt": 3, "completion": "b"}, "field 'prompt' must be text, but is of type int"),
        ({"prompt": "a", "completion": "\ud800"}, "field 'completion' holds half of a surrogate pair"),
        ({"messages": "a"}, "'messages' must be a list, but is of type str"),
        ({"messages": []}, "needs an assistant message, to be learned, after another one"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "needs an assistant message"),
        ({"messages": [{"role": "user", "content": "a"}]}, "needs an assistant message"),
        ({"messages": ["a"]}, r"messages\[0\] must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, r"'content' of messages\[0\] is missing; the row has 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, r"'content' of messages\[0\] must be text, .* NoneType"),
        ({"messages": [{"role": "user", "contents": "a"}]}, r"unknown field 'contents'\. Did you mean 'content'\?"),
    ],
)
def test_a_refusal_names_the_field(row, message):
    with pytest.raises(DataError, match=message):
        TEXT.example(row)


@pytest.mark.parametrize(
    ("completion", "output", "right"),
    [
        ("so 5.\n#### 1,024", "other way\n#### 1024.0", True),
        ("#### 5", "#### 5\nQuestion: next\n#### 6", True),
        ("#### 5", "5", False),
        ("#### 5", "#### 6", False),
        (" Paris", "Paris\n", True),
        (" Paris", "Paris, France", False),
    ],
)
def test_an_answer_is_right_by_its_number_or_its_text(completion, output, right):
    example = TEXT.example({"prompt": "q", "completion": completion})
    assert TEXT.grade(example, output) == {"exact_match": float(right)}


def turns(*pairs):
    return {"id": "x", "conversations": [{"from": who, "value": text, "markdown": None} for who, text in pairs]}


def test_a_conversation_of_sharegpt():
    row = turns(("gpt", "left out"), ("system", "s"), ("human", "Hi"), ("gpt", "Hello"), ("human", "?"), ("gpt", "!"))
    example = SHAREGPT.example(row)
    roles = [(message.role, message.content) for message in example.messages]
    assert roles == [("system", "s"), ("user", "Hi"), ("assistant", "Hello"), ("user", "?"), ("assistant", "!")]
    assert (example.prompt, example.completion) == ("?", "!")
    # What nobody answers is not learned from.
    assert SHAREGPT.example(turns(("human", "a"), ("gpt", "b"), ("human", "c"))).completion == "b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x"}, "field 'conversations' must be a list, but is of type NoneType"),
        (turns(("gpt", "a")), "field 'conversations' needs an assistant message"),
        (turns(("human", "a"), ("human", "b"), ("gpt", "c")), "has two messages of the user in a row"),
        (turns(("human", "a"), ("gpt", "")), r"'value' of conversations\[1\] is empty"),
        (turns(("human", "a"), ("robot", "b")), r"conversations\[1\] is from 'robot', which is none of 'human' and "),
        ({"conversations": [{"from": "human"}]}, r"'value' of conversations\[0\] is missing"),
        ({"conversations": ["a"]}, r"conversations\[0\] must be an object with 'from' and 'value'"),
    ],
)
def test_a_conversation_that_cannot_be_learned(row, message):
    with pytest.raises(DataError, match=message):
        SHAREGPT.example(row)


def test_a_file_of_conversations(tmp_path):
    path = tmp_path / "ShareGPT.json"
    path.write_text(json.dumps([turns(("human", "a"), ("gpt", "b"))] * 2), encoding="utf-8")
    assert len(read(SHAREGPT, tmp_path).examples) == 2
