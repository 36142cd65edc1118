"""The registry of tasks, filled by a decorator and read by the command line, the docs and the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from headstart.errors import TaskError, nearest
from headstart.settings import make, parse
from headstart.tasks.base import Task

_TASKS: dict[str, type[Task]] = {}

T = TypeVar("T", bound=Task)


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Register a :class:`Task` under its command-line name.; raise TaskError where it is taken."""

    def add(cls: type[T]) -> type[T]:
        if name in _TASKS:
            raise TaskError(f"two tasks are named {name!r}: {_TASKS[name].__name__} and {cls.__name__}.")
        cls.name = name
        _TASKS[name] = cls
        return cls

    return add


def variant(family: type[Task], name: str, about: str, **attributes: Any) -> None:
    """Register a task that differs from its family in class attributes alone; ``about`` is its docstring."""
    cls = type(name, (family,), {"__doc__": about, "__module__": family.__module__, **attributes})
    setattr(sys.modules[family.__module__], name, register(name)(dataclass(frozen=True)(cls)))  # where pickle looks


def task_names() -> list[str]:
    """Return the names of all tasks, in the order of registration (by family)."""
    return list(_TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class registered under ``name``, or raise TaskError with the nearest name."""
    if name not in _TASKS:
        raise TaskError(f"unknown task {name!r}.{nearest(name, _TASKS)} There are: {', '.join(_TASKS)}.")
    return _TASKS[name]


def get_task(name: str, **settings: object) -> Task:
    """Make a task from its name and settings, for example ``get_task("gsm8k", prompt="plain")``.

    Raises:
        TaskError: an unknown name or setting (the message gives the nearest), or a value out of range.
    """
    return make(task_class(name), f"task {name!r}", settings, TaskError)


def parse_task(text: str) -> Task:
    """Make a task from ``name`` or ``name:setting=value,setting=value``, as the command line writes it.

    Raises:
        TaskError: see :func:`get_task`; also for a part that is not ``setting=value``.
    """
    name, settings = parse(text, task_class, TaskError, "gsm8k:prompt=plain")
    return get_task(name, **settings)
