"""LoRA-SB's claims held against the runs: a lower start loss than LoRA-XS's, and LoRA's accuracy with less."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness import paragraph, table
from bench.study_tables import ACCURACY, BASELINE, LOSS, Row, best, difference, figures_of

STEPS = "What a step takes, timed with nothing else running: [core_steps.md](core_steps.md)."


def claims(runs: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Return a row for each method of core layers, and what holds of the claims; nothing without the baseline."""
    base = best(runs, BASELINE)
    chosen = {method: best(runs, method) for method in methods}
    cores = {method: at_best for method, at_best in chosen.items() if " r=" in method and at_best}
    if not base or not cores:
        return []
    graded = ACCURACY in figures_of(runs)
    rows, lower, alike = [], {}, {}
    for method, at_best in cores.items():
        fewer = base[0]["trainable"] / at_best[0]["trainable"]
        rank = method.partition(" r=")[2]
        start = None
        if method.startswith("lora-sb") and (reference := cores.get(f"lora-xs r={rank}")):
            start = difference(at_best, reference, "start_loss")
            lower[method] = start.sign < 0
        row = [method, f"{fewer:.1f}", "" if start is None else start.text(plus="+"), LOSS.against(at_best, base)]
        if graded:
            accuracy = difference(at_best, base, ACCURACY.key)
            row.append(ACCURACY.against(at_best, base))
            if accuracy.half is not None:
                alike[method] = (fewer, accuracy.sign >= 0)
        rows.append(row)
    titles = ["method", "times fewer parameters", "start loss minus lora-xs's", "final loss minus lora's"]
    lines = ["LoRA-SB's claims:", "", *table([*titles, *(["accuracy % minus lora's"] if graded else [])], rows), ""]
    sizes = {f"{name} ({fewer:.1f} times)": same for name, (fewer, same) in alike.items()}
    said = [
        f"- A lower start loss than LoRA-XS's at the same rank: {_which(lower, 'holds', 'not shown')}.",
        "- LoRA's accuracy with fewer parameters (the paper: 27 to 90 times), as far as these seeds can tell: "
        f"{_which(sizes, 'not told apart', 'worse')}.",
    ]
    return [*lines, *(line for text in said for line in paragraph(text)), "", *paragraph(STEPS), ""]


def _which(verdicts: dict[str, bool], yes: str, no: str) -> str:
    groups = {
        yes: [name for name, true in verdicts.items() if true],
        no: [name for name, true in verdicts.items() if not true],
    }
    listed = (f"{word}: {', '.join(f'`{name}`' for name in names)}" for word, names in groups.items() if names)
    return "; ".join(listed) or "too few runs"
