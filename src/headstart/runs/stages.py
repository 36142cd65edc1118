"""A run from its settings to its result, in three stages: start, training, measurement; each goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict

from headstart.context import Clock, Memory, peak_resident
from headstart.environment import environment
from headstart.errors import CheckpointError, DataError, HeadstartError, RunError
from headstart.evaluation.figures import Figure, loss_figure, score_figures
from headstart.evaluation.held_out import HeldOut, held_out
from headstart.evaluation.own import Asker, Asking, graded, written
from headstart.files import write_json
from headstart.initialize import initialize_
from headstart.layers.checkpoint import load_checkpoint, save_checkpoint
from headstart.layers.export import save_lora
from headstart.layers.lora_fa import lora_fa_
from headstart.methods import parse_method
from headstart.processes import Processes, is_sharded, together
from headstart.progress import Show, silent
from headstart.runs.card import write_card
from headstart.runs.model import load_base, made_ready
from headstart.runs.result import FILE, Result, read_result, write_result
from headstart.runs.trainers import Watch, check_launcher, make_trainer, set_optimizer, truncated
from headstart.runs.tree import Run
from headstart.settings import differing
from headstart.store.claims import alone_in
from headstart.tasks.base import Example, Task
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import Rows, read

SETTINGS, START, TRAINED, SAVES = "run.json", "start", "trained", "trainer"


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
        _claim(run, folder)
    _check_count(folder, processes.count)
    if result is not None and result.status != "failed":
        return result
    with alone_in(folder) if main else nullcontext():
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
    task, clock = parse_task(run.data.task), Clock()
    method = parse_method(run.start.method) if run.trains in ("adapter", "lora-fa") else None
    with clock("data"):
        train, measured = load_examples(run, task)
        to_grade = _to_grade(run, task, measured.examples)
    with clock("model"):
        base, tokenizer = load_base(run, task)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        memory = Memory(next(base.parameters()).device)
        model = made_ready(base, run, task)
    with clock("data"):
        trainer = make_trainer(run, task, model, tokenizer, train.examples, measured.examples, folder / SAVES, show)
    main, processes = trainer.is_world_process_zero(), Processes.joined()
    trained = read_result(folder / TRAINED)
    result = trained or read_result(folder / START) or _begun(run)
    result.parameters = parameters
    # No process writes anything before all have read what there was.
    processes.gather(None)
    if not result.data:
        result.data, result.warnings = _about_data(run, train, measured, tokenizer)
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
        if result.status == "begun":
            _save(trainer, tokenizer, run, folder / TRAINED, result)
            if is_sharded(trainer.model):
                # Answering and merging take whole weights: what was saved is loaded as by a run that goes on here.
                trainer.model = made_ready(load_base(run, task)[0], run, task)
                _take_trained(trainer.model, run, folder / TRAINED)
    else:
        _take_trained(trainer.model, run, folder / TRAINED)
    if result.status == "begun":
        with clock("measurement"):
            result.metrics |= _measured(trainer, task, show, "end") if measured.examples else {}
            if to_grade:
                result.metrics |= _graded(trainer.model, tokenizer, run, task, to_grade, folder, show)
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
    return Result(run.key, run.model_dump(mode="json"), environment=environment())


def load_examples(run: Run, task: Task) -> tuple[Rows, Rows]:
    """Return what is learned and what is held out: of a single file without a test split, its last rows.

    Raises:
        DataError: see :func:`headstart.tasks.rows.read`.
    """
    wanted, data = max(run.data.held_out_examples, run.evaluation.graded_examples), run.data
    if data.train is not None and data.held_out is None and Path(data.train).expanduser().is_file():
        rows = read(task, data.train)
        last = min(wanted, len(rows.examples) // 5)
        cut = len(rows.examples) - last
        learned = rows.examples[:cut][: data.train_examples]
        return replace(rows, examples=learned), replace(rows, examples=rows.examples[cut:], bad=[])
    train = read(task, data.train, limit=data.train_examples)
    if not wanted:
        return train, replace(train, examples=[], bad=[])
    return train, read(task, data.held_out or data.train, split="test", limit=wanted)


def _begin(trainer: Any, method: Any, run: Run, folder: Path, result: Result, clock: Clock, show: Show) -> None:
    """Give the trainer's model its start, the one that is kept where there is one."""
    model = trainer.model
    if method is not None:
        place = folder / START / "checkpoint"
        if (place / "adapter_config.json").is_file():
            _take(model, run, place)
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
                "peak_memory": report.peak_memory,
                "seconds_by_step": dict(report.seconds_by_step),
            }
            result.warnings += list(report.warnings)
            if trainer.is_world_process_zero():
                _keep(model, run, place)
        if run.trains == "lora-fa":
            lora_fa_(model)
    result.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    set_optimizer(trainer, run)


