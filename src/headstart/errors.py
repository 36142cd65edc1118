"""What headstart raises when it is given something that it can't work with.

Every message names the layer, file or field, and says what to do. The command line prints the message alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadstartError(Exception):
    """Base of all errors of this package; its text is one or two sentences meant for the user."""


class MethodError(HeadstartError, ValueError):
    """An unknown method, an unknown setting, or a setting out of its range."""


class LayerError(HeadstartError, ValueError):
    """A layer that can't be initialised: its kind, its rank, its state or its numbers. Names the layer."""


class DataError(HeadstartError, ValueError):
    """Data that is missing, empty, malformed or has nothing to learn from. Names the file and line, or the sample."""


class CheckpointError(HeadstartError, ValueError):
    """A checkpoint or adapter that is damaged, incomplete, or belongs to another base model or rank."""


class ModelError(HeadstartError, ValueError):
    """A model that can't be found or loaded."""


class TaskError(HeadstartError, ValueError):
    """An unknown task, an unknown setting of one, a setting out of its range, or a grader that isn't installed."""


class RunError(HeadstartError, ValueError):
    """Settings of a run that are unknown, of the wrong type, or contradict each other. Names the key."""


class HeadstartWarning(UserWarning):
    """Something was not done as asked for; the report says the same."""


# What PEFT puts before the names of a base model's layers.
BASE_PREFIX = "base_model.model."


def not_finite(layer: str) -> LayerError:
    """Return the error for a layer whose weight holds NaN or infinity."""
    return LayerError(f"layer {layer!r}: its weight has NaN or infinity; check the checkpoint it came from.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of ``known``, or an empty string where none is near."""
    lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""
