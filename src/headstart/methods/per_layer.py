"""Different layers, different methods."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from headstart.errors import LayerError, MethodError, nearest
from headstart.methods.base import Factors, Layer, Method, Wants
from headstart.methods.registry import parse_method

REST = "*"
_EXAMPLE = '{"q_proj|v_proj": "pissa", "*": "lora"}'


@dataclass(frozen=True, init=False)
class PerLayer(Method):
    """Different methods for different layers: ``hs.PerLayer({"q_proj|v_proj": hs.PiSSA(), "*": hs.LoRA()})``.

    A pattern is a regular expression that must match the end of a layer's name, from a dot (or the name's beginning)
    on, as in PEFT's ``rank_pattern``; the first that matches wins, and ``"*"``, wherever it stands, takes the rest.

    Each method starts the layers of its pattern as it would if the adapter had no others: what it shares out among
    layers (eva's ranks, inilora's standard deviations by kind), it shares among these, and the data are read once for
    each method that reads them, as many samples as that one asks for. Kept, anchored and core layers may stand beside
    each other in one adapter.

    Args:
        by_pattern: by pattern, a method, or its name with settings. As text: ``per-layer:`` and the same as JSON, such
            as ``per-layer:{"q_proj|v_proj": "pissa", "*": "lora"}``.

    Raises:
        MethodError: there is no pattern, one is no regular expression, or what it stands for is no method.
    """

    name: ClassVar[str] = "per-layer"

    by_pattern: tuple[tuple[str, Method], ...]

    def __init__(self, by_pattern: Mapping[str, Method | str] | Iterable[tuple[str, Method | str]]) -> None:
        pairs: list[tuple[Any, Any]] = list(by_pattern.items() if isinstance(by_pattern, Mapping) else by_pattern)
        if not pairs:
            raise MethodError(f"method {self.name!r} needs a pattern and its method, as in {_EXAMPLE}.")
        checked = tuple((_pattern(pattern), _method(pattern, method)) for pattern, method in pairs)
        twice = [pattern for place, (pattern, _) in enumerate(checked) if pattern in dict(checked[:place])]
        if twice:
            raise MethodError(f"method {self.name!r}: pattern {twice[0]!r} is given twice; leave one of the two out.")
        object.__setattr__(self, "by_pattern", checked)

    @classmethod
    def parse(cls, text: str) -> PerLayer:
        """Make one from a JSON object of methods as text, by pattern.

        Raises:
            MethodError: it is none, or see the class.
        """
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError):
            pairs = None
        if not isinstance(pairs, list) or not text.strip().startswith("{"):
            raise MethodError(f"{f'{cls.name}:{text}'!r}: after the colon comes a JSON object, as in {_EXAMPLE}.")
        return cls(pairs)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, in the order of their patterns."""
        return tuple(method for _, method in self.by_pattern)

    def divided(self, names: Sequence[str]) -> list[tuple[Method, list[str]]]:
        """Return which method starts which of an adapter's layers, in the order of the patterns.

        Raises:
            LayerError: no pattern takes a layer; names it.
            MethodError: a pattern takes none of them (``"*"`` may); the message gives the nearest name.
        """
        taken: dict[str, list[str]] = {pattern: [] for pattern, _ in self.by_pattern}
        for name in names:
            taken[self._pattern_of(name)].append(name)
        for pattern, own in taken.items():
            if own or pattern == REST:
                continue
            if before := next((name for name in names if _fits(pattern, name)), None):
                why = f"{before!r} and whatever else it fits is taken by {self._pattern_of(before)!r} before it"
                raise MethodError(f"method {self.name!r}: pattern {pattern!r} takes no layer: {why}.")
            hint = nearest(pattern, [".".join(name.split(".")[-parts:]) for parts in (1, 2) for name in names])
            raise MethodError(
                f"method {self.name!r}: pattern {pattern!r} takes no layer of the adapter.{hint} A pattern is a "
                "regular expression for the end of a layer's name."
            )
        return [(method, taken[pattern]) for pattern, method in self.by_pattern if taken[pattern]]

    @property
    def reads_task(self) -> bool:
        """Whether any of its methods wants the data to learn."""
        return any(method.reads_task for method in self.methods)

    @property
    def reads_preserved(self) -> bool:
        """Whether any of its methods wants data whose ability is to stay."""
        return any(method.reads_preserved for method in self.methods)

    @property
    def reads_data(self) -> bool:
        """Whether one of the methods does."""
        return any(method.reads_data for method in self.methods)

    @property
    def reads_rate(self) -> bool:
        """Whether one of the methods does."""
        return any(method.reads_rate for method in self.methods)

    def wants(self, layer: Layer) -> Wants:
        """Return what the layer's method wants."""
        return self._of(layer).wants(layer)

    def check(self, layer: Layer) -> None:
        """Let the layer's method refuse it."""
        self._of(layer).check(layer)

    def factors(self, layer: Layer) -> Factors:
        """Return the start that the layer's method gives it."""
        return self._of(layer).factors(layer)

    def __str__(self) -> str:
        """Return the text that ``parse_method`` reads."""
        return spelled({pattern: str(method) for pattern, method in self.by_pattern})

    def _of(self, layer: Layer) -> Method:
        return dict(self.by_pattern)[self._pattern_of(layer.name)]

    def _pattern_of(self, name: str) -> str:
        patterns = [pattern for pattern, _ in self.by_pattern]
        for pattern in patterns:
            if pattern != REST and _fits(pattern, name):
                return pattern
        if REST not in patterns:
            raise LayerError(
                f"layer {name!r} is taken by no pattern of method {self.name!r} ({', '.join(patterns)}): add one, "
                f'or "{REST}" for all the rest.'
            )
        return REST


def spelled(methods: Mapping[str, str]) -> str:
    """Return methods by pattern as one text, as ``parse_method`` reads it."""
    return f"{PerLayer.name}:{json.dumps(dict(methods), ensure_ascii=False)}"


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def _pattern(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise MethodError(f"method {PerLayer.name!r}: {pattern!r} is no pattern: give the end of layers' names.")
    try:
        if pattern != REST:
            re.compile(pattern)
            _fits(pattern, "")
    except re.error as error:
        raise MethodError(
            f"method {PerLayer.name!r}: pattern {pattern!r} is no regular expression: {error}."
        ) from error
    return pattern


def _method(pattern: object, method: object) -> Method:
    method = parse_method(method) if isinstance(method, str) else method
    if isinstance(method, PerLayer):
        raise MethodError(
            f"method {PerLayer.name!r}: pattern {pattern!r} stands for another {PerLayer.name!r}: write all patterns "
            "into one."
        )
    if not isinstance(method, Method):
        raise MethodError(
            f"method {PerLayer.name!r}: pattern {pattern!r} stands for {method!r}, which is not a method: give one "
            "like hs.PiSSA(), or its name."
        )
    return method
