"""Reading a run: YAML, dotted overrides, and where each value came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from headstart.errors import RunError, nearest
from headstart.methods import PerLayer
from headstart.runs.tree import Run
from headstart.tasks.base import Task
from headstart.tasks.registry import parse_task

# Shorthands on the command line: the name of a branch stands for its leading setting.
_LEADING = {"model": "name", "data": "task", "start": "method"}

# Mappings that are one value.
_METHOD = "start.method"


def read_run(source: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Run, dict[str, str]]:
    """Return the run that a file describes, changed by overrides, and by dotted key where each value came from.

    Args:
        source: a YAML file, the name of a recipe in this package (``inilora/table2-llama2-7b-gsm8k``), or None for the
            defaults.
        overrides: such as ``optimizer.lr=2e-4``, ``start=pissa`` (its method) or ``seed=1``; values are YAML.

    Raises:
        RunError: the file can't be read, or a key or value is none; one sentence with the key and the nearest name.
    """
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if source is not None:
        path, name = find_recipe(source)
        settings = read_settings(path)
        origins |= dict.fromkeys(_flat(settings), name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RunError(f"{override!r} must read key=value, as in optimizer.lr=2e-4.")
        value = _value_of(text, override)
        # A mapping in an override replaces its branch.
        parts = _parts(key, value)
        _set(settings, parts, value, override)
        dotted = ".".join(parts[:2] if parts[:2] == _METHOD.split(".") else parts)
        origins = {known: origin for known, origin in origins.items() if not f"{known}.".startswith(f"{dotted}.")}
        origins |= dict.fromkeys(_flat({dotted: value}), override)
    return validated(settings, str(source or "the settings")), origins


def run_with(base: Mapping[str, Any] | str, changes: Mapping[str, Any], where: str) -> Run:
    """Return a run with some settings changed.

    Args:
        base: its settings, or the name of a file or a recipe.
        changes: by dotted key.
        where: what a message calls it.

    Raises:
        RunError: see :func:`read_run`.
    """
    settings = read_settings(find_recipe(base)[0]) if isinstance(base, str) else copy.deepcopy(dict(base))
    for key, value in changes.items():
        _set(settings, _parts(key, value), value, f"{key}={value}")
    return validated(settings, where)


def validated(settings: Mapping[str, Any], where: str) -> Run:
    """Return the run with these settings.

    Raises:
        RunError: see :func:`read_run`.
    """
    for branch, leading in _LEADING.items():
        if isinstance(settings.get(branch), str):
            settings = {**settings, branch: {leading: settings[branch]}}
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        raise RunError(f"{where}: {sentence(error)}") from None


def tasks_of(run: Run) -> tuple[Task, Task]:
    """Return the task that a run learns, and that of what is held out, which is the same one by default.

    Raises:
        TaskError: there is no such task or setting.
        RunError: two tasks are named that one head can't do.
    """
    task = parse_task(run.data.task)
    if run.data.held_out_task is None:
        return task, task
    held_out = parse_task(run.data.held_out_task)
    if {task.kind, held_out.kind} != {"text"}:
        raise RunError(
            f"data.held_out_task={run.data.held_out_task} goes with data.task={run.data.task} only where both are of "
            "text: leave it out."
        )
    return task, held_out


def find_recipe(source: str | Path) -> tuple[Path, str]:
    """Return a recipe's file and the name to call it by.

    Raises:
        RunError: there is none; the message gives the nearest.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path, path.name
    if path.is_dir():
        raise RunError(f"{path} is a folder: give a YAML file, or the name of a recipe.")
    known = dict(recipes())
    name = str(source).removesuffix(".yaml")
    if name in known:
        return known[name], name
    raise RunError(
        f"there is no file {str(source)!r}, and no recipe of that name.{nearest(name, known)} "
        "`headstart recipes` lists them."
    )


def recipes() -> Iterator[tuple[str, Path]]:
    """Yield the recipes that this package holds, by name."""
    root = Path(str(resources.files("headstart"))) / "recipes"
    for path in sorted(root.rglob("*.yaml")):
        yield path.relative_to(root).with_suffix("").as_posix(), path


def flat_settings(run: BaseModel) -> dict[str, Any]:
    """Return every value of a run by its dotted key."""
    return _flat(run.model_dump(mode="json"))


