"""Importing PEFT without what its imports print: bitsandbytes advises to install a package that nothing here uses."""

from __future__ import annotations

import logging

# Logged, on some processors, while PEFT imports bitsandbytes; nobody has configured logging then, so it is printed.
_SPEAKER = logging.getLogger("bitsandbytes.backends.cpu.ops")


def _other(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


_SPEAKER.addFilter(_other)
try:
    import peft  # noqa: F401
finally:
    _SPEAKER.removeFilter(_other)
