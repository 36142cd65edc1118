"""What the two studies share: the files of their runs, the loop over them, and the summary over seeds.

Intervals over seeds are Student's t at 95 %; a difference to ``lora`` is taken seed by seed, so what a seed brings to
all methods alike (head, data order, samples) drops out of it. What a page says in words is computed from its numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import table
from headstart.errors import MethodError
from headstart.evaluation.intervals import wilson
from headstart.methods import parse_method

BASELINE = "lora"
Run = dict[str, Any]


def methods_of(study: str, samples: int) -> list[str]:
    """Return what a study compares.

    ``lora_da``: the baseline, LoRA-One, and LoRA-DA whole and with each of its parts left out. ``core``: the baseline,
    and both methods of core layers at three ranks. ``inilora``: the baseline, PiSSA (the balanced gauge), and IniLoRA
    by its path, by the path stopped early, and in closed form in the other gauges.
    """
    if study == "inilora":
        closed = (f"inilora:solver=svd,gauge={gauge}" for gauge in ("aligned", "flow", "random"))
        return [BASELINE, "pissa", "inilora", "inilora:tolerance=0.001", *closed]
    if study == "core":
        cores = ("lora-xs", f"lora-sb:samples={samples}")
        return [BASELINE, *(f"{method} r={rank}" for method in cores for rank in (16, 32, 64))]
    whole = f"lora-da:samples={samples}"
    parts = ("", ",bias=0", ",variance=0", ",variance=0,fisher=none")
    return [BASELINE, f"lora-one:samples={samples}", *(whole + part for part in parts)]


TITLES = {"lora_da": "LoRA-DA", "core": "LoRA-SB and LoRA-XS", "inilora": "IniLoRA's path and its closed form"}


def spelled(label: str) -> tuple[str, dict[str, Any]]:
    """Return the method of a label and the settings of LoRA that it changes: "lora-xs r=16" has rank 16 and s = 1."""
    method, _, rank = label.partition(" r=")
    return method, {"r": int(rank), "lora_alpha": int(rank), "use_rslora": False} if rank else {}


# The runs and their files.


def arguments(
    parser: argparse.ArgumentParser, *, data: str, steps: int, samples: int, rates: Sequence[float]
) -> argparse.Namespace:
    """Read the command line that both studies have, and refuse unknown methods before anything is run."""
    add = parser.add_argument
    add("--study", choices=list(TITLES), default="lora_da", help="which methods are compared (default lora_da)")
    add("--out", type=Path, help="one JSON file a run; a run that is there is not redone (default runs/STUDY_DATA)")
    add("--steps", type=int, default=steps, help=f"of training, for every method (default {steps})")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--methods", nargs="+", help="in place of the study's; such as lora, or lora-xs at a rank: 'lora-xs r=16'")
    add("--samples", type=int, default=samples, help=f"the samples of the default methods (default {samples})")
    add("--rates", type=float, nargs="+", default=list(rates), help="learning rates; each method is judged at its best")
    add("--threads", type=int, default=1, help="of PyTorch; two processes with other --seeds do more than two")
    add("--limit-minutes", type=float, default=math.inf, help="start no run after that long; 0 only writes the tables")
    add("--page", help="the page in docs/results, or a path without .md")
    chosen = parser.parse_args()
    chosen.methods = chosen.methods or methods_of(chosen.study, chosen.samples)
    chosen.page = chosen.page or f"{chosen.study}_{data}"
    chosen.out = chosen.out or Path("runs") / f"{chosen.study}_{data}"
    try:
        for method in chosen.methods:
            parse_method(spelled(method)[0])
    except MethodError as error:
        sys.exit(str(error))
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and Transformers, at every model
    return chosen


def path_of(out: Path, settings: Run) -> Path:
    """Return the file of a run: its name says all that tells it from the others of its study."""
    name = "__".join(value if isinstance(value, str) else f"{key}{value:g}" for key, value in settings.items())
    return out / (
        "".join(character if character.isalnum() or character in "-.=," else "_" for character in name) + ".json"
    )


def read_runs(out: Path, plan: Iterable[Run]) -> list[Run]:
    """Return the finished runs of a plan."""
    paths = (path_of(out, settings) for settings in plan)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def write_json(content: Run, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def run_all(plan: Sequence[Run], out: Path, limit_minutes: float, measure: Callable[[Run], Run]) -> list[Run]:
    """Run what has no file yet, a printed line each, until the time is up; return all finished runs of the plan."""
    began = time.monotonic()
    for number, settings in enumerate(plan, start=1):
        path = path_of(out, settings)
        if path.is_file():
            continue
        if time.monotonic() - began >= 60 * limit_minutes:
            print(f"time is up: {len(read_runs(out, plan))} of {len(plan)} runs are done", flush=True)
            break
        started, worked = time.monotonic(), time.process_time()
        run = {**settings, **measure(settings), "threads": torch.get_num_threads()}
        run |= {"run_seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
        write_json(run, path)
        what = " ".join(value if isinstance(value, str) else f"{name} {value:g}" for name, value in settings.items())
        print(
            f"[{number}/{len(plan)}] {what}: loss {run['start_loss']:.4f} -> {run['final_loss']:.4f}, "
            f"accuracy {100 * run['right'] / run['total']:.1f} %, {run['run_seconds']:.0f} s",
            flush=True,
        )
    return read_runs(out, plan)


# Statistics.


def t_quantile(degrees: int, probability: float = 0.975) -> float:
    """Return Student's t quantile above one half, from the closed form of its distribution for whole degrees."""

    def inside(t: float) -> float:
        """The probability of -t to t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(2 + odd, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * probability - 1 else (low, middle)
    return high


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; ``half`` is half its 95 % interval, None where one seed or a run that diverged gives none."""

    value: float
    half: float | None
    count: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies wholly on one side of zero, else 0."""
        if self.half is None or abs(self.value) <= self.half:
            return 0
        return 1 if self.value > 0 else -1

    def text(self, scale: float = 1, digits: int = 4, plus: str = "") -> str:
        """Return ``mean ± half``."""
        if not math.isfinite(self.value):
            return "diverged" if self.count else "-"
        mean = f"{scale * self.value:{plus}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {scale * self.half:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean and its interval; a value that is not finite makes the mean infinite."""
    if not values or not all(map(math.isfinite, values)):
        return Mean(math.inf, None, len(values))
    half = None
    if len(values) > 1:
        half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), half, len(values))


