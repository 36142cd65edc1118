"""Options that several commands share."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub name, a local folder, a .gguf file, or smollm2 (the packaged model)."),
]
Rank = Annotated[int, typer.Option("--rank", "-r", min=1, help="LoRA rank.")]
Alpha = Annotated[int, typer.Option("--alpha", min=1, help="lora_alpha.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha/sqrt(r).")]
Targets = Annotated[
    str, typer.Option("--targets", help="Target modules: all-linear, names separated by commas, or a regex.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the start, the data order and the built-in problems.")]

Methods = Annotated[str, typer.Option("--methods", "-m", help="Separated by commas or blanks, settings after a colon.")]
Task = Annotated[
    str | None,
    typer.Option(
        "--task", help="See `headstart tasks`; text where there are --data, else problems.", show_default=False
    ),
]
Data = Annotated[str | None, typer.Option("--data", help="A file, a folder with train and test files, or a hub name.")]


class SubtractingForm(enum.Enum):
    """What becomes of the frozen weights; the values are those of ``headstart.initialize_``."""

    ANCHORED = "anchored"
    RESIDUAL = "residual"

    @property
    def word(self) -> Literal["anchored", "residual"]:
        """The value, typed as ``initialize_`` takes it."""
        return "anchored" if self is SubtractingForm.ANCHORED else "residual"


Form = Annotated[
    SubtractingForm, typer.Option("--form", "--base", help="Leave the frozen weights untouched, or subtract the start.")
]

Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=8, help="Cut longer rows, in tokens.")]


Parameters = Annotated[
    str,
    typer.Option(
        "--parameters",
        help="Target parameters of no linear layer, separated by commas: experts.down_proj, gate.weight.",
    ),
]


def words(text: str) -> tuple[str, ...]:
    """Return names that commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def target_modules(text: str) -> str | tuple[str, ...]:
    """Read ``--targets``: a comma separates names; anything else is PEFT's own shorthand or regular expression."""
    names = words(text)
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    if len(names) > 1 or (plain and text != "all-linear"):
        return names
    return text


def common_settings(
    model: str,
    task: str | None,
    data: str | None,
    train_examples: int,
    rank: int,
    alpha: float,
    rslora: bool,
    targets: str,
    batch_size: int,
    max_length: int,
) -> dict[str, Any]:
    """Return the settings of a run that the options of several commands give, by branch."""
    return {
        "model": model,
        "data": {
            "task": task or ("text" if data is not None else "problems"),
            "train": data,
            "train_examples": train_examples,
        },
        "adapter": {"r": rank, "alpha": alpha, "rslora": rslora, "targets": target_modules(targets)},
        "batch": {"size": batch_size, "max_length": max_length},
    }
