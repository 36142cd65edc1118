"""Methods by runs of several seeds and rates: SmolLM2-135M on GSM8K, or MiniLM on two tasks of GLUE.

``python -m bench.study gsm8k --study lora_da``; cut off, the same command goes on where it was, in the middle of a run
too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench.harness import write
from bench.study_claims import claims
from bench.study_tables import (
    ADAPTER,
    BASELINE,
    DATA,
    TASKS,
    WARMUP,
    Planned,
    measured,
    paragraphs,
    quiet,
    run_all,
    shared_arguments,
    summary,
)
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read

STUDIES = {"lora_da": "LoRA-DA", "core": "LoRA-SB and LoRA-XS", "inilora": "IniLoRA's path and its closed form"}
# IniLoRA's paper adapts these two.
QUERY_VALUE = {"gsm8k": r".*\.(q|v)_proj", "glue": r".*\.attention\.self\.(query|value)"}


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


def arguments() -> argparse.Namespace:
    """Read the command line; what isn't given is as fits the data."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    add = parser.add_argument
    add("data", choices=["gsm8k", "glue"], help="what is learned, and so by which model")
    add("--study", choices=list(STUDIES), default="lora_da", help="which methods are compared (default lora_da)")
    add("--methods", nargs="+", help="in place of the study's; such as lora, or lora-xs at a rank: 'lora-xs r=16'")
    add("--samples", type=int, help="the samples of the default methods (default: GSM8K 32, GLUE 64)")
    add("--rates", type=float, nargs="+", help="each method is judged at its best (default: GSM8K 3e-4, GLUE two)")
    add("--steps", type=int, help="of training, for every method (default: GSM8K 20, GLUE 40)")
    add("--mrpc-steps", type=int, help="of MRPC, where not as many as --steps")
    add("--tasks", nargs="+", choices=["sst-2", "mrpc"], default=["sst-2", "mrpc"], help="of GLUE")
    add("--held-out", type=int, help="rows that are measured on (default: GSM8K 48, GLUE 872)")
    add("--graded", type=int, default=0, help="GSM8K's answers to generate and grade a run (default none: slow)")
    shared_arguments(parser)
    chosen = parser.parse_args()
    page = f"{chosen.study}_{chosen.data}"
    usual: dict[str, Any] = {"samples": 64, "rates": [5e-4, 1e-3], "steps": 40, "held_out": 872}
    if chosen.data == "gsm8k":
        usual = {"samples": 32, "rates": [3e-4], "steps": 20, "held_out": 48}
        chosen.tasks = ["gsm8k"]
    elif chosen.graded:
        parser.error("--graded is for gsm8k: GLUE's rows are all graded.")
    for name, value in {**usual, "page": page, "out": Path("runs") / page}.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    chosen.methods = chosen.methods or methods_of(chosen.study, chosen.samples)
    return chosen


def plan_of(chosen: argparse.Namespace) -> list[Planned]:
    """Return the runs, seeds outermost: what a time limit leaves is whole for the seeds that are done."""
    return [
        Planned.of(
            task,
            label,
            chosen.out,
            seed=seed,
            lr=rate,
            steps=(task == "mrpc" and chosen.mrpc_steps) or chosen.steps,
            targets=QUERY_VALUE[chosen.data] if chosen.study == "inilora" else None,
            held_out=chosen.held_out,
            graded=chosen.graded,
        )
        for seed, task, label, rate in itertools.product(chosen.seeds, chosen.tasks, chosen.methods, chosen.rates)
    ]


def majority(task: str, limit: int) -> float:
    """Return the share of the commoner label among the rows that methods are measured on."""
    examples = read(parse_task(task), TASKS[task]["data"]["held_out"], limit=limit).examples
    return Counter(example.label for example in examples).most_common(1)[0][1] / len(examples)


def conditions(chosen: argparse.Namespace) -> list[str]:
    """Say what was done, and how its figures are to be read."""
    common = TASKS[chosen.tasks[0]]
    few, batch = chosen.study == "inilora", common["batch"]
    what = f"and accuracy are of {chosen.held_out} fixed rows (SST-2: the dev set; MRPC: the first of the test set)"
    adapter = f"rank {ADAPTER['r']}, alpha {ADAPTER['alpha']}, rsLoRA (core layers: their rank as named, s = 1)"
    recipe = (
        f"AdamW without weight decay, batches of {batch['size']}, cut at {batch['max_length']} tokens, cosine with "
        f"{100 * WARMUP:g} % warm-up"
    )
    if chosen.data == "gsm8k":
        first = [
            f"SmolLM2-135M-Instruct, {'q_proj and v_proj' if few else 'all seven linear kinds'}, {adapter}, no "
            f"dropout. GSM8K: {chosen.steps} steps; {recipe}. A seed sets the factors, the order of the data and the "
            "samples of the gradient methods, alike for every method."
        ]
        what = f"is of the first {chosen.held_out} test examples, in nats a completion token"
        if chosen.graded:
            what += f"; accuracy is of {chosen.graded} written answers, by exact match"
    else:
        first = [
            "The encoder all-MiniLM-L6-v2 (6 layers, width 384) with a random two-way head on its pooler. LoRA on "
            f"{'query and value' if few else 'all linear layers of its blocks'}, {adapter}, no LoRA dropout (the "
            f"encoder's own, 0.1, stays); the head is trained along at the same rate. {recipe}. A seed sets the "
            "factors, the head, the dropout, the order of the data and the samples of the gradient methods, alike for "
            "every method.",
            "The head is random at the start, so gradients are taken through a random head (the same for all methods "
            "of a seed): what they say of the weights is what moves that head's two outputs apart. The head's "
            "parameters are among those that are counted.",
        ]
    rates = "A method's best rate is that of its least mean final loss, chosen on these same rows for each alike."
    if len(chosen.rates) == 1:
        rates = "There is one rate for all methods, which was tuned for none of them."
    return paragraphs(
        *first,
        f"Loss {what}. Start loss is before training, training loss the mean over all steps: the lower, the faster. ± "
        "is half of the 95 % interval over seeds (Student); it says nothing of other rows. Wilson's takes all seeds' "
        f"answers for independent, but they are on the same rows, so it is too narrow. {rates}",
    )


def main() -> None:
    chosen = arguments()
    if not DATA.is_dir():
        sys.exit(f"there is no {DATA}")
    quiet(chosen.threads)
    plan = plan_of(chosen)
    rows = run_all(plan, chosen.limit_minutes)
    lines = conditions(chosen)
    for task in chosen.tasks:
        of_task = [row for row in rows if row["task"] == task]
        asked = [item for item in plan if item.task == task]
        done = measured(of_task, len(asked))
        if task != "gsm8k":
            share = f"The commoner label is {100 * majority(task, chosen.held_out):.1f} % of the rows."
            lines += [f"## {task.upper()}", "", f"{done} {asked[0].run.schedule.steps} steps each. {share}", ""]
        else:
            lines += [done, ""]
        lines += [*summary(of_task, chosen.methods), ""] if of_task else []
        lines += claims(of_task, chosen.methods) if chosen.study == "core" else []
    write(chosen.page, f"{STUDIES[chosen.study]} on {chosen.data.upper()}", lines)


if __name__ == "__main__":
    main()
