"""What happens once PEFT is imported, by whomever: until then headstart leaves it alone, for it takes seconds.

PEFT is found as it is without headstart. While it is imported, bitsandbytes doesn't advise to install a package that
nothing here uses, nor torchao list the kernels of GPUs that aren't there.
"""

from __future__ import annotations

import importlib
import importlib.abc
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from itertools import dropwhile, islice
from types import ModuleType
from typing import Any

# Logged, on some machines, while PEFT imports bitsandbytes and torchao: by logger, a part of the message. Nobody has
# configured logging then, so it is printed.
_REMARKS = {
    "bitsandbytes.backends.cpu.ops": "kernels-community",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass",
}


def after_peft(extend: Callable[[], None]) -> None:
    """Call ``extend`` where PEFT is already imported, and whenever it is imported from now on; the first one counts."""
    if not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder(extend))
    if sys.modules.get("peft") is not None:
        try:
            importlib.import_module("peft")  # waits where another thread is importing it
        except Exception:  # which is for whoever needs PEFT
            return
        extend()


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Finds PEFT as the finders behind this one do, and nothing else."""

    def __init__(self, extend: Callable[[], None]) -> None:
        self._extend = extend

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return PEFT's spec, with a loader that extends the module."""
        if fullname != "peft":
            return None
        # Those before this one have been asked; where it isn't there itself, somebody has put it in another's place.
        behind = dropwhile(lambda finder: finder is not self, [*sys.meta_path])
        for finder in islice(behind, 1, None):
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                # A folder that happens to be called so has no loader.
                if spec.loader is not None:
                    spec.loader = _PeftLoader(spec.loader, self._extend)
                return spec
        return None


class _PeftLoader(importlib.abc.Loader):
    """PEFT's own loader, which it is to all that ask it; after the module it extends PEFT."""

    def __init__(self, loader: Any, extend: Callable[[], None]) -> None:
        self._loader = loader
        self._extend = extend

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a copy that isn't made yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to PEFT's own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Import PEFT without what its imports print, and extend it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        with ExitStack() as undo:
            for name, remark in _REMARKS.items():
                speaker, others = logging.getLogger(name), _others(remark)
                speaker.addFilter(others)
                undo.callback(speaker.removeFilter, others)
            self._loader.exec_module(module)
        self._extend()


def _others(remark: str) -> Callable[[logging.LogRecord], bool]:
    """Return a filter that lets all messages pass but those with this remark."""
    return lambda record: remark not in record.getMessage()
