"""What is asked in headstart's own way: answers, likelihoods of choices, and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

from headstart.errors import DataError
from headstart.evaluation.answers import answered, asked, padded, prompt_ids
from headstart.evaluation.figures import Figure, figure, score_figures
from headstart.evaluation.sandbox import run_programs
from headstart.progress import Show
from headstart.statistics.batches import IGNORED
from headstart.tasks.base import Example, Run, Task
from headstart.training.data import following_ids, render

Measured = tuple[list[dict[str, Any]], dict[str, Figure]]


Engine = Literal["auto", "lm-eval", "headstart"]


@dataclass(frozen=True)
class Asking:
    """How tasks are asked.

    Attributes:
        data: files, folders or names of the hub by task; ``""`` is for all that have none of their own.
        split: the tasks' name of what is asked.
        limit: the first so many items; None for all.
        windows: the first so many windows of a text; None for ``limit``.
        fewshot: examples before each item, through lm-eval; None for as many as its task has.
        engine: "auto" takes lm-eval wherever it has the task, asked as it asks.
        likelihood: in headstart's own way, compare the likelihoods of choices in place of grading answers.
        samples: answers to an item, in headstart's own way.
        temperature: of the draws; None takes the likeliest tokens of one answer, and is 0.8 for several.
        max_new_tokens: of an answer; None for the task's own.
        max_length: of a window of text, in tokens; None for the model's, at most 2048.
        seed: of the draws.
        batch_size: items at a time.
        run_code: whether generated programs may be run.
    """

    data: Mapping[str, str] = field(default_factory=dict)
    split: str = "test"
    limit: int | None = None
    windows: int | None = None
    fewshot: int | None = None
    engine: Engine = "auto"
    likelihood: bool = False
    samples: int = 1
    temperature: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    seed: int = 0
    batch_size: int = 16
    run_code: bool = False


@dataclass(frozen=True)
class Asker:
    """A model and how it is asked.

    Attributes:
        model, tokenizer: loaded, on their device, in evaluation mode.
        folder: for what has been answered so far.
        asking: how.
        max_length: of what a classifier or an encoder is given, in tokens; None for 512, and for all that it takes.
        show: draws progress.
    """

    model: Any
    tokenizer: Any
    folder: Path
    asking: Asking
    max_length: int | None
    show: Show

    @property
    def positions(self) -> int:
        """The tokens that the model takes at most, as far as it says so."""
        known = getattr(self.model.config, "max_position_embeddings", None)
        return int(known or 2**30)

    @property
    def encoder(self) -> int | None:
        """The tokens that an encoder-decoder is given at most; None of a causal model."""
        return min(self.max_length or 2**30, self.positions) if self.model.config.is_encoder_decoder else None

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(iter(self.model.parameters())).device


def generated(asker: Asker, task: Task, examples: Sequence[Example]) -> Measured:
    """Have every item answered, and return records and metrics."""
    return graded(task, examples, written(asker, task, examples), asker.show)


def written(asker: Asker, task: Task, examples: Sequence[Example]) -> list[list[str]]:
    """Return the model's answers to each item."""
    answers = answered(
        asker.model,
        asker.tokenizer,
        [example for example in examples for _ in range(asker.asking.samples)],
        max_new_tokens=asker.asking.max_new_tokens or task.max_new_tokens,
        encoder=asker.encoder,
        stop=task.stop,
        temperature=asker.asking.temperature,
        seed=asker.asking.seed,
        batch_size=asker.asking.batch_size,
        path=asker.folder / "answers.jsonl",
        progress=lambda step, done, total: asker.show(f"{task.name}: {step}", done, total),
    )
    return [answers[start : start + asker.asking.samples] for start in range(0, len(answers), asker.asking.samples)]


def graded(task: Task, examples: Sequence[Example], outputs: Sequence[list[str]], show: Show) -> Measured:
    """Return records and metrics of the answers to each item."""
    pairs = list(zip(examples, outputs, strict=True))
    if task.together:
        predictions = [task.prediction(texts[0]) for texts in outputs]
        marks = [{"prediction": None if math.isnan(guess) else guess} for guess in predictions]
        figures = score_figures(task, predictions, [float(example.label or 0) for example in examples])
    else:
        run = _programs(task, pairs, show) if task.runs_code else None
        marks = [task.grade_samples(example, texts, run) for example, texts in pairs]  # type: ignore[misc]
        figures = {name: figure([float(mark[name] or 0) for mark in marks]) for name in marks[0]}
    return [task.record(e, texts, mark) for (e, texts), mark in zip(pairs, marks, strict=True)], figures  # type: ignore[arg-type]


