"""What a run asks beside its held-out examples, as ``headstart eval`` does: further tasks, and what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.evaluation.answers import evaluating
from headstart.evaluation.evaluate import FORGETTING, Job, all_asked, ask_base, planned
from headstart.evaluation.figures import Figure
from headstart.evaluation.own import Asking
from headstart.evaluation.target import Target
from headstart.progress import Show
from headstart.runs.tree import Run
from headstart.tasks.base import Task


@dataclass(frozen=True)
class Asked:
    """What is to be asked, checked and read.

    Attributes:
        jobs: the tasks.
        notes: sentences on what isn't done as asked for.
        asking: how.
        folder: gets a folder for each task.
    """

    jobs: list[Job]
    notes: list[str]
    asking: Asking
    folder: Path

    def base(self, model: Any, tokenizer: Any, show: Show) -> None:
        """Measure the pretrained model, for what is compared with it; what is measured already isn't again."""
        with evaluating(model):
            ask_base(self.jobs, (model, tokenizer), self.asking, self.folder, show)

    def trained(self, model: Any, tokenizer: Any, show: Show) -> Mapping[str, Figure]:
        """Return the trained model's figures by "task/metric"; "forgetting" is what the loss of the text rose by."""
        with evaluating(model):
            figures = all_asked(self.jobs, (model, tokenizer), self.asking, self.folder, self.asking.max_length, show)
        names = {job.name: FORGETTING[:-1] for job in self.jobs if job.name.startswith(FORGETTING)}
        renamed = {}
        for key, figure in figures.items():
            task, _, metric = key.rpartition("/")
            renamed[f"{names.get(task, task)}/{metric}".replace("forgetting/difference", "forgetting")] = figure
        return renamed


def asked_by(run: Run, task: Task, folder: Path) -> Asked:
    """Return what a run asks, before it trains.

    Args:
        run: the settings.
        task: what it learns.
        folder: the run's.

    Raises:
        TaskError: a task is unknown, can't be asked of this model, or its grader isn't installed.
        DataError: its data, or the text, can't be read.
    """
    settings = run.evaluation
    asking = Asking(
        data=settings.data,
        limit=settings.limit,
        windows=settings.forgetting_windows,
        max_new_tokens=settings.max_new_tokens,
        max_length=run.batch.max_length,
        batch_size=run.answers_at_once,
        run_code=settings.allow_code_execution,
    )
    names = [*settings.tasks, *([f"{FORGETTING}{settings.forgetting}"] if settings.forgetting else [])]
    labels = 0 if task.kind == "text" else len(task.labels) or 1
    # An adapter's or not, its base is known here.
    target = Target("the run", "run", run.model.name, folder, labels=labels)
    jobs, notes = planned(target, names, asking) if names else ([], [])
    return Asked(jobs, notes, asking, folder / "evaluation")