def mean(runs: Sequence[Run], key: str) -> Mean:
    """Return the mean of one figure of the runs."""
    return mean_of([run[key] for run in runs])


def difference(runs: Sequence[Run], others: Sequence[Run], key: str) -> Mean:
    """Return the mean over the seeds that both have of the difference in one figure."""
    by_seed = {run["seed"]: run[key] for run in others}
    return mean_of([run[key] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed])


# The summary.


@dataclass(frozen=True)
class Figure:
    """A figure that methods are compared by: its key in a run, and how it is written."""

    key: str
    name: str
    scale: float = 1
    digits: int = 4
    higher_is_better: bool = False

    def of(self, runs: Sequence[Run]) -> str:
        """Return its mean over the runs, written."""
        return mean(runs, self.key).text(self.scale, self.digits)

    def against(self, runs: Sequence[Run], others: Sequence[Run]) -> str:
        """Return its difference, written."""
        return difference(runs, others, self.key).text(self.scale, self.digits, "+")


LOSS = Figure("final_loss", "final loss")
CURVE = Figure("training_loss", "training loss")
ACCURACY = Figure("accuracy", "accuracy %", 100, 2, True)
FIGURES = (LOSS, CURVE, ACCURACY)
FIRST = ("method", "rate", "seeds")


def at_rates(runs: Sequence[Run], method: str) -> dict[float, list[Run]]:
    """Return a method's runs by learning rate."""
    of_method = [run for run in runs if run["method"] == method]
    return {rate: [run for run in of_method if run["lr"] == rate] for rate in sorted({run["lr"] for run in of_method})}


def best(runs: Sequence[Run], method: str) -> list[Run]:
    """Return a method's runs at its best rate: most seeds done first, then the least mean final loss."""
    groups = at_rates(runs, method).values()
    return min(groups, key=lambda group: (-len(group), mean(group, LOSS.key).value), default=[])


