"""What is summed for each layer during the backward pass: gradient, Kronecker factors, moments."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headstart.layers.lookups import Lookup
from headstart.methods.base import Wants
from headstart.statistics.lookups import add_rows
from headstart.statistics.masks import Layout, Rows, TokenMasks
from headstart.statistics.tap import Sink

# Gram matrices are symmetric: beyond this width they are summed in blocks of it, and only the lower ones.
_BLOCK = 512

# Whether torch (2.8 and later) multiplies half precision into float32; on NVIDIA's GPUs alone.
_WIDE_PRODUCTS = torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")


@dataclass
class Shape:
    """A layer's size, what is wanted of it, and where it looks tokens up, how."""

    d_out: int
    d_in: int
    wanted: Wants
    lookup: Lookup | None = None


@dataclass
class InputSum:
    """Sums over the tokens of one input, which several layers may share: x x' (its lower blocks) and x."""

    gram: Tensor
    total: Tensor
    tokens: int = 0


@dataclass
class LayerSum:
    """Sums of one layer: g'x over all rows, by half of the samples; g g' and g over the tokens that count."""

    gradients: dict[int, Tensor] = field(default_factory=dict)
    gram: Tensor | None = None
    total: Tensor | None = None
    tokens: int = 0
    reached: bool = False


class Regroup(Exception):  # noqa: N818 - not an error: it is answered
    """Layers that were taken to share their input don't; says which group."""

    def __init__(self, group: int) -> None:
        super().__init__(group)
        self.group = group


class Restart(Exception):  # noqa: N818 - not an error: it is answered
    """Something was found out that spoils what was summed so far: the pass has to begin anew."""


@dataclass
class _Shared:
    """One input tensor on its way: which layers have read it, whether it has been summed."""

    tensor: weakref.ref[Tensor]
    version: int
    rows: Rows
    readers: set[str] = field(default_factory=set)
    summed: bool = False

    def is_of(self, inputs: Tensor) -> bool:
        """Return whether this is the tensor, unchanged since."""
        return self.tensor() is inputs and self.version == inputs._version


