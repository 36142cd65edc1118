"""A model card that a hub accepts: what was trained from which start, on what, and what came of it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from headstart._version import __version__
from headstart.evaluation.figures import Figure
from headstart.files import write_whole
from headstart.runs.read import tasks_of
from headstart.runs.result import Result
from headstart.runs.tree import Run


def write_card(run: Run, result: Result, trained: Path) -> None:
    """Write ``README.md`` beside what was trained: the adapter, or the model."""
    for place in (trained / "adapter", trained / "model", trained / "merged"):
        if place.is_dir():
            write_whole(place / "README.md", card(run, result))


def card(run: Run, result: Result) -> str:
    """Return the card's text, its head in the hub's own form."""
    name = f"{run.model.name.rstrip('/').rpartition('/')[2]}-{run.started_as.partition(':')[0]}"
    adapter = run.trains in ("adapter", "lora-fa")
    text = tasks_of(run)[0].kind == "text"
    data = ModelCardData(
        base_model=run.model.name,
        library_name="peft" if adapter else "transformers",
        tags=["headstart", *(["lora"] if adapter else [])],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation" if text else "text-classification",
                dataset_type=task.partition(":")[0],
                dataset_name=task,
                metric_type=metric,
                metric_name=metric,
                metric_value=round(figure.value, 6),
            )
            for (task, metric), figure in _of_the_trained(run, result).items()
        ]
        or None,
    )
    optimizer, schedule = run.optimizer, run.schedule
    length = f"{schedule.steps} steps" if schedule.steps else f"{schedule.epochs or 1:g} epochs"
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"Fine-tuned with headstart {__version__} from the start `{run.started_as}`"
        + (f" (form {result.start['form']})." if result.start else "."),
        "",
        f"- base model: `{run.model.name}`, {result.parameters:,} parameters, of which {result.trainable:,} "
        "trained" + (" beside them" if adapter else ""),
        f"- data: `{run.data.task}`, {result.data.get('train', {}).get('examples', 0):,} examples from "
        f"{result.data.get('train', {}).get('where', 'unknown')}",
        f"- training: {length} of {run.batch.size * run.batch.accumulation} samples, {optimizer.name} at "
        f"{optimizer.lr:g}, {schedule.kind}, warm-up {schedule.warmup:g}, precision {run.precision}, seed {run.seed}",
        "",
        "| metric | value | 95 % interval | items |",
        "|---|---|---|---|",
        *(
            f"| {metric} | {figure.value:.4f} | {interval(figure)} | {figure.count} |"
            for metric, figure in result.metrics.items()
        ),
        "",
        *(f"- {warning}" for warning in result.warnings),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _of_the_trained(run: Run, result: Result) -> dict[tuple[str, str], Figure]:
    """Return by task and metric what the trained model is reported by: not what chose it, nor what it began with."""
    own, figures = run.data.held_out_task or run.data.task, {}
    for name, figure in result.metrics.items():
        task, _, metric = name.rpartition("/")
        if metric == "end":
            figures[own, task] = figure
        elif not task and metric != "forgetting":
            figures[own, metric] = figure
        elif task in run.evaluation.tasks:
            figures[task, metric] = figure
    return figures


def interval(figure: Figure) -> str:
    """Return a figure's interval in words."""
    return "" if figure.low is None or figure.high is None else f"{figure.low:.4f} to {figure.high:.4f}"
