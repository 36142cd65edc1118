"""How a checkpoint stores a model's parameters: each as a tensor, or as several that Transformers puts together.

The experts of a mixture are one parameter of a model and, on most disks, a tensor for each expert and projection.
Transformers' mapping says which of them make which parameter, and its operations make it. Here they are given the
tensors of one matrix at a time, once they have shown, on numbers drawn at random, that they treat each matrix alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from headstart.errors import CheckpointError
from headstart.stream.source import Source
from headstart.stream.tensors import Entry


@dataclass
class Group:
    """Tensors that Transformers puts together.

    Attributes:
        converter: Transformers' own that does it; None where a single tensor is the parameter.
        tensors: names by the pattern that they match, in the order in which they are taken.
    """

    converter: Any
    tensors: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Names:
    """Where the parameters of a model are.

    Attributes:
        keys: the checkpoint's tensor by the model's parameter, for all that are stored as the model holds them.
        groups: of those that Transformers converts when it loads, by the first parameter that each conversion makes.
    """

    keys: dict[str, str]
    groups: dict[str, Group]


def stored_names(base: Any, source: Source) -> Names:
    """Return where a model's parameters are, by Transformers' own mapping of names."""
    parameters = base.state_dict()
    names = Names({}, {})
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

        transforms = list(get_model_conversion_mapping(base))
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = base.base_model_prefix
        for key in sorted(source.places, key=dot_natural_key):  # the order in which tensors are put together
            name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
            if name not in parameters and key in parameters:
                name, pattern = rename_source_key(key, [], [], prefix, parameters)
            if pattern is None:
                names.keys[name] = key
            else:
                group = names.groups.setdefault(name, Group(by_pattern[pattern]))
                group.tensors.setdefault(pattern, []).append(key)
    except (ImportError, TypeError):  # Transformers' own business, which other versions have elsewhere or otherwise
        names, prefix = Names({}, {}), f"{base.base_model_prefix}."
        for key in source.places:
            for name in (key, key.removeprefix(prefix), prefix + key):
                if name in parameters:
                    names.keys.setdefault(name, key)
    return names


@dataclass(frozen=True)
class StoredStack:
    """A parameter of several matrices, read and written back one matrix at a time.

    Attributes:
        name: the parameter's, in the model.
        shape: (E, rows, columns), as the model holds it.
        group: the tensors that make it: for each pattern one for each matrix (rows, columns), or one that stacks them.
        source: the checkpoint that they lie in.
        model: what a conversion may ask of the model.
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    source: Source
    model: ModelAsked

    @property
    def matrices(self) -> int:
        """E."""
        return self.shape[0]

    @cached_property
    def separate(self) -> bool:
        """Whether each matrix has tensors of its own."""
        return all(len(self.source.entry(name).shape) == 2 for names in self.group.tensors.values() for name in names)

    @property
    def layout(self) -> tuple[object, ...]:
        """What parameters share whose conversions need to be looked at once: the conversion, and all shapes."""
        shapes = [(pattern, self.source.entry(names[0]).shape) for pattern, names in self.group.tensors.items()]
        return (id(self.group.converter), self.shape, *shapes)

    def read(self, place: int) -> Tensor:
        """Return one matrix as the parameter holds it, (1, rows, columns), in memory of its own."""
        read = self.source.read
        return self.together(
            {
                pattern: [read(names[place]) if self.separate else read(names[0], place)]
                for pattern, names in self.group.tensors.items()
            }
        )

    def together(self, parts: Mapping[str, list[Tensor]], count: int = 1) -> Tensor:
        """Return ``count`` matrices of the parameter from their parts, by pattern."""
        if self.group.converter is None:
            return next(iter(parts.values()))[0]
        made = _converted(self.group.converter, self.name, parts, self.model.narrowed(self.name, count))
        (matrices,) = made.values()
        return matrices

    def apart(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of one matrix (1, rows, columns), by pattern, as the checkpoint stores them."""
        tensors = self.group.tensors
        if self.group.converter is None:
            return dict.fromkeys(tensors, matrix)
        reverse = self.group.converter.reverse_transform()
        name, pattern = reverse.rename_source_key(self.name)
        parts = _converted(reverse, name, {pattern: [matrix]}, self.model.narrowed(self.name, 1))
        order = [pattern for pattern in self.group.converter.source_patterns if pattern in tensors]
        return dict(zip(order, parts.values(), strict=True))

    def check(self) -> None:
        """Raise CheckpointError where the tensors are not as many as the matrices, or not numbers of one type."""
        entries = [[self.source.entry(name) for name in names] for names in self.group.tensors.values()]
        first = entries[0][0]
        for entry in chain.from_iterable(entries):
            check_numbers(entry, self.name)
            if entry.dtype != first.dtype:
                raise CheckpointError(
                    f"parameter {self.name!r}: tensors {first.name!r} and {entry.name!r} have types {first.dtype_name} "
                    f"and {entry.dtype_name}, and one is expected of all: initialise in memory."
                )
        for of_pattern in entries:
            shapes = {entry.shape for entry in of_pattern}
            stacking = not self.separate and len(of_pattern) == 1 and len(of_pattern[0].shape) == 3
            count = of_pattern[0].shape[0] if stacking else len(of_pattern)
            if count != self.matrices or len(shapes) > 1 or not (self.separate or stacking):
                raise CheckpointError(
                    f"parameter {self.name!r} holds {self.matrices} matrices, and {self.source.folder} has "
                    f"{len(of_pattern)} tensors such as {of_pattern[0].name!r}, of shape {of_pattern[0].shape}, for "
                    "it: leave it out of target_parameters, or initialise in memory."
                )

    def check_alone(self) -> None:
        """Raise CheckpointError unless two matrices made together are those that are made of each one's own tensors."""
        count = min(2, self.matrices)
        parts = self._drawn(count)
        try:
            together = self.together(parts, count)
            alone = torch.cat([self.together(self._nth(parts, place)) for place in range(count)])
            right = together.shape == (count, *self.shape[1:]) and torch.equal(together, alone)
        except Exception:  # each operation raises its own kinds
            right = False
        if not right:
            raise CheckpointError(
                f"parameter {self.name!r}: what Transformers makes of {self._example!r} and the like is not its "
                f"{self.matrices} matrices of {self.shape[1]} x {self.shape[2]}, each from tensors of its own, so that "
                "they can't be read one by one: leave it out of target_parameters, or initialise in memory."
            )

    def check_writable(self) -> None:
        """Raise CheckpointError where a matrix can't be taken apart into the tensors that it is stored as."""
        parts = self._drawn(1)
        try:
            again = self.apart(self.together(parts))
            same = all(torch.equal(again[pattern], part) for pattern, (part,) in parts.items())
        except Exception:  # each operation raises its own kinds
            same = False
        if not same:
            raise CheckpointError(
                f"parameter {self.name!r}: Transformers doesn't turn it back into tensors such as "
                f"{self._example!r}, so that no residual model can be written: use "
                'form="anchored", which leaves the checkpoint alone.'
            )

    def _drawn(self, count: int) -> dict[str, list[Tensor]]:
        """Return random bytes in the place of the tensors of ``count`` matrices, by pattern."""
        generator = torch.Generator("cpu").manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randint(256, shape, generator=generator, dtype=torch.uint8, device="cpu")

        parts = {}
        for pattern, names in self.group.tensors.items():
            shape = self.source.entry(names[0]).shape
            parts[pattern] = [draw(shape) for _ in range(count)] if self.separate else [draw((count, *shape[1:]))]
        return parts

    def _nth(self, parts: Mapping[str, list[Tensor]], place: int) -> dict[str, list[Tensor]]:
        """Return the parts of one of several matrices."""
        if self.separate:
            return {pattern: [own[place]] for pattern, own in parts.items()}
        return {pattern: [own[0][place : place + 1]] for pattern, own in parts.items()}

    @property
    def _example(self) -> str:
        return next(iter(self.group.tensors.values()))[0]


class ModelAsked:
    """A model as conversions see it, after PEFT has put layers on it: its settings, and its parameters' shapes.

    Args:
        base: the model, before PEFT puts layers on it.
        shapes: of its parameters, by name; as they are then, by default.
    """

    def __init__(self, base: Any, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._base = base
        self._shapes = shapes or {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}

    def narrowed(self, name: str, count: int) -> ModelAsked:
        """Return the same, but that a parameter stacks so many matrices."""
        return ModelAsked(self._base, {**self._shapes, name: (count, *self._shapes[name][1:])})

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter of the right shape, without values."""
        return torch.empty(self._shapes[name], dtype=torch.float32, device="meta")

    def __getattr__(self, name: str) -> Any:
        """Return whatever else is asked for from the model itself."""
        return getattr(self._base, name)


def _converted(converter: Any, name: str, parts: Mapping[str, list[Tensor]], model: ModelAsked) -> dict[str, Tensor]:
    """Return what Transformers' converter, of which a copy is used up, makes of tensors given by pattern."""
    own = copy.deepcopy(converter)
    for pattern, tensors in parts.items():
        for tensor in tensors:
            own.add_tensor(name, pattern, pattern, tensor)
    made = own.convert(name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def check_numbers(entry: Entry, name: str) -> None:
    """Raise CheckpointError unless a tensor has a floating-point type of two bytes and more."""
    if entry.dtype is None or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
        raise CheckpointError(
            f"layer {name!r}: tensor {entry.name!r} has type {entry.dtype_name}; streaming reads whole weights only "
            "(float32, bfloat16, float16 or float64)."
        )
