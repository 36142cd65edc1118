"""Running several starts from the same seed on the same data; a run that is done is never done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from headstart.errors import DataError, HeadstartError
from headstart.files import write_json
from headstart.study.comparison import BUILT_IN, Comparison
from headstart.tasks.base import Example
from headstart.tasks.word_problems import generate_problems
from headstart.training.data import example_from_record, load_examples, token_ids, tokenize_examples
from headstart.training.run import Material, Result, method_of, read_result, remove_run, run

# What the command line writes into a comparison's folder, beside its runs.
PAGES = ("table.md", "report.html")


# Called with the method, what is being done for it, how much of that is done, and how much there is.
Progress = Callable[[str, str, int, int], None]


def compare(
    comparison: Comparison,
    folder: Path,
    load: Callable[[], tuple[Any, Any]],
    *,
    progress: Progress | None = None,
    finished: Callable[[list[Result]], None] | None = None,
) -> list[Result]:
    """Run every method that has no result in ``folder`` yet; return the results in the order of the methods.

    Args:
        comparison: what to compare.
        folder: one folder a method is made in it. Interrupted, it goes on where it was cut off.
        load: returns (base model, tokenizer), afresh each time.
        progress: see above.
        finished: called after each method with the results so far.

    Raises:
        HeadstartError: the folder holds a comparison with other settings; or see ``run``.
    """
    comparison.check()
    _claim(folder, comparison)
    report_progress = progress or (lambda method, step, count, total: None)
    results: list[Result] = []
    material: Material | None = None
    for method in comparison.methods:
        place = folder / _folder_name(method)
        result = read_result(place)
        if result is None:
            material = material or prepare(comparison, load()[1])
            result = run(
                method,
                comparison.recipe,
                material,
                load,
                place,
                partial(report_progress, method),
            )
        results.append(result)
        if finished is not None:
            finished(results)
    return results


def prepare(comparison: Comparison, tokenizer: Any) -> Material:
    """Read and tokenise the data of a comparison.

    Raises:
        DataError: see ``load_examples`` and ``tokenize_examples``.
    """
    train, held_out = _examples(comparison)
    length = comparison.recipe.max_length
    graded = [example for example in held_out if example.reference is not None][: comparison.graded_examples]
    learned = tokenize_examples(train, tokenizer, max_length=length)
    measured = tokenize_examples(held_out[: comparison.held_out_examples], tokenizer, max_length=length)
    warnings = [
        f"{what}: {lost} of {count} examples {how} max_length={length}"
        for what, count, rows in (("training", len(train), learned), ("held out", len(held_out), measured))
        for lost, how in ((rows.dropped, "were left out, being longer than"), (rows.truncated, "were cut off at"))
        if lost
    ]
    # An answer that is cut off can't be right; a model that rambles needs no more room than this.
    longest = max((len(token_ids(example, tokenizer)[1]) for example in graded), default=0)
    return Material(
        train=learned.rows,
        held_out=measured.rows,
        graded=graded,
        max_new_tokens=comparison.recipe.max_new_tokens or longest + 16,
        warnings=warnings,
    )


def _examples(comparison: Comparison) -> tuple[list[Example], list[Example]]:
    train, held_out = comparison.train_examples, max(comparison.held_out_examples, comparison.graded_examples)
    if comparison.data == BUILT_IN:
        seed = comparison.recipe.seed
        return (
            [example_from_record(problem) for problem in generate_problems(train, seed=seed, split="train")],
            [example_from_record(problem) for problem in generate_problems(held_out, seed=seed, split="test")],
        )
    if comparison.held_out is not None:
        return (
            load_examples(comparison.data, limit=train),
            load_examples(comparison.held_out, split="test", limit=held_out),
        )
    if not Path(comparison.data).expanduser().is_file():
        return (
            load_examples(comparison.data, split="train", limit=train),
            load_examples(comparison.data, split="test", limit=held_out),
        )
    every = load_examples(comparison.data)
    held_out = min(held_out, len(every) // 5)
    if held_out == 0:
        raise DataError(
            f"{comparison.data} has {len(every)} examples, too few to hold any out: add some, or name a file to "
            "measure on (--held-out)."
        )
    return every[:-held_out][:train], every[-held_out:]


def _claim(folder: Path, comparison: Comparison) -> None:
    """Note what the folder is for, or check that it is for the same: only the methods may differ."""
    path = folder / "comparison.json"
    asked = json.loads(json.dumps(asdict(comparison)))
    if path.is_file():
        noted = json.loads(path.read_text(encoding="utf-8"))
        for settings in (asked, noted):
            settings["methods"] = None
        if asked != noted:
            changed = [key for key in _flat(asked) if _flat(asked)[key] != _flat(noted).get(key)]
            raise HeadstartError(
                f"{folder} holds a comparison with other settings ({', '.join(changed)}): give another --out, or "
                "--force to start over."
            )
        asked = json.loads(json.dumps(asdict(comparison)))
    elif folder.exists() and any(folder.iterdir()):
        raise HeadstartError(f"{folder} exists and holds something else than a comparison: give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(asked, path)


def start_over(folder: Path, comparison: Comparison) -> None:
    """Delete what an earlier comparison wrote in a folder, and make the folder this one's; all else in it stays.

    Raises:
        HeadstartError: it holds something else than a comparison.
    """
    path = folder / "comparison.json"
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not path.is_file():
        raise HeadstartError(
            f"{folder} holds something else than a comparison, so nothing in it is deleted: give another --out."
        )
    earlier = {_folder_name(method) for method in json.loads(path.read_text(encoding="utf-8")).get("methods") or ()}
    for place in folder.iterdir():
        if place.is_dir() and (place.name in earlier or _folder_name(method_of(place) or "") == place.name):
            remove_run(place)
    for name in PAGES:
        (folder / name).unlink(missing_ok=True)
    write_json(asdict(comparison), path)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "recipe"} | settings["recipe"]


def _folder_name(method: str) -> str:
    return "".join(character if character.isalnum() or character in "-.=" else "_" for character in method)


def described(comparison: Comparison, results: Sequence[Result]) -> str:
    """Return the comparison's conditions in one sentence, for tables and pages."""
    recipe = comparison.recipe
    data = "built-in word problems" if comparison.data == BUILT_IN else Path(comparison.data).name
    # What was measured may be less than what was asked for.
    graded = results[0].graded if results else comparison.graded_examples
    held_out = (results[0].held_out if results else 0) or comparison.held_out_examples
    return (
        f"{comparison.model}, {data}, {recipe.steps} steps of {recipe.batch_size} examples, AdamW at {recipe.lr:g}, "
        f"rank {recipe.r}, alpha {recipe.lora_alpha}, seed {recipe.seed}; loss on "
        f"{held_out} held-out examples, {graded} answers graded by exact match"
    )
