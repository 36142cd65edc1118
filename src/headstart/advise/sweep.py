"""A short sweep of rates: at which of a few each start's training loss is lowest after a stated number of steps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from headstart.progress import Show, silent
from headstart.runs.result import Result
from headstart.runs.tree import Run
from headstart.study.results import Results
from headstart.study.study import run_study
from headstart.study.tree import RATE, START, validated_study


def sweep(run: Run, rates: Mapping[str, Sequence[float]], steps: int, show: Show = silent) -> dict[str, float]:
    """Train each start at each of its rates for so many steps; return the rate of the lowest training loss.

    The loss is the mean over the last half of the steps, which have a schedule of their own; starts of which no run
    ends in a number are missing.

    Args:
        run: the model, its adapter, the data, batch size, seed.
        rates: by start, as its name with settings.
        steps: of each training.
        show: draws progress.

    Raises:
        HeadstartError: the model or the data can't be read.
    """
    base = run.model_dump(mode="json", exclude_defaults=True)
    base["schedule"] = {**base.get("schedule", {}), "steps": steps}
    axes = {START: list(rates), RATE: {name: list(grid) for name, grid in rates.items()}}
    study = validated_study({"base": base, "axes": axes, "seeds": 1}, "the sweep")
    losses: dict[str, dict[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        grid, results = run_study(study, Path(folder), show=show), Results(Path(folder))
        for cell in grid.cells():
            loss = _last_half(results.of(cell), steps)
            if loss is not None and cell.rate is not None:
                losses.setdefault(cell.start, {})[cell.rate] = loss
    return {start: min(of_rates, key=lambda rate: of_rates[rate]) for start, of_rates in losses.items()}


def _last_half(result: Result | None, steps: int) -> float | None:
    """Return the mean loss of the last half of the steps; None where it is no number."""
    if result is None or result.status != "done":
        return None
    losses = [loss for step, loss in result.series.get("loss", ()) if step > steps // 2]
    mean = math.fsum(losses) / len(losses) if losses else math.nan
    return mean if math.isfinite(mean) else None
