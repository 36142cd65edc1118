"""The registry of methods, filled by a decorator and read by the command line, the docs and the tests."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from headstart.errors import HeadstartWarning, MethodError, nearest
from headstart.methods.base import ANY_LAYER, Method

_METHODS: dict[str, type[Method]] = {}

M = TypeVar("M", bound=Method)


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Register a :class:`Method` under its command-line name.

    Raises:
        MethodError: the name is taken, or the method needs data and doesn't say how many samples of them.
    """

    def add(cls: type[M]) -> type[M]:
        if name in _METHODS:
            raise MethodError(f"two methods are named {name!r}: {_METHODS[name].__name__} and {cls.__name__}.")
        cls.name = name
        settings = dataclasses.fields(cls)
        # One without defaults for all its settings can't be asked yet.
        complete = all(setting.default is not dataclasses.MISSING for setting in settings)
        reads = complete and cls().wants(ANY_LAYER).data
        if reads and "samples" not in {setting.name for setting in settings}:
            raise MethodError(f"method {name!r} reads data, so it must have a setting 'samples'.")
        _METHODS[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Return the names of all methods, in the order of registration (by family)."""
    return list(_METHODS)


def load_plugins() -> None:
    """Import what installed packages name under the entry point group ``headstart.methods``: modules with starts.

    One that can't be imported costs a warning, and nothing else.
    """
    for entry in entry_points(group="headstart.methods"):
        try:
            entry.load()
        except Exception as error:  # whatever a stranger's module raises
            warnings.warn(
                f"the starts of entry point {entry.name!r} ({entry.value}) can't be loaded, and are left out: {error}",
                HeadstartWarning,
                stacklevel=2,
            )


def methods_by_class() -> dict[str, type[Method]]:
    """Return all methods by the names of their classes."""
    return {cls.__name__: cls for cls in _METHODS.values()}


def method_class(name: str) -> type[Method]:
    """Return the class registered under ``name``.

    Raises:
        MethodError: there is none; the message gives the nearest name.
    """
    try:
        return _METHODS[name]
    except KeyError:
        raise MethodError(
            f"unknown method {name!r}.{nearest(name, _METHODS)} `headstart methods` lists them all."
        ) from None


def get_method(name: str, **settings: object) -> Method:
    """Make a method from its name and settings, for example ``get_method("init-ab", beta=2)``.

    Raises:
        MethodError: an unknown name or setting (the message gives the nearest), or a value out of range.
    """
    cls = method_class(name)
    fields = [f.name for f in dataclasses.fields(cls)]
    for setting in settings:
        if setting not in fields:
            have = ", ".join(fields) if fields else "none"
            raise MethodError(f"method {name!r} has no setting {setting!r}.{nearest(setting, fields)} It has: {have}.")
    return cls(**settings)


def parse_method(text: str) -> Method:
    """Make a method from ``name`` or ``name:setting=value,setting=value``, as the command line writes it.

    Values are read as bool, int, float or None where they look like one, else as text.

    Raises:
        MethodError: see :func:`get_method`; also for a part that is not ``setting=value``.
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, object] = {}
    words = _words(name.strip()) if rest else {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        setting, equals, value = part.partition("=")
        if not equals:
            raise MethodError(f"{text!r}: {part!r} must read setting=value, as in init-ab:beta=2.")
        settings[setting.strip()] = _read_value(value.strip(), words.get(setting.strip(), ()))
    return get_method(name.strip(), **settings)


def _words(name: str) -> dict[str, tuple[object, ...]]:
    """Return the words that the settings of a method may be, by setting; "none" is one of them for some."""
    hints = get_type_hints(method_class(name))
    return {setting: get_args(hint) for setting, hint in hints.items() if get_origin(hint) is Literal}


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
