"""The registry of methods, filled by a decorator and read by the command line, the docs and the tests."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from headstart.errors import HeadstartWarning, MethodError, nearest
from headstart.methods.base import Method
from headstart.settings import make, parse

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
        reads = complete and cls().reads_data
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
    return make(method_class(name), f"method {name!r}", settings, MethodError)


def parse_method(text: str) -> Method:
    """Make a method from ``name`` or ``name:setting=value,setting=value``, as the command line writes it.

    Values are read as bool, int, float or None where they look like one, else as text. Several methods by pattern of
    layers are ``per-layer:`` and a JSON object: see :class:`headstart.PerLayer`.

    Raises:
        MethodError: see :func:`get_method`; also for a part that is not ``setting=value``.
    """
    name, _, rest = text.strip().partition(":")
    if name == "per-layer":
        from headstart.methods.per_layer import PerLayer  # which parses its methods here

        return PerLayer.parse(rest)
    name, settings = parse(text, method_class, MethodError, "init-ab:beta=2")
    return get_method(name, **settings)