def _train(trainer: Any, folder: Path, result: Result) -> None:
    """Train to the end, from the last whole save where there is one."""
    watch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))
    trainer.train(resume_from_checkpoint=_last_save(folder / SAVES))
    steps = trainer.state.global_step
    # Of a run that was cut off only the rest was timed, and is scaled to all.
    result.seconds["training"] = watch.seconds * steps / max(1, steps - watch.first)
    if watch.diverged is not None:
        result.status, result.reason = "diverged", f"the loss of step {watch.diverged} is no number"
    for name, key in (("loss", "loss"), ("rate", "learning_rate"), ("held-out loss", "eval_loss")):
        rows = [(row["step"], float(row[key])) for row in trainer.state.log_history if key in row]
        if rows:
            result.series[name] = rows


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
    asking = Asking(max_new_tokens=run.evaluation.max_new_tokens, batch_size=2 * run.batch.size)
    asker = Asker(model, tokenizer, place, asking, run.batch.max_length, show)
    with together(processes):
        share = written(asker, task, processes.share(chosen))
    shares = processes.gather(share)
    if processes.rank:
        return {}
    outputs = [shares[item % processes.count][item // processes.count] for item in range(len(chosen))]
    records, figures = graded(task, chosen, outputs, show)
    write_json(records, folder / "items.json")
    return figures


def _save(trainer: Any, tokenizer: Any, run: Run, place: Path, result: Result) -> None:
    """Save what was trained: of a sharded model every process gathers, and one writes, for which the others wait."""
    model, main, processes = trainer.model, trainer.is_world_process_zero(), Processes.joined()
    lora = run.trains in ("adapter", "lora-fa") and run.adapter.kind == "lora"
    state = None if lora else trainer.accelerator.get_state_dict(model)
    if lora and (main or is_sharded(model)):
        _keep(model, run, place / "checkpoint")
        save_lora(model, place / "adapter", force=True)
    with together(processes):
        if not main:
            return
        if run.trains not in ("adapter", "lora-fa"):
            model.save_pretrained(place / "model", state_dict=state)
            tokenizer.save_pretrained(place / "model")
        elif not lora:
            for name in ("checkpoint", "adapter"):
                model.save_pretrained(place / name, state_dict=state)
        write_result(result, place)


def _keep(model: Any, run: Run, place: Path) -> None:
    """Save an adapter to go on from; VeRA's are plain tensors, for which PEFT's own way is enough."""
    if run.adapter.kind == "lora":
        save_checkpoint(model, place, force=True)
    else:
        model.save_pretrained(place)


def _take(model: Any, run: Run, place: Path) -> None:
    """Give the model's adapter what was kept."""
    if run.adapter.kind == "lora":
        load_checkpoint(model, place)
        return
    device = next(model.parameters()).device
    set_peft_model_state_dict(model, load_peft_weights(str(place), device=str(device)))


def _take_trained(model: Any, run: Run, place: Path) -> None:
    """Give the model what ``_save`` wrote."""
    if run.trains in ("adapter", "lora-fa"):
        _take(model, run, place / "checkpoint")
    else:
        model.load_state_dict(_tensors(place / "model"), strict=False)


def _about_data(run: Run, train: Rows, measured: Rows, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    warnings = []
    for what, rows in (("training", train), ("held out", measured)):
        total = len(rows.examples) + len(rows.bad)
        if rows.bad:
            warnings.append(f"{what}: {len(rows.bad)} of {total} rows were left out, the first: {rows.bad[0]}")
        if rows.examples and (lost := truncated(rows.examples, tokenizer, run.batch.max_length)):
            warnings.append(f"{what}: {lost} of {len(rows.examples)} lost what is beyond {run.batch.max_length} tokens")
    return {"train": _about(train), "held_out": _about(measured)}, warnings


def _about(rows: Rows) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([asdict(example) for example in rows.examples]).encode()).hexdigest()
    return {"where": rows.where, "examples": len(rows.examples), "bad": len(rows.bad), "sha256": digest}


def _claim(run: Run, folder: Path) -> None:
    """Note whose the folder is, or check that it is this run's."""
    path = folder / SETTINGS
    own: dict[str, Any] = {"key": run.key, "settings": run.model_dump(mode="json")}
    if path.is_file():
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            if other["key"] == run.key:
                return
            changed = sorted(differing(own["settings"], other["settings"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: remove it, or give another --out.") from error
        raise RunError(f"{folder} holds a run with other settings ({', '.join(changed)}): give another --out.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and holds no run: give another --out.")
    write_json(own, path)


def _check_count(folder: Path, count: int) -> None:
    """Raise RunError where training would go on in another number of processes: its steps would see other batches."""
    begun = read_result(folder / START)
    if begun is None or begun.processes == count or (folder / TRAINED / FILE).is_file():
        return
    if _last_save(folder / SAVES) is not None:
        raise RunError(
            f"{folder} was trained so far by a number of {begun.processes} processes, and a step of {count} would see "
            f"other samples: go on with {begun.processes}, or give another --out."
        )


def _last_save(output: Path) -> str | None:
    """Return the last whole save to go on from: the Trainer writes its state last, and a kill may leave half of it.

    That of the last step is none: the Trainer would make another step from it.
    """
    saves = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in saves:
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if state["global_step"] < state["max_steps"]:
            return str(path)
    return None


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
