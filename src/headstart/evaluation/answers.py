"""Asking a model item by item: in batches of like length, each answer kept as soon as it is there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from headstart.errors import HeadstartWarning
from headstart.progress import Show, silent
from headstart.statistics.quiet import attribute
from headstart.tasks.base import Example


@torch.no_grad()
def answered(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    encoder: int | None = None,
    stop: Sequence[str] = (),
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    path: Path | None = None,
    progress: Show = silent,
) -> list[str]:
    """Return the model's answers to the examples' prompts.

    Args:
        model, tokenizer: a causal language model's, or an encoder-decoder's.
        examples: with prompts or chats; one that is there twice is asked twice.
        max_new_tokens: at most, for each.
        encoder: see :func:`prompt_ids`.
        stop: an answer ends before any of these.
        temperature: draw each token from the whole distribution at it; None (default) takes the likeliest. What the
            model's own generation settings would change of either doesn't act.
        seed: of the draws.
        batch_size: prompts at a time.
        path: a file of JSON lines, one an answer; what is in it is not asked again.
        progress: called with (step, answers, examples).
    """
    prompts = [prompt_ids(example, tokenizer, encoder=encoder) for example in examples]
    device = next(model.parameters()).device
    drawing: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if temperature is not None:
        drawing |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = _plain_generation(model, tokenizer, max_new_tokens=max_new_tokens, **drawing)
    ends = set(config.eos_token_id or ())

    criteria = _stops(tokenizer, stop)

    def answer(places: list[int]) -> list[tuple[str, bool]]:
        ids, mask = padded([prompts[place] for place in places], tokenizer.pad_token_id, left=encoder is None)
        with torch.random.fork_rng(enabled=temperature is not None):
            if temperature is not None:
                torch.manual_seed(seed * 1_000_003 + places[0])
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=criteria,
            )
        # A decoder begins with one token of its own, where a causal model goes on from the prompt.
        answers = written[:, ids.shape[1] if encoder is None else 1 :]
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        cut = [_cut(text, stop) for text in texts]
        ended = [not ends.isdisjoint(tokens.tolist()) for tokens in answers]
        short = answers.shape[1] < max_new_tokens
        return [
            (part, not (short or end or len(part) < len(text)))
            for part, text, end in zip(cut, texts, ended, strict=True)
        ]

    lengths = [len(prompt) for prompt in prompts]
    with evaluating(model), _generating(model, config):
        made = asked(lengths, answer, batch_size=batch_size, path=path, progress=progress)
    if lost := sum(unfinished for _, unfinished in made):
        text = f"{lost} of {len(made)} answers were cut off after {max_new_tokens} tokens (max_new_tokens)."
        warnings.warn(text, HeadstartWarning, stacklevel=2)
    return [text for text, _ in made]


def asked(
    lengths: Sequence[int],
    answer: Callable[[list[int]], Sequence[Any]],
    *,
    batch_size: int,
    path: Path | None = None,
    progress: Show = silent,
) -> list[Any]:
    """Return what ``answer`` says of each item.

    Args:
        lengths: of the items, by which batches are put together.
        answer: given the places of a batch, returns an answer for each, in plain types.
        batch_size: items at a time.
        path: a file of JSON lines, one an answer; what is in it is not asked again.
        progress: called with ("answers", done, all).
    """
    answers = kept_answers(path)
    todo = sorted((place for place in range(len(lengths)) if place not in answers), key=lambda place: lengths[place])
    for start in range(0, len(todo), batch_size):
        places = todo[start : start + batch_size]
        new = dict(zip(places, answer(places), strict=True))
        answers |= new
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"item": place, "answer": made}) + "\n" for place, made in new.items())
        progress("answers", len(answers), len(lengths))
    return [answers[place] for place in range(len(lengths))]


def prompt_ids(example: Example, tokenizer: Any, *, encoder: int | None = None) -> list[int]:
    """Return the tokens before an example's completion, as training has them.

    Args:
        example: with a prompt or a chat.
        tokenizer: the model's.
        encoder: how many an encoder is given at most, which reads nothing else: they end as the tokenizer ends a
            text. None (default) of a causal model, which goes on from them.
    """
    cut: dict[str, Any] = {} if encoder is None else {"truncation": True, "max_length": encoder}
    if example.messages is not None:
        last = example.chat[:-1] if example.messages[-1].role == "assistant" else example.chat
        return list(tokenizer.apply_chat_template(last, add_generation_prompt=True, tokenize=True, **cut)["input_ids"])
    ids = list(tokenizer(example.prompt, **cut)["input_ids"])
    if encoder is None and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text, but this one goes on
    return ids


def _plain_generation(model: Any, tokenizer: Any, **settings: Any) -> GenerationConfig:
    """Return generation by these settings alone; of the model's own only the tokens that begin and end a text."""
    own = getattr(model, "generation_config", None)
    kept = {name: getattr(own, name, None) for name in ("bos_token_id", "decoder_start_token_id")}
    ends = [getattr(own, "eos_token_id", None), tokenizer.eos_token_id]
    flat = [end for some in ends if some is not None for end in (some if isinstance(some, Sequence) else [some])]
    return GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(dict.fromkeys(map(int, flat))) or None,
        **kept,
        **settings,
    )


@contextmanager
def _generating(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Put a configuration in place of the model's own, from which Transformers fills what another leaves open."""
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    with attribute(owners, "generation_config", config):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def padded(prompts: Sequence[Sequence[int]], pad_token_id: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return prompts' tokens, (prompts, width), which end (or begin) together, and the mask of their padding."""
    rows = [torch.tensor(prompt, dtype=torch.long, device="cpu") for prompt in prompts]
    side = "left" if left else "right"
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids, mask


def kept_answers(path: Path | None) -> dict[int, Any]:
    """Return the answers that a file holds by place; a line that a kill has cut is left out."""
    answers: dict[int, Any] = {}
    if path is not None and path.is_file():
        content = path.read_text(encoding="utf-8")
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                answers[int(row["item"])] = row["answer"]
        if content and not content.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
    return answers


def _stops(tokenizer: Any, stop: Sequence[str]) -> StoppingCriteriaList | None:
    """Return what ends an answer early; None for nothing, or of a tokenizer whose tokens Transformers can't join."""
    if not stop:
        return None
    try:
        return StoppingCriteriaList([StopStringCriteria(tokenizer, list(stop))])
    except ValueError:
        return None


def _cut(text: str, stop: Sequence[str]) -> str:
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text
