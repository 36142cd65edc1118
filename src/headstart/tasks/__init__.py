"""The tasks, one small file per family; importing this package registers them all.

A new task is a new file here: :mod:`pkgutil` finds it and the decorator registers it.
"""

from __future__ import annotations

import importlib
import pkgutil

from headstart.tasks.base import Example, Message, Task
from headstart.tasks.registry import get_task, parse_task, register, task_class, task_names
from headstart.tasks.rows import Rows, read

# The order of the tables. A file that is not named comes last.
_FAMILIES = ("text", "problems", "mathematics", "commonsense", "code", "chat", "glue", "mmlu")
_found = [module.name for module in pkgutil.iter_modules(__path__)]
for _name in [*_FAMILIES, *(name for name in _found if name not in _FAMILIES)]:
    importlib.import_module(f"{__name__}.{_name}")

__all__ = [
    "Example",
    "Message",
    "Rows",
    "Task",
    "get_task",
    "parse_task",
    "read",
    "register",
    "task_class",
    "task_names",
]
