"""What several starts want of the same data: read once for all of them, kept in files, taken from there by each.

A start's gradient and moments depend on the model, the layers and the data, not on rank, rate or method, so that a
study's starts differ in what they make of them alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headstart.errors import MethodError
from headstart.files import work_folder, write_json
from headstart.methods.base import Half, Kronecker, Layer, Method, Wants
from headstart.progress import Show, silent
from headstart.statistics.gather import Statistics
from headstart.statistics.masks import Tokens
from headstart.store import Store

T = TypeVar("T")

# Of what is free on the disk.
_SHARE_OF_DISK = 0.5
_ABOUT, _TENSORS = "about.json", "{}.safetensors"


@dataclass(frozen=True)
class Common:
    """What the starts want together.

    Attributes:
        methods: whose starts they are.
        wants: by layer, all that any of them wants.
    """

    methods: tuple[Method, ...]
    wants: Mapping[str, Wants]


class KeptStatistics:
    """Statistics of one model and one set of data, in a folder that several processes share.

    Args:
        folder: of all that is kept of these data.
        methods: those whose starts are made of them, each as often as there are starts of it (of other ranks or rates).

    Attributes:
        served: the methods that what was asked for last was read for; empty where it was read for one alone.
    """

    def __init__(self, folder: Path, methods: Iterable[Method]) -> None:
        self._folder = folder
        self._methods = tuple(methods)
        self.served: tuple[Method, ...] = ()

    def common(self, method: Method, layers: Sequence[Layer], population: int | None) -> Common | None:
        """Return what a method wants together with other starts, None where no other one reads the same.

        Those read the same that read as many samples, and mean inputs over the same tokens. Methods that don't look at
        inputs go with the first that do.

        Args:
            method: one of this folder's.
            layers: all those of the adapter.
            population: the size of the training set.
        """
        self.served = ()
        count = method.sample_count(population)
        alike = [other for other in self._methods if _reads(other, count, population)]
        if method not in alike:
            return None
        wanted = {other: {layer.name: other.wants(layer) for layer in layers} for other in alike}
        tokens = {other: _tokens(wants.values()) for other, wants in wanted.items()}
        first: Tokens = next((choice for choice in tokens.values() if choice), "attention")
        own = tokens[method] or first
        alike = [other for other in alike if (tokens[other] or first) == own]
        if len(alike) == 1:
            return None
        methods = tuple(dict.fromkeys(alike))
        together = {layer.name: _all_of([wanted[other][layer.name] for other in methods], own) for layer in layers}
        return Common(methods, {name: wants for name, wants in together.items() if wants.task})

    def passes(
        self,
        common: Common,
        wants: Mapping[str, Wants],
        shapes: Mapping[str, Layer],
        read: Callable[[Mapping[str, Wants]], Iterator[Statistics]],
        show: Show = silent,
    ) -> Iterator[tuple[Statistics, float]]:
        """Yield what one start wants, and the seconds that its reading took some other time, from files.

        What isn't there is read and written first, by one process, for which others wait. What the disk has no room
        for, or would take longer to write than to read, is read for this start alone.

        Args:
            common: as :meth:`common` returned it.
            wants: by layer, what this start wants.
            shapes: the layers by name.
            read: reads the data for all that it is given, in passes.
            show: draws progress.
        """
        wanted = {name: asdict(wants) for name, wants in common.wants.items()}
        described = json.dumps([wanted, sorted(map(str, common.methods))], sort_keys=True)
        key = hashlib.blake2b(described.encode(), digest_size=8).hexdigest()
        place, is_new = self._folder / key, False

        def look_up(_: str) -> dict[str, Any] | None:
            try:
                content: dict[str, Any] = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            return content

        def make(_: list[str]) -> dict[str, dict[str, Any]]:
            nonlocal is_new
            is_new = True
            with work_folder(self._folder, key) as work:
                about: dict[str, Any] = {"passes": []}
                if self._fits(common, shapes):
                    about = {"passes": _written(read(common.wants), work)}
                if not about["passes"]:
                    for path in work.iterdir():
                        path.unlink()
                write_json(about, work / _ABOUT)
                try:
                    work.rename(place)
                except OSError:
                    # Another process, for which it took too long to wait, was faster: it has read the same.
                    about = look_up(key) or about
            return {key: about}

        about = Store(self._folder).make_all([[key]], look_up, make, what="statistics", show=show)[key]
        with ExitStack() as stack:
            try:
                # All of them now: once open they can be read, even if no other start needs them any more and they go.
                files = [
                    stack.enter_context(safe_open(place / _TENSORS.format(number), "pt"))
                    for number in range(len(about["passes"]))
                ]
            except (OSError, SafetensorError):
                files = []
            if not files:
                yield from ((statistics, 0.0) for statistics in read(wants))
                return
            self.served = common.methods
            together = " and ".join(map(str, common.methods))
            for file, facts in zip(files, about["passes"], strict=True):
                statistics = _read_back(file, facts, wants)
                statistics.plan += f", read once for {together}"
                if statistics.layers:
                    yield statistics, 0.0 if is_new else facts["seconds"]

    def _fits(self, common: Common, shapes: Mapping[str, Layer]) -> bool:
        size = 0
        for name, wants in common.wants.items():
            d_out, d_in = shapes[name].d_out, shapes[name].d_in
            size += 4 * d_out * d_in * (wants.gradient + wants.halves) + 4 * d_in * d_in * wants.input_moments
            size += 4 * d_out * {"full": d_out, "diagonal": 1, None: 0}[wants.outputs]
        self._folder.mkdir(parents=True, exist_ok=True)
        return size <= shutil.disk_usage(self._folder).free * _SHARE_OF_DISK


def _reads(method: Method, count: int, population: int | None) -> bool:
    """Return whether a method reads so many samples."""
    try:
        return method.sample_count(population) == count
    except MethodError:  # which its own start will say
        return False


def _tokens(wants: Iterable[Wants]) -> Tokens | None:
    """Return the tokens that inputs are means over, None where no inputs are wanted."""
    return next((wanted.tokens for wanted in wants if wanted.input_moments), None)


def _all_of(wants: Sequence[Wants], tokens: Tokens) -> Wants:
    """Return all that is wanted of the data to learn for any of several starts."""
    outputs = {wanted.outputs for wanted in wants}
    return Wants(
        inputs=any(wanted.input_moments for wanted in wants),
        gradient=any(wanted.gradient for wanted in wants),
        halves=any(wanted.halves for wanted in wants),
        outputs="full" if "full" in outputs else "diagonal" if "diagonal" in outputs else None,
        tokens=tokens,
    )


def _written(passes: Iterator[Statistics], folder: Path) -> list[dict[str, Any]]:
    """Write what the passes find; return what there is to know of each.

    That is none where writing is the slower way, or fails. What goes wrong in reading is raised.
    """
    facts: list[dict[str, Any]] = []
    began = time.perf_counter()
    reading = writing = 0.0
    for number, statistics in enumerate(passes):
        took = time.perf_counter() - began
        began = time.perf_counter()
        try:
            save_file(_tensors(statistics), folder / _TENSORS.format(number))
        except (OSError, SafetensorError):  # a disk that is full after all
            return []
        writing += time.perf_counter() - began
        reading += took
        facts.append(
            {
                "layers": statistics.layers,
                "groups": statistics.groups,
                "tokens_of": {name: kronecker.tokens for name, kronecker in statistics.kronecker.items()},
                "shares": {name: half.share for name, half in statistics.halves.items()},
                "samples": statistics.samples,
                "tokens": statistics.tokens,
                "notes": statistics.notes,
                "plan": statistics.plan,
                "seconds": took,
            }
        )
        # Freed before the next pass begins.
        del statistics
        began = time.perf_counter()
    return facts if writing <= reading else []


def _tensors(statistics: Statistics) -> dict[str, Tensor]:
    """Return the statistics' tensors by the names that they have in a file; inputs once for each group of layers."""
    tensors = {f"gradient/{name}": gradient for name, gradient in statistics.gradients.items()}
    tensors |= {f"half/{name}": half.gradient for name, half in statistics.halves.items()}
    for name, kronecker in statistics.kronecker.items():
        group = statistics.groups[name]
        tensors |= {f"inputs/{group}": kronecker.inputs, f"mean_input/{group}": kronecker.mean_input}
        if kronecker.outputs is not None and kronecker.mean_output is not None:
            tensors |= {f"outputs/{name}": kronecker.outputs, f"mean_output/{name}": kronecker.mean_output}
    return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}


