"""The verb: plan, claim the folder, load, ask task by task, write; every refusal that can be comes before loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from headstart.environment import environment
from headstart.errors import CheckpointError, RunError, TaskError, nearest
from headstart.evaluation.figures import Figure
from headstart.evaluation.lm import HERE, UnfitError, built, measured
from headstart.evaluation.own import Asker, Asking, Measured, classified, compared, generated
from headstart.evaluation.sandbox import containment
from headstart.evaluation.target import Target
from headstart.evaluation.texts import forgotten, measure_starts, read_texts, text_loss
from headstart.files import sha256, write_json, write_whole
from headstart.names import plain
from headstart.progress import Show, silent
from headstart.settings import differing
from headstart.store.claims import alone_in
from headstart.tasks.base import Example, Task
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import local_files, read

SCHEMA = 1
SETTINGS = "evaluation.json"
TEXT, FORGETTING = "loss:", "forgetting:"
"""What a task's name begins with that is the loss on a text, or what it has risen by; the text's place follows."""


def silent_sentence(sentence: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        target: as it was named.
        metrics: figures by "task/metric".
        engines: who asked, by task.
        notes: sentences.
        settings: on which the figures depend.
        environment: versions, machine, commit.
    """

    target: str
    metrics: dict[str, Figure]
    engines: dict[str, str]
    notes: list[str]
    settings: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One task, checked and read."""

    name: str
    engine: str
    digest: str | None
    task: Task | None = None
    examples: Sequence[Example] = ()
    tasks: Sequence[Any] = ()
    texts: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return plain(self.name)[-100:]


def evaluate(
    target: Target,
    tasks: Sequence[str],
    asking: Asking,
    folder: Path,
    *,
    show: Show = silent,
    say: Callable[[str], None] = silent_sentence,
) -> Evaluation:
    """Ask a model tasks, and return figures with intervals; the same call goes on where it was cut off.

    The folder gets ``evaluation.json`` (the settings), for each task ``TASK/items.jsonl`` (every item's output) and
    ``TASK/figures.json``, and ``result.json``.

    Args:
        target: what is asked, of :func:`headstart.evaluation.target.find_target`.
        tasks: names with settings, ``loss:TEXT`` for the loss on a text, or ``forgetting:TEXT`` for the base model's
            beside it; of a file or a dataset of the hub.
        asking: how.
        folder: of this evaluation and no other; made if need be.
        show: draws progress.
        say: is told, before anything is asked, what isn't done as asked for, and what programs could do here.

    Raises:
        TaskError: a task is unknown, can't be asked of this model or in this way, or its grader isn't installed.
        DataError: the data can't be read.
        RunError: the folder holds another evaluation, or a living process is at it.
        ModelError, CheckpointError: the target can't be loaded.
    """
    if asking.samples > 1 and asking.temperature is None:
        asking = replace(asking, temperature=0.8)
    _check_folder(folder)
    jobs, notes = planned(target, tasks, asking)
    for sentence in notes:
        say(sentence)
    settings = _settings(target, jobs, asking)
    _claim(settings, folder)
    with alone_in(folder):
        figures = _asked_of(target, jobs, asking, folder, show)
    engines = {job.name: job.engine for job in jobs}
    result = Evaluation(target.name, figures, engines, notes, settings, environment())
    write_json({"schema": SCHEMA, **asdict(result)}, folder / "result.json")
    return result


def planned(target: Target, tasks: Sequence[str], asking: Asking) -> tuple[list[Job], list[str]]:
    """Return tasks checked and read, and in sentences what isn't done as asked for; no model is loaded.

    Raises:
        TaskError, DataError, ModelError: see :func:`evaluate`.
    """
    check_names(tasks, asking)
    notes: list[str] = []
    jobs = [_planned(name, target, asking, notes) for name in dict.fromkeys(tasks)]
    names = [job.name for job in jobs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TaskError(f"{twice!r} is asked twice: leave one of them out, or give its file another name.")
    if any(job.task is not None and job.task.runs_code for job in jobs):
        notes += containment()
    return jobs, notes


def check_names(names: Sequence[str], asking: Asking) -> None:
    """Raise TaskError for what can be told from the names alone, before anything is read."""
    if not names:
        raise TaskError("no task is named: give --tasks, such as gsm8k,boolq, or --text PATH.")
    tasks = [parse_task(name) for name in names if not name.startswith((TEXT, FORGETTING))]
    known = {task.name for task in tasks} | {str(task) for task in tasks}
    for name in asking.data:
        if name and name not in known:
            raise TaskError(f"--data names {name!r}, which is none of the tasks.{nearest(name, known)}")
    for task in tasks:
        if not task.metrics:
            raise TaskError(f"task {task.name!r} has nothing to grade answers by.")
        if task.runs_code and not asking.run_code:
            raise TaskError(
                f"task {task.name!r} runs programs that the model writes: allow it with --allow-code-execution, "
                "in a run with evaluation.allow_code_execution=true."
            )


def default_folder(target: Target, tasks: Sequence[str], asking: Asking) -> Path:
    """Return ``evaluations/NAME-KEY``, the same for the same target, tasks and settings."""
    name = target.name.rstrip("/").rpartition("/")[2]
    key = _digest([asdict(target), list(tasks), asdict(replace(asking, batch_size=1))])[:8]
    return Path("evaluations") / f"{name}-{key}"


def split_names(text: str) -> list[str]:
    """Return the tasks of a list with commas, in which a task's settings have commas, too."""
    names: list[str] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        if names and "=" in piece and ":" not in piece.partition("=")[0]:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    return names


def _planned(name: str, target: Target, asking: Asking, notes: list[str]) -> Job:
    """Return a task checked and read: through lm-eval where it asks what is wanted, else in headstart's own way."""
    for prefix in (TEXT, FORGETTING):
        if name.startswith(prefix):
            if target.labels:
                raise TaskError(f"{target.name} is a classifier: it has no loss on a text.")
            if prefix == FORGETTING:
                target.untrained()
            text = name.removeprefix(prefix)
            texts = read_texts(text, asking.split)
            return Job(f"{prefix}{Path(text).name}", "headstart", _digest(texts), texts=texts)
    task = parse_task(name)
    classes = task.kind != "text"
    if target.labels and (not classes or (len(task.labels) or 1) != target.labels):
        raise TaskError(f"{target.name} tells {target.labels} classes, so task {name!r} can't be asked of it.")
    source = asking.data.get(name, asking.data.get(task.name, asking.data.get("")))
    draft = Job(str(task), "lm-eval", None, task)
    reason = _own_reason(task, source, target, asking)
    if reason is None:
        try:
            local = source if source is not None and source != task.hub else None
            tasks, made_of = built(task, local, asking.fewshot)
            files = local_files(task, local, asking.split)
            digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest() if files else None
            return replace(draft, tasks=tasks, files=made_of, digest=digest)
        except UnfitError as unfit:
            reason = str(unfit)
    if reason and asking.engine == "lm-eval":
        raise TaskError(f"task {name!r} can't be asked through lm-eval: {reason}.")
    if classes and not target.labels:
        because = f" ({reason})" if reason else ""
        raise TaskError(
            f"task {task.name!r} wants a head for classes, and {target.name} is a language model{because}: "
            f"give the run of a classifier, or {task.name}:form=text."
        )
    if asking.fewshot is not None:
        raise TaskError(f"--fewshot is lm-eval's, which doesn't ask task {name!r} here: {reason or '--engine'}.")
    if reason and task.lm_eval and asking.engine == "auto":
        notes.append(f"{name}: {reason}, so headstart asks and grades it in its own way.")
    task.check()
    examples = read(task, source, split=asking.split, limit=asking.limit).examples
    if asking.likelihood and not all(example.choices for example in examples):
        raise TaskError(f"task {name!r} has no choices whose likelihoods could be compared: leave --likelihood out.")
    if not (task.runs_code or task.together):
        task.grade(examples[0], examples[0].completion)  # refuses data with nothing to grade by
    digest = _digest([asdict(example) for example in examples])
    return replace(draft, engine="headstart", examples=examples, digest=digest)


def _own_reason(task: Task, source: str | None, target: Target, asking: Asking) -> str | None:
    """Return why lm-eval isn't the one to ask, as a clause; empty where nothing needs saying; None where it is."""
    if asking.engine == "headstart" or task.lm_eval is None:
        return f"it has no task {task.name!r}" if asking.engine == "lm-eval" else ""
    if target.labels:
        return "the model has a head for classes" if asking.engine == "lm-eval" else ""
    if task.runs_code:
        return "lm-eval runs programs unconfined" if asking.engine == "lm-eval" else ""
    if str(task) != task.name:
        return "lm-eval's prompt is its own, and settings are given"
    if asking.samples > 1 or asking.temperature is not None or asking.likelihood:
        return "lm-eval knows nothing of --samples, --temperature and --likelihood"
    if asking.split != "test":
        return "lm-eval asks the test split alone"
    if source is None and task.own_rows(asking.split) is not None:
        return ""
    return None


def _asked_of(target: Target, jobs: Sequence[Job], asking: Asking, folder: Path, show: Show) -> dict[str, Figure]:
    """Ask what isn't done yet; the model is loaded where there is something."""
    todo = [job for job in jobs if _done(folder / job.folder) is None]
    if not todo:
        return all_asked(jobs, None, asking, folder, target.max_length, show)
    if not any(job.name.startswith(FORGETTING) for job in todo):
        return all_asked(jobs, target.load(), asking, folder, target.max_length, show)
    base, tokenizer = target.untrained().load()
    ask_base(todo, (base, tokenizer), asking, folder, show)
    if target.adapter is not None:
        return all_asked(jobs, (target.adapted(base), tokenizer), asking, folder, target.max_length, show)
    del base
    return all_asked(jobs, target.load(), asking, folder, target.max_length, show)


def ask_base(jobs: Sequence[Job], loaded: tuple[Any, Any], asking: Asking, folder: Path, show: Show) -> None:
    """Measure and keep what :func:`all_asked` wants of the base model for those tasks that compare with it."""
    _check_texts(loaded[0], jobs)
    for job in jobs:
        if job.name.startswith(FORGETTING):
            (folder / job.folder).mkdir(parents=True, exist_ok=True)
            measure_starts(Asker(*loaded, folder / job.folder, asking, None, show), job.texts)


def all_asked(
    jobs: Sequence[Job],
    loaded: tuple[Any, Any] | None,
    asking: Asking,
    folder: Path,
    max_length: int | None = None,
    show: Show = silent,
) -> dict[str, Figure]:
    """Return figures by "task/metric", of tasks that are done and of those that are asked now.

    Args:
        jobs: of :func:`planned`.
        loaded: the model, in evaluation mode, and its tokenizer; None where all is done.
        asking: how.
        folder: gets a folder for each task.
        max_length: of what a classifier is given, in tokens.
        show: draws progress.
    """
    figures: dict[str, Figure] = {}
    model, tokenizer = loaded or (None, None)
    _check_texts(model, jobs)
    for job in jobs:
        place = folder / job.folder
        own = _done(place)
        if own is None:
            place.mkdir(parents=True, exist_ok=True)
            asker = Asker(model, tokenizer, place, asking, max_length, show)
            for name, text in job.files.items():
                (place / name).parent.mkdir(exist_ok=True)
                write_whole(place / name, text.replace(HERE, str(place.resolve())))
            records, own = _asked(job, asker)
            lines = (json.dumps({"item": number} | record, default=_plain) for number, record in enumerate(records))
            write_whole(place / "items.jsonl", "".join(line + "\n" for line in lines))
            write_json({name: asdict(figure) for name, figure in own.items()}, place / "figures.json")
        figures |= {f"{job.name}/{name}": figure for name, figure in own.items()}
    return figures


def _check_texts(model: Any, jobs: Sequence[Job]) -> None:
    if model is not None and model.config.is_encoder_decoder and any(job.texts for job in jobs):
        raise TaskError("the model is an encoder-decoder: it has no loss on a running text.")


def _asked(job: Job, asker: Asker) -> Measured:
    """Ask one task."""
    if job.task is None:
        return (forgotten if job.name.startswith(FORGETTING) else text_loss)(asker, job.texts)
    if job.tasks:
        return measured(asker, job.tasks)
    if job.task.kind != "text":
        return classified(asker, job.task, job.examples)
    return (compared if asker.asking.likelihood else generated)(asker, job.task, job.examples)


def _settings(target: Target, jobs: Sequence[Job], asking: Asking) -> dict[str, Any]:
    """Return what the figures depend on, as JSON has it."""
    settings = asdict(asking)
    for name in ("data", "batch_size", "run_code"):
        del settings[name]
    settings["target"] = {**asdict(replace(target, name="")), "weights": target.digest()}
    settings["tasks"] = {job.name: {"engine": job.engine, "data": job.digest} for job in jobs}
    return dict(json.loads(json.dumps(settings, default=str)))


def _check_folder(folder: Path) -> None:
    strange = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if strange and not (folder / SETTINGS).is_file():
        raise RunError(f"{folder} exists and holds no evaluation: give another --out.")


def _claim(settings: Mapping[str, Any], folder: Path) -> None:
    """Note whose the folder is, or check that it is this evaluation's."""
    path = folder / SETTINGS
    if path.is_file():
        try:
            changed = sorted(differing(settings, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: remove {folder}, or give another --out.") from error
        if changed:
            raise RunError(
                f"{folder} holds an evaluation with other settings or data ({', '.join(changed)}): give another --out."
            )
        return
    write_json(dict(settings), path)


def _done(place: Path) -> dict[str, Figure] | None:
    """Return the figures of a task that is done."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads((place / "figures.json").read_text(encoding="utf-8"))
        return {name: Figure(**values) for name, values in content.items()}
    return None


def _plain(value: Any) -> Any:
    """Return numpy's numbers as Python's, and what JSON doesn't know in words."""
    return value.item() if hasattr(value, "item") else str(value)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
