"""A run from its settings to its result, in three stages: start, training, measurement; each goes on where it was."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headstart.context import Clock, Memory, peak_resident, reset_peak_resident
from headstart.environment import environment
from headstart.errors import DataError, HeadstartError, HeadstartWarning
from headstart.initialize import initialize_
from headstart.layers.lora_fa import lora_fa_
from headstart.methods import Method, parse_method
from headstart.monitor import RECORDS
from headstart.processes import Processes, is_sharded, together
from headstart.progress import Show, silent
from headstart.report import Report
from headstart.runs.asked import asked_by
from headstart.runs.card import write_card
from headstart.runs.examples import Examples, load_examples
from headstart.runs.folder import (
    CHECKPOINT,
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
from headstart.runs.measure import graded_answers, measured, measured_at_the_end, note_lost, to_be_graded
from headstart.runs.model import load_base, made_ready
from headstart.runs.preserved import check_preserved, preserved_data
from headstart.runs.read import tasks_of
from headstart.runs.result import Result, read_result, write_result
from headstart.runs.shared import Shared
from headstart.runs.trainers import check_launcher, check_optimizer, make_trainer, set_optimizer
from headstart.runs.tree import Run
from headstart.runs.watch import Judge, Watch, reserved, windows
from headstart.store.claims import alone_in
from headstart.tasks.base import Task

# What a trainer's history keeps, by what the result calls it.
SERIES = {
    "loss": "loss",
    "rate": "learning_rate",
    "gradient norm": "grad_norm",
    "held-out loss": "eval_loss",
}


def execute(
    run: Run,
    folder: Path,
    *,
    shared: Shared | None = None,
    judge: Judge | None = None,
    show: Show = silent,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Do what is left of a run in its folder; return its result, at once where there is one.

    The folder gets ``run.json`` (the settings), ``start/`` (a checkpoint), ``trained/`` (a checkpoint, the plain LoRA
    adapter, on request the merged model, a model card) and ``result.json``.

    Args:
        run: the settings.
        folder: of this run and no other; made if need be.
        shared: what the runs of a study share; None (default) for a run on its own.
        judge: may end training early; see :class:`headstart.runs.watch.Watch`.
        show: draws progress.
        tell: called with the result's warnings that are known before training, as soon as they are.

    Raises:
        RunError: the folder is another run's, a living process is at it, it was begun by other processes, or more, or
            its data have changed.
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
        if main:
            _check_finished(run, folder, result)
        return result
    with alone_in(folder) if main else nullcontext(), warnings.catch_warnings():
        # At every save PEFT looks up a model's config on the hub, which has no GGUF file's and no packaged model's.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.utils\.(save_and_load|other)")
        try:
            shared, show, tell = (None if processes.several else shared), *((show, tell) if main else (silent, None))
            return _executed(run, folder, shared, judge, show, tell)
        except Exception as error:
            reason = str(error) or type(error).__name__
            if main:
                write_failed(run, folder, reason)
            if isinstance(error, HeadstartError):
                raise
            raise HeadstartError(f"the run failed: {type(error).__name__}: {reason}") from error


def write_failed(run: Run, folder: Path, reason: str) -> None:
    """Write into a run's folder that it failed, and why."""
    failed = _begun(run)
    failed.status, failed.reason = "failed", reason
    write_result(failed, folder)


def _check_finished(run: Run, folder: Path, result: Result) -> None:
    """Raise RunError where a finished run's data are others now; where they can't be read, its result stands."""
    try:
        examples = load_examples(run, *tasks_of(run))
    except DataError:
        return
    examples.check_unchanged(_digests(result), str(folder))


def _digests(result: Result) -> dict[str, str]:
    """Return the digests of the data that a result is of, by part."""
    return {name: part["sha256"] for name, part in result.data.items() if "sha256" in part}


def _executed(
    run: Run,
    folder: Path,
    shared: Shared | None,
    judge: Judge | None,
    show: Show,
    tell: Callable[[str], None] | None,
) -> Result:
    (task, asked), clock = tasks_of(run), Clock()
    reset_peak_resident()
    method = parse_method(run.start.method) if run.trains in ("adapter", "lora-fa") else None
    if method is not None:
        check_preserved(method, run.start.preserve, "start.preserve")
        check_optimizer(run, method)
    with clock("data"):
        examples = _loaded(run, task, asked, shared)
        if shared:
            shared.check_data(run, examples)
        to_grade = to_be_graded(run, asked, examples.held_out.examples)
        further = asked_by(run, task, folder)
    with clock("model"):
        base, tokenizer = shared.base(run, lambda: load_base(run, task)) if shared else load_base(run, task)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        memory = Memory(next(base.parameters()).device)
    if further.jobs and Processes.numbered().rank == 0 and read_result(folder / TRAINED) is None:
        with clock("measurement"):
            further.base(base, tokenizer, show)
    with clock("model"):
        model = made_ready(base, run, task)
    with clock("data"):
        known, watch = shared.tokens(run) if shared else {}, Watch(show, judge)
        trainer, data = make_trainer(run, task, model, tokenizer, examples.by_name(), folder / SAVES, watch, known)
        known.update(data)
    main, processes = trainer.is_world_process_zero(), Processes.joined()
    trained = read_result(folder / TRAINED)
    result = trained or read_result(folder / START) or _begun(run)
    result.parameters, result.revision = parameters, getattr(base.config, "_commit_hash", None)
    # No process writes anything before all have read what there was.
    processes.gather(None)
    if not result.data:
        result.data, result.warnings = examples.about(run, tokenizer, model)
        result.warnings += further.notes
        if run.evaluation.keep == "best" and not run.data.validation_examples:
            result.warnings.append(
                "evaluation.keep=best chose among the states by the held-out data that are reported, which flatters "
                "the figures: set data.validation_examples"
            )
    else:
        examples.check_unchanged(_digests(result), str(folder))
    if tell is not None and trained is None:
        for sentence in result.warnings:
            tell(sentence)
    if trained is None:
        result.processes = processes.count
        _begin(trainer, method, run, folder, shared, result, clock, show)
        if "held_out" in data and "loss/start" not in result.metrics:
            with clock("measurement"):
                result.metrics |= measured(trainer, data["held_out"], task, show, "start")[0]
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
            result.metrics |= measured_at_the_end(trainer, data, task, folder, main, show)
            note_lost(result)
            if to_grade and result.status == "begun":
                result.metrics |= graded_answers(trainer.model, tokenizer, run, asked, to_grade, folder, show)
            if further.jobs and result.status == "begun":
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


