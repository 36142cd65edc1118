"""Measuring a model on held-out examples: the loss on completions, and exact match of the final number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example
from headstart.tasks.word_problems import final_number, same_number
from headstart.training.data import batches, token_ids

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Graded:
    """Exact match: how many answers were right, of how many, the texts, and how many texts were cut off by the cap."""

    right: int
    total: int
    texts: list[str]
    cut_off: int = 0

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.total


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    rows: Sequence[dict[str, list[int]]],
    pad_token_id: int,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> float:
    """Return the mean cross entropy over all completion tokens of ``rows`` (see ``tokenize_examples``), in nats."""
    device = next(model.parameters()).device
    total, tokens, done = 0.0, 0, 0
    with evaluating(model):
        # Rows of like length share a batch, so that little is computed on padding.
        for batch in batches(sorted(rows, key=lambda row: len(row["input_ids"])), batch_size, pad_token_id):
            moved = {key: value.to(device) for key, value in batch.items()}
            # A causal model never uses a label in first place; the loss it returns is a mean over the rest.
            used = int((moved["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**moved).loss) * used
            tokens += used
            done += len(moved["labels"])
            if progress is not None:
                progress(done, len(rows))
    return total / tokens


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Graded:
    """Let the model answer greedily, and compare the number after its last ``####`` with the example's.

    Examples without such an answer are left out; all of them must not be.
    """
    graded = [example for example in examples if example.reference is not None]
    if not graded:
        raise ValueError("no example has an answer to grade by")
    prompts = [token_ids(example, tokenizer)[0] for example in graded]
    order = sorted(range(len(graded)), key=lambda index: len(prompts[index]))
    texts, cut_off = [""] * len(graded), 0
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            ids, mask = padded([prompts[index] for index in chunk], tokenizer.pad_token_id)
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for index, tokens in zip(chunk, written[:, ids.shape[1] :], strict=True):
                texts[index] = tokenizer.decode(tokens, skip_special_tokens=True)
                cut_off += len(tokens) >= max_new_tokens and tokenizer.eos_token_id not in tokens.tolist()
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    right = sum(same_number(final_number(text), example.reference) for text, example in zip(texts, graded, strict=True))
    return Graded(right, len(graded), texts, cut_off)


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
