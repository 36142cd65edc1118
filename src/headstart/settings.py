"""Frozen dataclasses of settings, as text writes them: ``name`` or ``name:setting=value,setting=value``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from headstart.errors import HeadstartError, nearest

T = TypeVar("T")


def make(cls: type[T], owner: str, settings: Mapping[str, object], error: type[HeadstartError]) -> T:
    """Make an instance of a dataclass; ``owner``, such as ``"method 'eva'"``, is what the message calls it.

    Raises:
        error: a setting is unknown; the message gives the nearest and lists them all.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            have = ", ".join(known) if known else "none"
            raise error(f"{owner} has no setting {setting!r}.{nearest(setting, known)} It has: {have}.")
    return cls(**settings)


def parse(
    text: str, class_named: Callable[[str], type], error: type[HeadstartError], example: str
) -> tuple[str, dict[str, object]]:
    """Return the name and the settings that a text holds, read as bool, int, float or None where they look like one.

    ``class_named`` gives the dataclass of a name, whose literal fields say which words stay words.

    Raises:
        error: a part is not ``setting=value``; the message shows ``example``.
    """
    name, _, rest = (part.strip() for part in text.strip().partition(":"))
    settings: dict[str, object] = {}
    hints = get_type_hints(class_named(name)) if rest else {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        setting, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise error(f"{text!r}: {part!r} must read setting=value, as in {example}.")
        hint = hints.get(setting)
        settings[setting] = _read_value(value, get_args(hint) if get_origin(hint) is Literal else ())
    return name, settings


def spell(name: str, instance: Any) -> str:
    """Return the name and the settings that differ from their defaults, as :func:`parse` reads them."""
    fields = [field for field in dataclasses.fields(instance) if getattr(instance, field.name) != field.default]
    changed = ",".join(f"{field.name}={getattr(instance, field.name)}" for field in fields)
    return f"{name}:{changed}" if changed else name


def differing(settings: Mapping[str, Any], others: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys by which two trees of settings differ."""
    for key in settings.keys() | others.keys():
        here, there = settings.get(key), others.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from differing(here, there, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}"


def check_types(owner: str, instance: Any, error: type[HeadstartError]) -> None:
    """Raise ``error`` unless every field of a dataclass is what its annotation says: a number, a whole one, a word."""
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        _check_type(owner, field.name, getattr(instance, field.name), hints[field.name], error)


def _check_type(owner: str, setting: str, value: object, hint: Any, error: type[HeadstartError]) -> None:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return
    hint = next(option for option in options if option is not NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(repr(choice) for choice in get_args(hint))
            raise error(f"{owner}: {setting}={value!r} is not one of {choices}.")
        return
    if hint is bool and not isinstance(value, bool):
        raise error(f"{owner}: {setting}={value!r} must be true or false.")
    numbers = {int: (int,), float: (int, float)}
    if hint in numbers and (isinstance(value, bool) or not isinstance(value, numbers[hint])):
        what = "a whole number" if hint is int else "a number"
        raise error(f"{owner}: {setting}={value!r} must be {what}.")


def _read_value(text: str, words: tuple[object, ...]) -> object:
    if text in words:
        return text
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
