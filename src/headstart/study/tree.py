"""The settings of a study: a base run, axes and seeds, and nothing else but how it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from headstart.errors import RunError
from headstart.methods.per_layer import spelled
from headstart.runs.read import read_settings, run_with, sentence
from headstart.runs.tree import Node, Run

START, RATE = "start", "optimizer.lr"
LABEL = "label"


def _seeds(value: Any) -> Any:
    if type(value) is int and value >= 1:
        return tuple(range(value))
    if isinstance(value, list | tuple) and value and all(type(seed) is int for seed in value):
        return tuple(value)
    raise ValueError(f"{value!r} is neither how many seeds nor which: write 3, or [0, 1, 2]")


def _grid(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


class Study(Node):
    """A base run, axes and seeds.

    Attributes:
        base: settings of a run, as a run's file holds them; or the name of a recipe, or of a file.
        axes: by setting of a run, the values that it takes: ``start: [lora, pissa]``, ``adapter.r: [4, 16]``. A value
            that changes several settings is a mapping of these, with a ``label`` if need be:
            ``{start: lora-sb, adapter.r: 64}``. The rates, ``optimizer.lr``, are numbers or multiples of the base
            run's (``lora × {1/16 … 2}``), or a mapping of either by start, "*" for all others; where there is no such
            axis, a start may have its own: ``{start: pissa, optimizer.lr: 1e-4}``.
        seeds: how many (0, 1, …), or which.
        reference: the start that the others are compared with; by default the first.
        chosen_by: the figure of the validation data by which a rate is chosen: "loss", or a metric of a classifier;
            by default a classifier's first metric, else the loss.
        reported: figures of the held-out data; by default all that the runs have, ``chosen_by`` first.
    """

    base: dict[str, Any] | str = Field(default_factory=dict)
    axes: dict[str, Annotated[list[Any] | dict[str, Any], BeforeValidator(_grid)]] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds)] = (0,)
    reference: str | None = None
    chosen_by: str | None = None
    reported: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _no_empty_axis(self) -> Study:
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{name} has no values: give some, or leave it out")
            if isinstance(values, dict) and name != RATE:
                raise ValueError(f"axes.{name} must be a list of values")
        if "seed" in self.axes:
            raise ValueError("axes.seed: seeds have a setting of their own, seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        return self


def read_study(path: Path) -> Study:
    """Return the study that a YAML file describes.

    Raises:
        RunError: it can't be read, or a key or value is none; one sentence.
    """
    return validated_study(read_settings(path), str(path))


def validated_study(settings: Mapping[str, Any], where: str) -> Study:
    """Return the study with these settings.

    Raises:
        RunError: see :func:`read_study`.
    """
    try:
        return Study.model_validate(settings)
    except ValidationError as error:
        raise RunError(f"{where}: {sentence(error, Study)}") from None


def base_run(study: Study) -> Run:
    """Return the run that a study varies.

    Raises:
        RunError: its settings are none.
    """
    return run_with(study.base, {}, "base")


def changes_of(axis: str, value: Any) -> tuple[str, dict[str, Any]]:
    """Return what a value of an axis is called, and the settings of a run that it changes, by dotted key.

    Raises:
        RunError: a mapping has no name to be called by.
    """
    if isinstance(value, Mapping) and (LABEL in value or axis in value):
        changes = {key: part for key, part in value.items() if key != LABEL}
        label = value.get(LABEL, _spelled(changes.get(axis)) if axis in changes else None)
        if label is None:
            raise RunError(f"axes.{axis}: {dict(value)!r} needs a label to be called by.")
        if LABEL not in value and len(changes) > 1:
            further = [f"{key.rpartition('.')[2]}={part}" for key, part in changes.items() if key not in (axis, RATE)]
            label = " ".join([str(label), *further])
        return str(label), changes
    # A start by layers is a mapping, too, which its branch would take for settings of its own.
    return _spelled(value), {"start.method" if axis == START else axis: value}


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return spelled(value)  # methods by pattern of layers
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