class Sums:
    """The sums of the layers of one pass.

    Args:
        shapes: of the layers, by name.
        groups: by layer, the number of the group of layers that share its input.
        offload: keep the sums on the CPU.
        layouts: by layer, how its rows lie.

    Attributes:
        by_half: whether a batch must be of one half of the samples.
        samples: how many were read, of either half.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        groups: Mapping[str, int],
        layouts: Mapping[str, Layout],
        *,
        offload: bool,
    ) -> None:
        self.shapes = dict(shapes)
        self.groups = {name: groups[name] for name in shapes}
        self.layers: dict[str, LayerSum] = {name: LayerSum() for name in shapes}
        self.inputs: dict[int, InputSum] = {}
        self._offload = offload
        self._masks: TokenMasks | None = None
        self._last: dict[int, _Shared] = {}
        self._layouts = layouts
        self.by_half = any(shape.wanted.halves for shape in shapes.values())
        self.samples = [0, 0]
        self._half = 0
        self.muted = False
        # Recomputed blocks of a checkpointed model may see copies of what they saw in the forward pass.
        self.replaying = False

    def begin(self, masks: TokenMasks, half: int = 0) -> None:
        """Prepare for one batch, which is of one of two halves of the samples, 0 or 1."""
        self._masks = masks
        self._half = half
        self._last = {}
        self.replaying = False

    def watch(self, name: str, inputs: Tensor) -> Sink:
        """Return the sink of one forward call of a layer; see :func:`headstart.statistics.tap.tapped`."""
        if self.muted:
            return _mute
        wanted = self.shapes[name].wanted
        if (lookup := self.shapes[name].lookup) is not None:
            return lambda tokens, g: self._add_rows(name, tokens, g, lookup)
        if not wanted.input_moments:
            return lambda x, g: self._add_gradient(name, x, g)
        return self._sink(name, self._shared(name, inputs))

    def watch_routed(self, name: str, hidden: Tensor, chosen: Tensor, inputs: Tensor) -> Sink:
        """Return the sink of one expert's product, whose inputs are of those tokens of ``hidden`` that chose it."""
        if self.muted or name not in self.shapes:
            return _mute
        return self._sink(name, self._routed(name, hidden, chosen, inputs))

    def take_routed(self, name: str, hidden: Tensor, chosen: Tensor, inputs: Tensor) -> None:
        """Sum what an expert reads at once, as :meth:`take` does."""
        if not self.muted and name in self.shapes:
            self._add_inputs(name, inputs.detach(), self._routed(name, hidden, chosen, inputs))

    def _routed(self, name: str, hidden: Tensor, chosen: Tensor, inputs: Tensor) -> _Shared:
        assert self._masks is not None
        rows = self._masks.match(hidden, "flat").among(chosen)
        return _Shared(weakref.ref(inputs), inputs._version, rows, {name})

    def _sink(self, name: str, shared: _Shared) -> Sink:
        wanted = self.shapes[name].wanted

        def sink(x: Tensor, g: Tensor) -> None:
            if wanted.gradient:
                self._add_gradient(name, x, g)
            if wanted.outputs is not None:
                self._add_outputs(name, g, shared)
            self._add_inputs(name, x, shared)

        return sink

    def take(self, name: str, inputs: Tensor) -> None:
        """Sum what a layer reads at once, in a forward pass that no backward pass follows."""
        if not self.muted:
            shared = self._shared(name, inputs)
            self._add_inputs(name, inputs.detach().reshape(-1, inputs.shape[-1]), shared)

    def add_matrices(self, names: Sequence[str], gradients: Tensor) -> None:
        """Add gradients (E, d_out, d_in) of matrices that one parameter stacks; those of zeros were not reached."""
        if self.muted:
            return
        for name, gradient in zip(names, gradients, strict=True):
            if name not in self.shapes or not bool(gradient.count_nonzero()):
                continue
            layer, shape = self.layers[name], self.shapes[name]
            layer.reached = True
            total = self._gradient_of(layer, shape, gradient)
            total += gradient.to(total)

    def clear(self) -> None:
        """Forget all that was summed, to begin anew."""
        self.layers = {name: LayerSum() for name in self.shapes}
        self.inputs = {}
        self.samples = [0, 0]
        self._last = {}

    def count(self, samples: int) -> None:
        """Take note that so many samples were summed since the last beginning."""
        if not self.muted:
            self.samples[self._half] += samples

    def check_groups(self) -> None:
        """Raise Regroup where a group's last input was not read by all of its layers: call it before backward."""
        for group, shared in self._last.items():
            self._check_readers(group, shared)

    def split(self, group: int) -> None:
        """Give each layer of a group its own sums from here on, beginning with what they shared so far."""
        fresh = max(self.groups.values()) + 1
        names = [name for name, number in self.groups.items() if number == group]
        self.regroup(self.groups | {name: fresh + place for place, name in enumerate(names)})

    def regroup(self, groups: Mapping[str, int]) -> None:
        """Divide groups further, and number them anew; ``groups`` must keep apart what already is."""
        inputs: dict[int, InputSum] = {}
        taken: set[int] = set()
        for name, number in groups.items():
            old = self.groups[name]
            if number in inputs or old not in self.inputs:
                continue
            input_sum = self.inputs[old]
            if old in taken:
                input_sum = InputSum(input_sum.gram.clone(), input_sum.total.clone(), input_sum.tokens)
            inputs[number] = input_sum
            taken.add(old)
        self.groups, self.inputs = dict(groups), inputs

    def gradient(self, name: str, half: int = 0) -> Tensor:
        """Return the sum of g'x of a layer over all samples, or over a half of them; zeros where none came."""
        total, shape = self.layers[name].gradients.get(half), self.shapes[name]
        return _zeros(shape.d_out, shape.d_in) if total is None else total

    def outputs(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the sums of g g' (its lower blocks) and g of a layer, zeros where none came."""
        layer, shape = self.layers[name], self.shapes[name]
        if layer.gram is not None and layer.total is not None:
            return layer.gram, layer.total
        full = shape.wanted.outputs == "full"
        return _zeros(*(shape.d_out,) * (2 if full else 1)), _zeros(shape.d_out)

    def input(self, name: str) -> InputSum:
        """Return the sums over the input that a layer reads, zeros where none came."""
        size = self.shapes[name].d_in
        return self.inputs.setdefault(self.groups[name], InputSum(_zeros(size, size), _zeros(size)))

    def _shared(self, name: str, inputs: Tensor) -> _Shared:
        assert self._masks is not None
        group = self.groups[name]
        last = self._last.get(group)
        if last is not None and last.is_of(inputs) and name not in last.readers:
            last.readers.add(name)
            return last
        if last is not None and not self.replaying:
            self._check_readers(group, last)
        rows = self._masks.match(inputs, self._layouts.get(name, "other"))
        shared = _Shared(weakref.ref(inputs), inputs._version, rows, {name})
        self._last[group] = shared
        return shared

    def _check_readers(self, group: int, shared: _Shared) -> None:
        members = {name for name, number in self.groups.items() if number == group}
        if shared.readers != members:
            raise Regroup(group)

    def _place(self, like: Tensor) -> torch.device:
        return torch.device("cpu") if self._offload else like.device

    def _add_gradient(self, name: str, x: Tensor, g: Tensor) -> None:
        layer, shape = self.layers[name], self.shapes[name]
        if not len(x):  # an expert that no token was sent to
            return
        layer.reached = True
        add_product(self._gradient_of(layer, shape, x), g, x)

    def _add_rows(self, name: str, tokens: Tensor, g: Tensor, lookup: Lookup) -> None:
        layer, shape = self.layers[name], self.shapes[name]
        layer.reached = True
        add_rows(self._gradient_of(layer, shape, g), tokens, g, lookup)

    def _gradient_of(self, layer: LayerSum, shape: Shape, like: Tensor) -> Tensor:
        """Return the sum that the batch's gradient of a layer goes to, made where there was none."""
        half = self._half if shape.wanted.halves else 0
        if half not in layer.gradients:
            layer.gradients[half] = _zeros(shape.d_out, shape.d_in, device=self._place(like))
        return layer.gradients[half]

    def _add_outputs(self, name: str, g: Tensor, shared: _Shared) -> None:
        layer, shape = self.layers[name], self.shapes[name]
        if not len(g):
            return
        layer.reached = True
        place = self._place(g)
        g = shared.rows.of(g)
        full = shape.wanted.outputs == "full"
        if layer.gram is None or layer.total is None:
            layer.gram = _zeros(*(shape.d_out,) * (2 if full else 1), device=place)
            layer.total = _zeros(shape.d_out, device=place)
        if full:
            _add_gram(layer.gram, g)
        else:
            layer.gram += torch.linalg.vecdot(g.float(), g.float(), dim=0).to(place)
        layer.total += g.sum(0, dtype=torch.float32).to(place)
        layer.tokens += shared.rows.count

    def _add_inputs(self, name: str, x: Tensor, shared: _Shared) -> None:
        if not len(x):
            return
        self.layers[name].reached = True
        if shared.summed:
            return
        shared.summed = True
        shape, place = self.shapes[name], self._place(x)
        group = self.groups[name]
        if group not in self.inputs:
            gram = _zeros(shape.d_in, shape.d_in, device=place)
            self.inputs[group] = InputSum(gram, _zeros(shape.d_in, device=place))
        input_sum = self.inputs[group]
        x = shared.rows.of(x)
        _add_gram(input_sum.gram, x)
        input_sum.total += x.sum(0, dtype=torch.float32).to(place)
        input_sum.tokens += shared.rows.count


def _zeros(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Return zeros in float32, whatever torch's defaults are."""
    return torch.zeros(shape, dtype=torch.float32, device=device)


def symmetric(gram: Tensor) -> Tensor:
    """Fill in the upper blocks that :func:`_add_gram` leaves out; in place."""
    size = gram.shape[0]
    for low in range(_BLOCK, size, _BLOCK):
        high = min(low + _BLOCK, size)
        gram[:low, low:high] = gram[low:high, :low].T
    return gram


def _mute(x: Tensor, g: Tensor) -> None:
    """Sum nothing."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left' right to a float32 sum, multiplied and summed in float32.

    A product of two numbers of half precision is exact in float32, so a GPU's half-precision units, which sum in
    float32, lose nothing by taking the factors as they are; they are several times faster than its float32 ones.
    """
    left, right = _factor(left), _factor(right)
    if left.dtype == right.dtype != torch.float32:
        total += torch.mm(left.T, right, out_dtype=torch.float32).to(total.device)
    elif total.device == left.device:
        total.addmm_(left.T.float(), right.float())
    else:
        total += (left.T.float() @ right.float()).to(total.device)


def _factor(rows: Tensor) -> Tensor:
    """Return half precision that is multiplied as it is; all else in float32."""
    as_it_is = _WIDE_PRODUCTS and rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    return rows if as_it_is else rows.float()


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows' rows, the blocks on and below the diagonal."""
    size = total.shape[0]
    rows = _factor(rows)  # once, and not for each block
    for low in range(0, size, _BLOCK):
        high = min(low + _BLOCK, size)
        add_product(total[low:high, :high], rows[:, low:high], rows[:, :high])
