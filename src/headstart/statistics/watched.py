"""All that is looked at while data are read: linear layers, embeddings, experts, and parameters that stack matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from headstart.statistics.routed import Experts, routed
from headstart.statistics.stacks import Stack, parameters_tapped
from headstart.statistics.sums import Sums
from headstart.statistics.tap import LossScale, tap, tapped


@dataclass(frozen=True)
class Watched:
    """What is looked at.

    Attributes:
        modules: base layers, by name.
        stacks: parameters whose matrices are layers.
        experts: of these matrices, those whose inputs are wanted (:func:`headstart.statistics.routed.routed_layers`);
            of the others the gradient is all that is.
    """

    modules: Mapping[str, nn.Module]
    stacks: Sequence[Stack] = ()
    experts: Experts = field(default_factory=dict)

    @contextlib.contextmanager
    def into(self, sums: Sums, scale: LossScale) -> Iterator[None]:
        """Within the block, let forward and backward passes go into sums of some of the layers."""
        modules = {name: module for name, module in self.modules.items() if name in sums.shapes}
        routed_names = {name for names in self.experts.values() for name in names.values()}
        by_parameter = sums.shapes.keys() - routed_names
        stacks = [stack for stack in self.stacks if not by_parameter.isdisjoint(stack.names)]

        def add(stack: Stack, gradient: Tensor) -> None:
            sums.add_matrices(stack.names, stack.matrices(gradient))

        def see(name: str, hidden: Tensor, chosen: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
            return tap(output, inputs, sums.watch_routed(name, hidden, chosen, inputs), scale)

        with contextlib.ExitStack() as taps:
            taps.enter_context(tapped(modules, sums.watch, scale))
            if stacks:
                taps.enter_context(parameters_tapped(stacks, add, scale))
            if not routed_names.isdisjoint(sums.shapes):
                taps.enter_context(routed(self.experts, see))
            yield
