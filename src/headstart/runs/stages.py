"""A run from its settings to its result, in three stages: start, training, measurement; each goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headstart.context import Clock, Memory, peak_resident
from headstart.environment import environment
from headstart.errors import DataError, HeadstartError, HeadstartWarning
from headstart.evaluation.figures import Figure, loss_figure, score_figures
from headstart.evaluation.held_out import HeldOut, held_out
from headstart.evaluation.own import Asker, Asking, graded, written
from headstart.files import write_json
from headstart.initialize import initialize_
from headstart.layers.lora_fa import lora_fa_
from headstart.methods import parse_method
from headstart.processes import Processes, is_sharded, together
from headstart.progress import Show, silent
from headstart.runs.asked import asked_by
from headstart.runs.card import write_card
from headstart.runs.folder import (
    ITEMS,
    SAVES,
    START,
    TRAINED,
    check_count,
    claim,
    keep,
    last_save,
    save_trained,
    take,
    take_trained,
)
from headstart.runs.model import load_base, made_ready
from headstart.runs.read import tasks_of
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.trainers import check_launcher, make_trainer, set_optimizer, truncated
from headstart.runs.tree import Run
from headstart.runs.watch import Watch, reserved, windows
from headstart.store.claims import alone_in
from headstart.tasks.base import Example, Task
from headstart.tasks.rows import Rows, read


def execute(run: Run, folder: Path, *, show: Show = silent) -> Result:
    """Do what is left of a run in its folder; return its result, at once where there is one.

    The folder gets ``run.json`` (the settings), ``start/`` (a checkpoint), ``trained/`` (a checkpoint, the plain LoRA
    adapter, on request the merged model, a model card) and ``result.json``.

    Args:
        run: the settings.
        folder: of this run and no other; made if need be.
        show: draws progress.

    Raises:
        RunError: the folder is another run's, a living process is at it, or it was begun by other processes, or more.
        HeadstartError: the run failed; the result says so, too. The same call tries again.
    """
    check_launcher()
    result = read_result(folder) if folder.is_dir() else None
    processes = Processes.numbered()
    main = processes.rank == 0
    if main:
        claim(run, folder)
    check_count(folder, processes.count)
    if result is not None and result.status != "failed":
        return result
    with alone_in(folder) if main else nullcontext(), warnings.catch_warnings():
        # At every save PEFT looks up a model's config on the hub, which has no GGUF file's and no packaged model's.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.utils\.(save_and_load|other)")
        try:
            return _executed(run, folder, show if main else silent)
        except Exception as error:
            reason = str(error) or type(error).__name__
            if main:
                failed = _begun(run)
                failed.status, failed.reason = "failed", reason
                write_result(failed, folder)
            if isinstance(error, HeadstartError):
                raise
            raise HeadstartError(f"the run failed: {type(error).__name__}: {reason}") from error


def _executed(run: Run, folder: Path, show: Show) -> Result:
    (task, asked), clock = tasks_of(run), Clock()
    method = parse_method(run.start.method) if run.trains in ("adapter", "lora-fa") else None
    with clock("data"):
        train, measured = load_examples(run, task, asked)
        to_grade = _to_grade(run, asked, measured.examples)
        further = asked_by(run, task, folder)
    with clock("model"):
        base, tokenizer = load_base(run, task)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        memory = Memory(next(base.parameters()).device)
    if further.jobs and Processes.numbered().rank == 0 and read_result(folder / TRAINED) is None:
        with clock("measurement"):
            further.base(base, tokenizer, show)
    with clock("model"):
        model = made_ready(base, run, task)
    with clock("data"):
        trainer = make_trainer(run, task, model, tokenizer, train.examples, measured.examples, folder / SAVES, show)
    main, processes = trainer.is_world_process_zero(), Processes.joined()
    trained = read_result(folder / TRAINED)
    result = trained or read_result(folder / START) or _begun(run)
    result.parameters, result.revision = parameters, getattr(base.config, "_commit_hash", None)
    # No process writes anything before all have read what there was.
    processes.gather(None)
    if not result.data:
        result.data, result.warnings = _about_data(run, train, measured, tokenizer, model)
        result.warnings += further.notes
    if trained is None:
        result.processes = processes.count
        _begin(trainer, method, run, folder, result, clock, show)
        if measured.examples and "loss/start" not in result.metrics:
            with clock("measurement"):
                result.metrics |= _measured(trainer, task, show, "start")
        if main:
            write_result(result, folder / START)
        _train(trainer, folder, result)
        result.memory = {"resident": peak_resident(), "device": memory.peak() if torch.cuda.is_available() else 0}
        if torch.cuda.is_available():
            result.memory |= {"reserved": torch.cuda.max_memory_reserved(), **reserved(trainer.state.log_history)}
        if result.status == "begun":
            save_trained(trainer, tokenizer, run, folder / TRAINED, result)
            if is_sharded(trainer.model):
                # Answering and merging take whole weights: what was saved is loaded as by a run that goes on here.
                trainer.model = made_ready(load_base(run, task)[0], run, task)
                take_trained(trainer.model, run, folder / TRAINED)
    else:
        take_trained(trainer.model, run, folder / TRAINED)
    if result.status == "begun":
        with clock("measurement"), _noting(result.warnings):
            result.metrics |= _measured(trainer, task, show, "end") if measured.examples else {}
            if to_grade:
                result.metrics |= _graded(trainer.model, tokenizer, run, asked, to_grade, folder, show)
            if further.jobs:
                with together(processes):
                    result.metrics |= further.trained(trainer.model, tokenizer, show) if main else {}
    for stage, seconds in clock.seconds.items():
        result.seconds[stage] = result.seconds.get(stage, 0.0) + seconds
    if result.status == "begun":
        result.status = "done"
    if main:
        if result.status == "done":
            if run.merged and method is not None:
                # Last of all: no adapter is left after it.
                trainer.model.merge_and_unload().save_pretrained(folder / TRAINED / "merged")
                tokenizer.save_pretrained(folder / TRAINED / "merged")
            write_card(run, result, folder / TRAINED)
        write_result(result, folder)
        shutil.rmtree(folder / SAVES, ignore_errors=True)
    return result


def _begun(run: Run) -> Result:
    now = datetime.now(UTC).replace(microsecond=0).isoformat()
    return Result(run.key, run.model_dump(mode="json"), created_at=now, environment=environment())


def load_examples(run: Run, task: Task, asked: Task) -> tuple[Rows, Rows]:
    """Return what is learned and what is held out: of a single file without a test split, its last rows.

    ``asked`` is the task of what is held out.

    Raises:
        DataError: see :func:`headstart.tasks.rows.read`.
    """
    wanted, data = max(run.data.held_out_examples, run.evaluation.graded_examples), run.data
    others = data.held_out or data.held_out_task
    if data.train is not None and not others and Path(data.train).expanduser().is_file():
        rows = read(task, data.train)
        last = min(wanted, len(rows.examples) // 5)
        cut = len(rows.examples) - last
        learned = rows.examples[:cut][: data.train_examples]
        return replace(rows, examples=learned), replace(rows, examples=rows.examples[cut:], bad=[])
    train = read(task, data.train, limit=data.train_examples)
    if not wanted:
        return train, replace(train, examples=[], bad=[])
    source = data.held_out if others else data.train
    return train, read(asked, source, split="test", limit=wanted)


def _begin(trainer: Any, method: Any, run: Run, folder: Path, result: Result, clock: Clock, show: Show) -> None:
    """Give the trainer's model its start, the one that is kept where there is one."""
    model = trainer.model
    if method is not None:
        place = folder / START / "checkpoint"
        if (place / "adapter_config.json").is_file():
            take(model, run, place)
        else:
            with clock("start"):
                report = initialize_(
                    model,
                    method,
                    data=trainer,
                    seed=run.seed,
                    form=run.start.form,
                    memory_budget=run.start.memory_budget,
                    progress=show,
                )
            result.start = {
                "method": report.method,
                "form": report.form,
                "seconds": report.seconds,
                "samples": report.samples,
                "cached": report.cached,
                "peak_memory": report.peak_memory,
                "seconds_by_step": dict(report.seconds_by_step),
            }
            result.warnings += list(report.warnings)
            if trainer.is_world_process_zero():
                keep(model, run, place)
        if run.trains == "lora-fa":
            lora_fa_(model)
    result.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = getattr(model, "get_nb_trainable_parameters", None)  # which knows how 4 bits are packed
    result.total = counted()[1] if counted else result.parameters
    set_optimizer(trainer, run)