def _read_back(file: Any, facts: Mapping[str, Any], wants: Mapping[str, Wants]) -> Statistics:
    """Return what one start wants of a pass; tensors are read from the open file when they are asked for."""
    there = set(file.keys())
    names = [name for name in facts["layers"] if name in wants]
    last: tuple[int, Tensor] | None = None

    def inputs(group: int) -> Tensor:
        # Layers that read the same input share the tensor, and are solved one after another.
        nonlocal last
        if last is None or last[0] != group:
            last = (group, file.get_tensor(f"inputs/{group}"))
        return last[1]

    def gradient(name: str) -> Tensor:
        return file.get_tensor(f"gradient/{name}")

    def half(name: str) -> Half:
        return Half(file.get_tensor(f"half/{name}"), facts["shares"][name])

    def kronecker(name: str) -> Kronecker:
        group, outputs, mean_output = facts["groups"][name], None, None
        if wants[name].outputs is not None:
            outputs, mean_output = file.get_tensor(f"outputs/{name}"), file.get_tensor(f"mean_output/{name}")
            if wants[name].outputs == "diagonal" and outputs.dim() == 2:
                outputs = outputs.diagonal().clone()
        means = file.get_tensor(f"mean_input/{group}")
        return Kronecker(inputs(group), outputs, means, mean_output, facts["tokens_of"][name])

    def of(kind: str, wanted: Callable[[Wants], bool]) -> list[str]:
        return [name for name in names if wanted(wants[name]) and f"{kind}/{name}" in there]

    statistics = Statistics(
        layers=tuple(names),
        owners=dict.fromkeys(names, 0),
        groups={name: facts["groups"][name] for name in names if name in facts["groups"]},
        samples=facts["samples"],
        tokens=facts["tokens"],
        notes=list(facts["notes"]),
        plan=facts["plan"],
    )
    moments = [name for name in names if wants[name].input_moments and name in facts["tokens_of"]]
    return replace(
        statistics,
        gradients=_Lazy(of("gradient", lambda wanted: wanted.gradient), gradient),
        halves=_Lazy(of("half", lambda wanted: wanted.halves), half),
        kronecker=_Lazy(moments, kronecker),
    )


class _Lazy(MutableMapping[str, T]):
    """Values that are read whenever they are asked for."""

    def __init__(self, names: Iterable[str], load: Callable[[str], T]) -> None:
        self._names, self._load = dict.fromkeys(names), load

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __setitem__(self, name: str, value: T) -> None:
        raise TypeError("what is kept is not changed")

    def __delitem__(self, name: str) -> None:
        del self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
