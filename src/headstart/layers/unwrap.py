"""Looking through what stands around a model, or around parts of it, so that every layer has the model's own name.

``torch.compile``, ``DistributedDataParallel`` and ``DataParallel`` put a module around another, whose name then goes
into the names of everything inside (``_orig_mod.``, ``module.``). What is read, drawn or written by such a name would
be another layer's, or no layer's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

Verb = TypeVar("Verb", bound=Callable[..., Any])

_COMPILED = "_orig_mod"
# Where torch keeps what nn.Module.compile() made, which it calls in place of forward.
_COMPILED_CALL = "_compiled_call_impl"

_outer: ContextVar[tuple[nn.Module, ...]] = ContextVar("headstart_wrappers", default=())


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model inside its wrappers; within the block, its parts stand there without theirs.

    Compiled parts run uncompiled within the block, so that hooks on what is inside are seen, and are compiled ones
    again after it. Accelerate's ``prepare`` and ``unwrap_model`` return such wrappers, or a copy of the model with
    compiled parts, which is looked through as well.

    Args:
        model: any module; what isn't one is yielded as it is.
    """
    if not isinstance(model, nn.Module):
        yield model
        return
    wrappers: list[nn.Module] = []
    while (inside := _inside(model)) is not None:
        wrappers.append(model)
        model = inside
    token = _outer.set((*_outer.get(), *wrappers))
    with ExitStack() as undo:
        undo.callback(_outer.reset, token)
        _lay_bare(model, undo)
        yield model


def looks_through(verb: Verb) -> Verb:
    """Let a function whose first argument is a model work on the model inside its wrappers."""

    @functools.wraps(verb)
    def on_unwrapped(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        with unwrapped(model) as inside:
            return verb(inside, *arguments, **options)

    return cast(Verb, on_unwrapped)


def looked_through() -> tuple[nn.Module, ...]:
    """Return the wrappers around the model that the verb now running was given, outermost first."""
    return _outer.get()


def plain_name(name: str) -> str:
    """Return a module's or tensor's name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _inside(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper is around, None for any other module."""
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        return module.module
    # In a copy with compiled parts, Accelerate keeps the original beside the copy's own parts.
    inside = getattr(module, _COMPILED, None) if isinstance(module, OptimizedModule) else vars(module).get(_COMPILED)
    return inside if isinstance(inside, nn.Module) else None


def _lay_bare(model: nn.Module, undo: ExitStack) -> None:
    """Put what wrapped parts of a model are around in their place, and switch compiled calls off, until ``undo``."""
    for module in list(model.modules()):
        if vars(module).get(_COMPILED_CALL) is not None:
            undo.callback(setattr, module, _COMPILED_CALL, getattr(module, _COMPILED_CALL))
            setattr(module, _COMPILED_CALL, None)
        for name, part in list(module._modules.items()):
            bare = part
            while bare is not None and (inside := _inside(bare)) is not None:
                bare = inside
            if bare is not part:
                undo.callback(module._modules.__setitem__, name, part)
                module._modules[name] = bare