def summary(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Return the tables of one task, and the sentences that follow from them."""
    chosen = {method: at_best for method in methods if (at_best := best(runs, method))}
    rows, every = [], []
    for method, at_best in chosen.items():
        figures = [mean(at_best, "start_loss").text(), *(figure.of(at_best) for figure in FIGURES)]
        seconds = f"{mean(at_best, 'startup_seconds').value:.2f}"
        size = f"{at_best[0]['trainable']:,}" if "trainable" in at_best[0] else "-"
        rows.append([*_first(method, at_best), size, *figures, pooled(at_best, "right", "total"), seconds])
        for rate, group in at_rates(runs, method).items():
            others = at_rates(runs, BASELINE).get(rate, []) if method != BASELINE else []
            every.append([*_first(method, group), *(f.of(group) for f in FIGURES), LOSS.against(group, others)])
    titles = [*FIRST, "parameters", "start loss", *(figure.name for figure in FIGURES), "pooled (Wilson)", "start-up s"]
    lines = ["Each method at its best rate:", "", *table(titles, rows), ""]
    whole = next((method for method in chosen if method.startswith("lora-da") and not _ablated(method)), None)
    references = [method for method in (BASELINE, whole, "inilora") if method in chosen]
    for reference in references or [BASELINE]:
        lines += compared(chosen, reference)
    titles = [*FIRST, *(figure.name for figure in FIGURES), f"final loss minus `{BASELINE}`'s at this rate"]
    return [*lines, "Every rate:", "", *table(titles, every)]


def pooled(runs: Sequence[Run], right: str, total: str) -> str:
    """Return Wilson's interval of the counts of all seeds together."""
    low, high = wilson(sum(run[right] for run in runs), sum(run[total] for run in runs))
    return f"{100 * max(low, 0):.1f} to {100 * high:.1f} %"


def _ablated(method: str) -> bool:
    return any(part in method for part in ("bias=", "variance=", "fisher="))


def _first(method: str, runs: Sequence[Run]) -> list[str]:
    return [method, f"{runs[0]['lr']:g}", str(len(runs))]


def compared(chosen: dict[str, list[Run]], reference: str) -> list[str]:
    """Return every other method minus the reference, and what that says."""
    others = {method: runs for method, runs in chosen.items() if method != reference}
    if reference not in chosen or not others:
        return [f"There is nothing to compare with `{reference}` yet.", ""]
    base = chosen[reference]
    rows = []
    for method, runs in others.items():
        seeds = str(difference(runs, base, LOSS.key).count)
        rows.append([method, f"{runs[0]['lr']:g}", seeds, *(f.against(runs, base) for f in FIGURES)])
    lines = [f"Minus `{reference}`, each at its best rate, seed by seed:", ""]
    lines += [*table([*FIRST, *(figure.name for figure in FIGURES)], rows), ""]
    differences = [{method: difference(runs, base, f.key) for method, runs in others.items()} for f in FIGURES]
    verdicts = [_verdict(by_method, figure, reference) for by_method, figure in zip(differences, FIGURES, strict=True)]
    count = sum(change.half is not None for by_method in differences for change in by_method.values())
    chance = f"Of {count} intervals, {0.05 * count:.1f} would exclude zero by chance if no method differed."
    ending = [chance, ""] if count else []
    return [*lines, "A difference counts where its interval excludes zero:", "", *verdicts, "", *ending]


def _verdict(differences: dict[str, Mean], figure: Figure, reference: str) -> str:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": [], "no interval": []}
    for method, change in differences.items():
        better = change.sign == (1 if figure.higher_is_better else -1)
        kind = "better" if better else "worse" if change.sign else "not told apart"
        groups["no interval" if change.half is None else kind].append(f"`{method}`")
    name = figure.name.removesuffix(" %").capitalize()
    if len(groups["not told apart"]) == len(differences):
        return f"- {name}: no difference from `{reference}` whose interval excludes zero."
    return f"- {name}: " + "; ".join(f"{kind}: {', '.join(named)}" for kind, named in groups.items() if named) + "."


def paragraphs(*texts: str) -> list[str]:
    """Return the texts as wrapped lines with an empty line after each."""
    return [line for text in texts for line in (*textwrap.wrap(text, 118), "")]


def measured(runs: Sequence[Run], asked: int) -> str:
    """Return how much of the plan is done, and on what."""
    if not runs:
        return f"None of {asked} runs is done."
    threads = " or ".join(str(count) for count in sorted({run["threads"] for run in runs}))
    devices = " or ".join(sorted({run["device"] for run in runs}))
    seconds, worked = (statistics.median(run[key] for run in runs) for key in ("run_seconds", "cpu_seconds"))
    on = f"threads: {threads}, {devices}; a run took {seconds:.0f} s, {worked:.0f} s of a core, in the median"
    return f"{len(runs)} of {asked} runs are done; {on}."