def compared(asker: Asker, task: Task, examples: Sequence[Example]) -> Measured:
    """Return which of an item's choices is likeliest: ``acc`` by their sums of log-likelihoods, ``acc_norm`` a byte."""
    without = next((example for example in examples if example.completion not in example.choices), None)
    if without is not None:
        raise DataError(f"{without.where}: task {task.name!r} has no choices there to compare.")
    prompts = [prompt_ids(example, asker.tokenizer, encoder=asker.encoder) for example in examples]

    def answer(places: list[int]) -> list[list[float]]:
        rows, counts = [], []
        for place in places:
            choices = [_choice_ids(asker, examples[place], choice) for choice in examples[place].choices]
            rows += [(prompts[place] + choice, len(prompts[place])) for choice in choices]
            counts.append(len(choices))
        sums = iter(nats_of(asker, rows))
        return [[-next(sums) for _ in range(count)] for count in counts]

    lengths = [len(prompt) for prompt in prompts]
    scores: list[list[float]] = asked(
        lengths,
        answer,
        batch_size=asker.asking.batch_size,
        path=asker.folder / "likelihoods.jsonl",
        progress=lambda _, done, total: asker.show(f"{task.name}: likelihoods", done, total),
    )
    records, marks = [], []
    for example, sums in zip(examples, scores, strict=True):
        right = example.choices.index(example.completion)
        rates = [score / len(choice.encode()) for score, choice in zip(sums, example.choices, strict=True)]
        marks.append({"acc": float(_best(sums) == right), "acc_norm": float(_best(rates) == right)})
        chosen = [example.choices[_best(sums)]]
        records.append(task.record(example, chosen, marks[-1]) | {"choices": example.choices, "log_likelihoods": sums})
    return records, {name: figure([mark[name] for mark in marks]) for name in ("acc", "acc_norm")}


@torch.no_grad()
def classified(asker: Asker, task: Task, examples: Sequence[Example]) -> Measured:
    """Return the classes, or numbers, that a model with a head for them gives, and the task's metrics."""
    tokenizer = asker.tokenizer
    longest = min(asker.max_length or 512, asker.positions)

    def answer(places: list[int]) -> list[list[float]]:
        chosen = [examples[place] for place in places]
        pairs = [example.pair or "" for example in chosen] if chosen[0].pair is not None else None
        prompts = [example.prompt for example in chosen]
        batch = tokenizer(prompts, pairs, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        return asker.model(**batch.to(asker.device)).logits.float().cpu().tolist()

    outputs: list[list[float]] = asked(
        [len(example.prompt) + len(example.pair or "") for example in examples],
        answer,
        batch_size=asker.asking.batch_size,
        path=asker.folder / "logits.jsonl",
        progress=lambda _, done, total: asker.show(f"{task.name}: classes", done, total),
    )
    guesses = [row[0] if task.kind == "regression" else float(_best(row)) for row in outputs]
    labels = [float(example.label or 0) for example in examples]
    records = [
        task.record(example, [], {"prediction": guess}) | {"logits": row}
        for example, guess, row in zip(examples, guesses, outputs, strict=True)
    ]
    return records, score_figures(task, guesses, labels)


@torch.no_grad()
def nats_of(asker: Asker, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """Return the negative log-likelihood of each row's tokens from a place on, which is at least 1."""
    pad, apart = asker.tokenizer.pad_token_id or 0, asker.encoder is not None
    read, mask = padded([ids[:start] if apart else ids for ids, start in rows], pad, left=False)
    batch = {"input_ids": read.to(asker.device), "attention_mask": mask.to(asker.device)}
    if apart:
        written, used = padded([ids[start:] for ids, start in rows], pad, left=False)
        labels = written.masked_fill(used == 0, IGNORED).to(asker.device)
        losses = functional.cross_entropy(
            asker.model(**batch, labels=labels).logits.float().transpose(1, 2), labels, reduction="none"
        )
        return [float(loss) for loss in losses.double().sum(1)]
    logits = asker.model(**batch).logits
    sums = []
    for row, (ids, start) in zip(logits, rows, strict=True):
        predicted = row[start - 1 : len(ids) - 1].float()
        wanted = torch.tensor(ids[start:], dtype=torch.long, device=row.device)
        sums.append(float(functional.cross_entropy(predicted, wanted, reduction="none").double().sum()))
    return sums


def _choice_ids(asker: Asker, example: Example, choice: str) -> list[int]:
    """Return a choice's tokens where it is written: after the prompt, or by a decoder, which no blank precedes."""
    if asker.encoder is not None:
        return following_ids(choice.lstrip(), "", asker.tokenizer)
    prompt = example.prompt if example.messages is None else render(example, asker.tokenizer)[0]
    return following_ids(choice, prompt, asker.tokenizer)


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda place: scores[place])


def _programs(task: Task, pairs: Sequence[tuple[Example, Sequence[str]]], show: Show) -> Run:
    """Run the programs that answers make, several at a time; return what tells of each whether it came to its end."""
    sources: dict[str, None] = {}

    def note(source: str) -> bool:
        sources[source] = None
        return False

    run: Callable[[str], bool] = note
    for example, texts in pairs:
        task.grade_samples(example, texts, run)
    outcomes = run_programs(list(sources), show=show)
    passed = {source: outcome.passed for source, outcome in zip(sources, outcomes, strict=True)}
    return passed.__getitem__
