"""Letting a model answer: greedily, in batches of like length, each answer kept as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.evaluation.held_out import evaluating
from headstart.progress import Show, silent
from headstart.tasks.base import Example


@torch.no_grad()
def answered(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    path: Path | None = None,
    progress: Show = silent,
) -> list[str]:
    """Return the model's answers to the examples' prompts.

    Args:
        model, tokenizer: a causal language model's.
        examples: with prompts or chats.
        max_new_tokens: at most, for each.
        stop: an answer ends before any of these.
        batch_size: prompts at a time.
        path: a file of JSON lines, one an answer; what is in it is not asked again.
        progress: called with (step, answers, examples).
    """
    texts = _kept(path)
    prompts = [prompt_ids(example, tokenizer) for example in examples]
    todo = sorted((place for place in range(len(examples)) if place not in texts), key=lambda p: len(prompts[p]))
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(todo), batch_size):
            places = todo[start : start + batch_size]
            ids, mask = _left_padded([prompts[place] for place in places], tokenizer.pad_token_id)
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                stop_strings=list(stop) or None,
                tokenizer=tokenizer if stop else None,
            )
            rows = zip(places, written[:, ids.shape[1] :], strict=True)
            new = {place: _cut(tokenizer.decode(tokens, skip_special_tokens=True), stop) for place, tokens in rows}
            texts |= new
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"item": place, "answer": text}) + "\n" for place, text in new.items())
            progress("answers", len(texts), len(examples))
    return [texts[place] for place in range(len(examples))]


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Return the tokens before an example's completion, as training has them."""
    if example.messages is not None:
        chat = [{"role": message.role, "content": message.content} for message in example.messages]
        last = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        return list(tokenizer.apply_chat_template(last, add_generation_prompt=True, tokenize=True)["input_ids"])
    ids = list(tokenizer(example.prompt)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text, but this one goes on
    return ids


def _kept(path: Path | None) -> dict[int, str]:
    """Return the answers that a file holds by place; a line that a kill has cut is left out."""
    texts: dict[int, str] = {}
    if path is not None and path.is_file():
        content = path.read_text(encoding="utf-8")
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                texts[int(row["item"])] = str(row["answer"])
        if content and not content.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
    return texts


def _cut(text: str, stop: Sequence[str]) -> str:
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long, device="cpu")
        mask[row, width - len(prompt) :] = 1
    return ids, mask
