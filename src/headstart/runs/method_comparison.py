"""Results in the JSON schema of PEFT's method_comparison (its MetaMathQA folder), which its table reads.

What a run doesn't know is null. Beside the schema's own keys stands one, ``headstart``, with the start and all
settings: the table passes over keys that it doesn't know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from headstart.errors import CheckpointError, RunError
from headstart.files import write_json
from headstart.names import plain
from headstart.runs.folder import SETTINGS
from headstart.runs.read import tasks_of, validated
from headstart.runs.result import Result, read_result
from headstart.runs.tree import Run
from headstart.tasks.instructed import Instructed

_STATUS = {"done": "success", "diverged": "failed", "failed": "failed", "pruned": "canceled"}
_STEPS = 250  # over which method_comparison takes the mean of the last losses, as often as it measures
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


@dataclass(frozen=True)
class Export:
    """What is to be written of one run.

    Attributes:
        folder: the run's.
        name: of the file, as method_comparison names its own: with the time where the run didn't succeed.
        content: of the file, in plain types.
        unknown: keys for which the table takes numbers alone, and that this run has none for.
    """

    folder: Path
    name: str
    content: dict[str, Any]
    unknown: list[str]


def export(places: Sequence[Path], target: Path) -> list[Export]:
    """Write each run's result into a folder, one JSON file a run; return what was written.

    Args:
        places: folders of runs, or that runs' folders are in.
        target: the folder, made if need be; what else is in it stays.

    Raises:
        RunError: a place holds no run; a run has no result yet, trains biases alone, or is there twice; or the target
            can't be written to.
        CheckpointError: a run's files are damaged. Every run is read before the first file is written.
    """
    exports = [exported(folder) for folder in _run_folders(places)]
    folders: dict[str, Path] = {}
    for made in exports:
        other = folders.setdefault(made.name, made.folder)
        if other != made.folder:
            raise RunError(f"{other} and {made.folder} hold the same run: leave one of them out.")
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is no folder: give --peft a folder to write to.")
    try:
        for made in exports:
            write_json(made.content, target / made.name)
    except OSError as error:
        raise RunError(f"{target} can't be written to: {error.strerror or error}.") from error
    return exports


def exported(folder: Path) -> Export:
    """Return a run's result in method_comparison's schema.

    Raises:
        RunError, CheckpointError: see :func:`export`.
    """
    result = read_result(folder)
    if result is None or result.status == "begun":
        raise RunError(f"{folder} holds a run that isn't done: `headstart train` goes on with it.")
    run = validated(result.settings, f"{folder}/result.json")
    if run.trains == "bitfit":
        raise RunError(f"{folder} holds a run that trains biases alone, for which PEFT's comparison has no name.")
    metrics = _metrics(result, run)
    numbers = {
        "accelerator_memory_reserved_avg": result.memory.get("reserved_mean"),
        "accelerator_memory_max": result.memory.get("reserved"),
        "accelerator_memory_reserved_99th": result.memory.get("reserved_99th"),
        "train_time": sum(window["seconds"] for window in result.windows) if result.windows else None,
        "file_size": result.file_size or None,
        "num_trainable_params": result.trainable or None,
        "num_total_params": result.total or None,
    }
    content = {
        "run_info": {
            "created_at": result.created_at or None,
            "total_time": sum(result.seconds.values()) if result.seconds else None,
            "experiment_name": _experiment(run),
            "peft_branch": None,
            "train_config": _train_config(result, run),
            "peft_config": None if run.trains == "full" else _peft_config(folder, run),
            "error_msg": result.reason,
        },
        "train_info": {**numbers, "status": _STATUS[result.status], "metrics": metrics},
        "meta_info": _meta_info(result, run),
        "headstart": {"key": result.key, "start": result.start, "settings": result.settings},
    }
    name, unknown = _experiment(run).replace("/", "--"), []
    if result.status == "done":
        last = {key: value for key, value in metrics[-1].items() if key != "forgetting"}
        unknown = [key for key, value in (numbers | last).items() if value is None]
    elif result.created_at:
        name += f"--{result.created_at.replace(':', '-')}"
    return Export(folder, f"{name}.json", _finite(content), unknown)


def _run_folders(places: Sequence[Path]) -> list[Path]:
    """Return the folders of runs that places are, or have in them."""
    folders: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise RunError(f"there is no folder {str(place)!r}.")
        below = [place] if _is_run(place) else sorted(path for path in place.iterdir() if _is_run(path))
        if not below:
            raise RunError(f"{place} holds no run: give a folder that `headstart train` has written, or that has some.")
        folders += below
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def _is_run(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


def _experiment(run: Run) -> str:
    """Return ``METHOD/NAME``, as method_comparison calls an experiment; the key tells runs of one start apart."""
    words = [run.model.name.rstrip("/").rpartition("/")[2]]
    if run.trains != "full":
        words += [f"rank{run.adapter.r}", run.start.method, *(["lora-fa"] if run.trains == "lora-fa" else [])]
    name = plain("-".join([*words, f"s{run.seed}"]))[:100]
    return f"{'full-finetuning' if run.trains == 'full' else run.adapter.kind}/{name}-{run.key}"


def _train_config(result: Result, run: Run) -> dict[str, Any]:
    """Return the settings in the words of method_comparison's ``TrainConfig``."""
    task, asked = tasks_of(run)
    optimizer, schedule = run.optimizer, run.schedule
    answer = {"max_new_tokens": run.evaluation.max_new_tokens or asked.max_new_tokens}
    kind = {"adamw": "AdamW", "sgd": "SGD"}[optimizer.name]
    options: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "sgd" and optimizer.momentum:
        options["momentum"] = optimizer.momentum
    if optimizer.name == "adamw" and (optimizer.beta1, optimizer.beta2) != (0.9, 0.999):
        options["betas"] = [optimizer.beta1, optimizer.beta2]
    if optimizer.name == "adamw" and optimizer.eps != 1e-8:
        options["eps"] = optimizer.eps
    if optimizer.lora_plus is not None:
        kind, options = "lora+", {**options, "loraplus_lr_ratio": optimizer.lora_plus}
    steps = [step for step, _ in result.series.get("loss", [])]
    constant = schedule.kind == "constant" and not schedule.warmup
    return {
        "model_id": run.model.name,
        "dtype": run.model.dtype if run.model.bits == 16 else f"int{run.model.bits}",
        "max_seq_length": run.batch.max_length,
        "batch_size": run.batch.size * run.batch.accumulation * result.processes,
        "batch_size_eval": run.answers_at_once,
        "max_steps": schedule.steps or (steps[-1] if steps else None),
        "eval_steps": run.evaluation.every if isinstance(run.evaluation.every, int) else None,
        "compile": False,
        "use_gc": run.gradient_checkpointing,
        "query_template": task.asked("{query}", "", "").prompt if isinstance(task, Instructed) else None,
        "seed": run.seed,
        "grad_norm_clip": optimizer.max_grad_norm,
        "optimizer_type": kind,
        "optimizer_kwargs": options,
        "lr_scheduler": None if constant else schedule.kind,
        "use_amp": run.precision != "float32",
        "autocast_adapter_dtype": True,
        "generation_kwargs": answer if run.evaluation.graded_examples else {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _peft_config(folder: Path, run: Run) -> dict[str, Any] | None:
    """Return the config of the adapter that trained, its start called by name; None where it came to none."""
    for stage in ("trained", "start"):
        path = folder / stage / "checkpoint" / "adapter_config.json"
        if not path.is_file():
            continue
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
            config["peft_type"]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: it holds no adapter's config.") from error
        if "init_lora_weights" in config:
            config["init_lora_weights"] = run.start.method == "lora" or run.start.method
        return config
    return None


def _metrics(result: Result, run: Run) -> list[dict[str, Any]]:
    """Return a row for each window of training and, of a run that is done, the last one, which the table reads."""
    rows: list[dict[str, Any]] = []
    windows = result.windows
    sampled = list(accumulate(window["samples"] for window in windows))
    times = [window["seconds"] + window.get("evaluation_seconds", 0.0) for window in windows]
    for window, samples, elapsed in zip(windows, sampled, accumulate(times), strict=True):
        tokens = window.get("tokens")
        row = {"step": window["step"], "valid accuracy": None, "train loss": window["loss"], "train samples": samples}
        row |= {"train time": window["seconds"], "eval time": window.get("evaluation_seconds")}
        row |= {"tokens / sec": tokens / window["seconds"] if tokens and window["seconds"] else None}
        row |= {"mem allocated avg": window.get("allocated"), "mem reserved avg": window.get("reserved")}
        rows.append(row | {"elapsed time": elapsed})
    if result.status == "done":
        every = run.evaluation.every
        losses = result.series.get("loss", [])[-(every if isinstance(every, int) else _STEPS) :]
        counts = [window["tokens"] for window in windows if "tokens" in window]
        row = {"step": losses[-1][0] if losses else None}
        row |= {"test accuracy": _value(result, "exact_match", "accuracy/end")}
        row |= {"train loss": sum(loss for _, loss in losses) / len(losses) if losses else None}
        row |= {"train samples": sampled[-1] if sampled else None}
        row |= {"train total tokens": sum(counts) if counts else None}
        rows.append(row | {"forgetting": _value(result, "forgetting")})
    return rows


def _value(result: Result, *names: str) -> float | None:
    return next((result.metrics[name].value for name in names if name in result.metrics), None)


def _meta_info(result: Result, run: Run) -> dict[str, Any]:
    noted, versions = result.environment, result.environment.get("versions", {})
    packages: dict[str, Any] = {}
    for package in _PACKAGES:
        packages |= {f"{package}-version": versions.get(package), f"{package}-commit-hash": None}
    device = noted.get("device")
    return {
        "model_info": {"sha": result.revision, "created_at": None},
        "dataset_info": {task.name: {"sha": None, "created_at": None} for task in tasks_of(run)},
        "package_info": packages,
        "system_info": {
            "system": noted.get("system"),
            "release": noted.get("release"),
            "version": noted.get("kernel"),
            "machine": noted.get("machine"),
            "processor": noted.get("processor"),
            "accelerator": None if device == "cpu" else device,
        },
        "pytorch_info": noted.get("pytorch"),
    }


def _finite(value: Any) -> Any:
    """Return plain types without numbers that JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