def _train(trainer: Any, folder: Path, result: Result) -> None:
    """Train to the end, from the last whole save where there is one."""
    watch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))
    trainer.train(resume_from_checkpoint=last_save(folder / SAVES))
    steps = trainer.state.global_step
    # Of a run that was cut off only the rest was timed, and is scaled to all.
    result.seconds["training"] = watch.seconds * steps / max(1, steps - watch.first)
    if watch.diverged is not None:
        result.status, result.reason = "diverged", f"the loss of step {watch.diverged} is no number"
    for name, key in (("loss", "loss"), ("rate", "learning_rate"), ("held-out loss", "eval_loss")):
        rows = [(row["step"], float(row[key])) for row in trainer.state.log_history if key in row]
        if rows:
            result.series[name] = rows
    samples = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    result.windows = windows(trainer.state.log_history, samples)


def _measured(trainer: Any, task: Task, show: Show, when: str) -> dict[str, Figure]:
    """Return the held-out loss, and a classifier's metrics, with intervals over the items."""
    measured = held_out(trainer, regression=task.kind == "regression", progress=show, step=f"loss at the {when}")
    figures = {f"loss/{when}": loss_figure(measured.losses.tolist(), measured.weights.tolist())}
    if task.kind == "text":
        return figures
    scores = score_figures(task, _predicted(measured, task), [float(label) for label in measured.labels])
    return figures | {f"{name}/{when}": score for name, score in scores.items()}


