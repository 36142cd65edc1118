"""A device without float64, made up of CPU tensors: what is asked of it in float64 fails, as on Apple's MPS."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only

# For which torch has what a device needs to be indexed, and no values of its own that could be taken for these.
DEVICE = torch.device("meta")


class Pretended(torch.Tensor):
    """A tensor that says it is on the device; ``held`` has its values."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes the device's new tensors, which begin with no tensor of its own among their arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    here = any(isinstance(each, Pretended) for each in torch.utils._pytree.tree_leaves((args, kwargs)))
    asked = kwargs.get("device")
    there = here if asked is None else torch.device(asked).type == DEVICE.type
    if not (here or there):
        return function(*args, **kwargs)
    if asked is not None and there:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(Pretended, lambda each: each.held, (args, kwargs))
    name = function._schema.name
    if name == "aten::copy_":
        function(*plain_args, **plain_kwargs)
        return args[0]
    if here and not there and name == "aten::_to_copy" and plain_kwargs.get("dtype") == torch.float64:
        raise TypeError("the device has no float64 to convert to on the way")
    if (
        here
        and name != "aten::_to_copy"
        and not all(
            isinstance(each, Pretended) or each.dim() == 0
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor)
        )
    ):
        raise RuntimeError(f"{name}: tensors of two devices")
    out = function(*plain_args, **plain_kwargs)
    if not there:
        return out
    wrapped = tree_map(lambda each: Pretended(each) if isinstance(each, torch.Tensor) else each, out)
    if not here:
        return wrapped
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


@contextlib.contextmanager
def device():
    """Within the block, tensors can be made on, and moved to, ``DEVICE``."""
    with Device():
        yield DEVICE