class _Loader(yaml.SafeLoader):
    """YAML without keys that are given twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a YAML file holds.

    Raises:
        RunError: it can't be read, a key stands there twice, or it holds no settings.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RunError(f"{path} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RunError(f"{path}{_yaml_reason(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RunError(f"{path} holds no settings: write them as `key: value`, one a line.")
    return content


def _yaml_reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it can't be read as YAML"
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem}."


def _value_of(text: str, override: str) -> Any:
    if text.startswith(f"{PerLayer.name}:"):
        return text
    try:
        return yaml.load(text, Loader=_Loader) if text.strip() else None
    except (yaml.YAMLError, RecursionError) as error:
        # A method with settings, "lora-da:samples=64,layers=attention", may look like a mapping.
        if ":" in text and "{" not in text and "[" not in text:
            return text
        raise RunError(f"{override!r}: the value can't be read as YAML.") from error


def _parts(key: str, value: Any) -> list[str]:
    """Return a dotted key's parts; the name of a branch stands for its leading setting."""
    parts = key.split(".")
    if len(parts) == 1 and key in _LEADING and not isinstance(value, Mapping):
        parts.append(_LEADING[key])
    return parts


def _set(settings: dict[str, Any], parts: Sequence[str], value: Any, override: str) -> None:
    branch = settings
    for part, after in pairwise(parts):
        below = branch.get(part)
        if isinstance(below, str) and _LEADING.get(part) is not None and branch is settings:
            below = {_LEADING[part]: below} if _LEADING[part] != after else {}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise RunError(f"{override!r}: {part!r} has no settings of its own.")
        branch[part] = dict(below)
        branch = branch[part]
    branch[parts[-1]] = value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not dotted.endswith(("_pattern", _METHOD)):
            values |= _flat(value, f"{dotted}.")
        elif not prefix and key in _LEADING:
            values[f"{key}.{_LEADING[key]}"] = value
        else:
            values[dotted] = value
    return values


def sentence(error: ValidationError, root: type[BaseModel] = Run) -> str:
    """Return the first of pydantic's findings about a tree of settings as a sentence, unknown keys before all."""
    findings = sorted(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
    finding = findings[0]
    path = [str(part) for part in finding["loc"]]
    dotted = ".".join(path)
    if finding["type"] == "extra_forbidden":
        known = _known_below(path[:-1], root)
        further = nearest(path[-1], known) or _elsewhere(path[-1])
        place = f" in {'.'.join(path[:-1])}" if path[:-1] else ""
        return f"there is no setting {path[-1]!r}{place}.{further} There are: {', '.join(known)}."
    if finding["type"] == "value_error":
        return f"{f'{dotted}: ' if dotted else ''}{finding['ctx']['error']}."
    given = finding["input"]
    if finding["type"] == "model_type":
        return f"{dotted} must hold settings ({', '.join(_known_below(path, root))}), not {given!r}."
    if finding["type"] == "literal_error":
        return f"{dotted}={given!r} must be one of {finding['ctx']['expected']}.{nearest(str(given), _words(finding))}"
    message = finding["msg"].removeprefix("Input ")
    return f"{_without_alternatives(path)}={given!r} {message}."


def _without_alternatives(path: Sequence[str]) -> str:
    """Return a dotted key without the alternatives of a type that pydantic tried."""
    return ".".join(part for part in path if not part.startswith(("tuple[", "function-")) and part != "str")


def _words(finding: Mapping[str, Any]) -> list[str]:
    return [word.strip(" '") for word in finding["ctx"]["expected"].replace(" or ", ",").split(",")]


def _known_below(path: Sequence[str], node: type[BaseModel]) -> list[str]:
    for part in path:
        field = node.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        node = field.annotation
    return list(node.model_fields)


def _elsewhere(name: str) -> str:
    """Return where else a setting of this name, or nearly, stands."""
    places = {dotted.rpartition(".")[2]: dotted for dotted in flat_settings(Run())}
    if name in places:
        return f" Did you mean {places[name]!r}?"
    hint = nearest(name, places)
    return hint if not hint else hint.replace(hint.split("'")[1], places[hint.split("'")[1]])