def _predicted(measured: HeldOut, task: Task) -> list[float]:
    logits = measured.logits
    outputs = logits.reshape(len(measured.labels)) if task.kind == "regression" else logits.argmax(1)
    return [float(value) for value in outputs]


def _to_grade(run: Run, task: Task, examples: Sequence[Example]) -> list[Example]:
    """Return the held-out examples that are to be answered; whatever keeps them from it is said before training.

    Raises:
        TaskError: a package that grades is missing.
        DataError: no example has an answer to grade by.
    """
    asked = run.evaluation.graded_examples
    if task.kind != "text" or not asked:
        return []
    task.check()
    chosen = [example for example in examples if example.reference is not None or example.label is not None][:asked]
    if not chosen:
        raise DataError(
            f"evaluation.graded_examples={asked}: no held-out example has an answer to grade by; set it to 0."
        )
    return chosen


def _graded(
    model: Any, tokenizer: Any, run: Run, task: Task, chosen: Sequence[Example], folder: Path, show: Show
) -> dict[str, Figure]:
    """Return the grades of the model's answers, asked as ``headstart eval`` asks; each process asks for its share."""
    processes, place = Processes.joined(), folder / TRAINED
    if processes.several:
        place /= f"answers-{processes.rank}-of-{processes.count}"
        place.mkdir(exist_ok=True)
    asking = Asking(max_new_tokens=run.evaluation.max_new_tokens, batch_size=run.answers_at_once)
    asker = Asker(model, tokenizer, place, asking, run.batch.max_length, show)
    with together(processes):
        share = written(asker, task, processes.share(chosen))
    shares = processes.gather(share)
    if processes.rank:
        return {}
    outputs = [shares[item % processes.count][item // processes.count] for item in range(len(chosen))]
    records, figures = graded(task, chosen, outputs, show)
    write_json(records, folder / ITEMS)
    return figures


@contextmanager
def _noting(sentences: list[str]) -> Iterator[None]:
    """Add what headstart warns of within the block to the sentences."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", HeadstartWarning)
        yield
    for warning in said:
        if issubclass(warning.category, HeadstartWarning):
            sentences.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _about_data(run: Run, train: Rows, measured: Rows, tokenizer: Any, model: Any) -> tuple[dict[str, Any], list[str]]:
    sentences = []
    for what, rows in (("training", train), ("held out", measured)):
        total = len(rows.examples) + len(rows.bad)
        if rows.bad:
            sentences.append(f"{what}: {len(rows.bad)} of {total} rows were left out, the first: {rows.bad[0]}")
        if rows.examples and (lost := truncated(rows.examples, tokenizer, model, run.batch.max_length)):
            lost_end = f"{what}: {lost} of {len(rows.examples)} lost what is beyond {run.batch.max_length} tokens"
            sentences.append(lost_end)
    return {"train": _about(train), "held_out": _about(measured)}, sentences


def _about(rows: Rows) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([asdict(example) for example in rows.examples]).encode()).hexdigest()
    return {"where": rows.where, "examples": len(rows.examples), "bad": len(rows.bad), "sha256": digest}