def _loaded(run: Run, task: Task, asked: Task, shared: Shared | None) -> Examples:
    if shared is None:
        return load_examples(run, task, asked)
    return shared.data(run, lambda: load_examples(run, task, asked))


def _begin(
    trainer: Any,
    method: Method | None,
    run: Run,
    folder: Path,
    shared: Shared | None,
    result: Result,
    clock: Clock,
    show: Show,
) -> None:
    """Give the trainer's model its start, the one that is kept where there is one."""
    model = trainer.model
    if method is not None:
        place = folder / START
        if (place / CHECKPOINT / "adapter_config.json").is_file():
            take(model, run, place / CHECKPOINT)
        else:

            def make(place: Path) -> Result:
                with clock("start"):
                    return _started(trainer, method, run, shared, place, show)

            place, started, is_new = (place, make(place), True) if shared is None else shared.start(run, make, show)
            if not is_new:
                take(model, run, place / CHECKPOINT)
            result.start = {**started.start, "shared": not is_new}
            result.warnings += started.warnings
        if run.trains == "lora-fa":
            lora_fa_(model)
    result.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = getattr(model, "get_nb_trainable_parameters", None)  # which knows how 4 bits are packed
    result.total = counted()[1] if counted else result.parameters
    set_optimizer(trainer, run)


def _started(trainer: Any, method: Method, run: Run, shared: Shared | None, place: Path, show: Show) -> Result:
    """Make the start of the trainer's model and keep it in a folder; return what is known of it."""
    trainer.kept_statistics = kept = shared.statistics(run) if shared else None
    report = initialize_(
        trainer.model,
        method,
        data=trainer,
        preserve=preserved_data(
            run.start.preserve,
            method,
            trainer.processing_class,
            max_length=run.batch.max_length,
            batch_size=run.batch.size,
        ),
        seed=run.seed,
        form=run.start.form,
        memory_budget=run.start.memory_budget,
        progress=show,
    )
    started = _begun(run)
    started.start = {
        "method": report.method,
        "form": report.form,
        "seconds": report.seconds,
        "samples": report.samples,
        "cached": report.cached,
        "peak_memory": report.peak_memory,
        "seconds_by_step": dict(report.seconds_by_step),
        # Which starts the data were read for together; the seconds are those of reading for all of them.
        "read_for": [str(other) for other in kept.served] if kept else [],
        "searched": {name: asdict(searched) for name, searched in report.searched.items()},
        **_approximated(report),
    }
    started.warnings = list(report.warnings)
    if trainer.is_world_process_zero():
        keep(trainer.model, run, place / CHECKPOINT)
    return started


def _approximated(report: Report) -> dict[str, float]:
    """Return how far the products are from the weights that they approximate, relative to these, of methods that do."""
    pairs = [(layer.info["error"], layer.norm_weight) for layer in report.layers if "error" in layer.info]
    weights = sum(norm**2 for _, norm in pairs if norm)
    return {"relative_error": math.sqrt(sum(error for error, norm in pairs if norm) / weights)} if weights else {}


def _train(trainer: Any, folder: Path, result: Result) -> None:
    """Train to the end, from the last whole save where there is one."""
    watch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))
    trainer.train(resume_from_checkpoint=last_save(folder / SAVES))
    steps = trainer.state.global_step
    # Of a run that was cut off only the rest was timed, and is scaled to all.
    result.seconds["training"] = watch.seconds * steps / max(1, steps - watch.first)
    if watch.pruned:
        result.status, result.reason = "pruned", watch.pruned
    if watch.diverged is not None:
        result.status, result.reason = "diverged", f"the loss of step {watch.diverged} is no number"
    for name, key in SERIES.items():
        rows = [(row["step"], float(row[key])) for row in trainer.state.log_history if key in row]
        if rows:
            result.series[name] = rows
    result.monitor = [row for entry in trainer.state.log_history for row in entry.get(RECORDS, ())]
    samples = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    result.windows = windows(trainer.state.log_history, samples)


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
