"""``headstart export`` and ``headstart inspect``: what to do with an adapter's folder."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headstart.cli.app import app
from headstart.cli.console import output, warnings_said
from headstart.cli.options import Force
from headstart.errors import CheckpointError
from headstart.files import check_free

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")]


class Form(enum.StrEnum):
    """What an adapter can be exported to."""

    LORA = "lora"
    DIFFUSERS = "diffusers"
    MERGED = "merged"


@app.command()
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    to: Annotated[
        Form, typer.Option("--to", help="A plain LoRA, one in diffusers' layout, or the whole model with it merged in.")
    ] = Form.LORA,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", min=1, help="Truncate the update to this rank (not merged).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; by default the one it was made on.")
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="One rank and scaling for all layers, as engines read them (not merged)."),
    ] = False,
    force: Force = False,
) -> None:
    """Write a plain LoRA that any program can load, or merge the adapter into its base model."""
    from headstart.layers.adapter import make_plain
    from headstart.layers.checkpoint import load_checkpoint, read_adapter
    from headstart.layers.export import check_merged_place, write_diffusers, write_merged, write_plain
    from headstart.layers.files import ADAPTER_FOLDER, DIFFUSERS_FOLDER
    from headstart.training.models import resolve_model

    if to is Form.MERGED:
        check_merged_place(out, force)
    else:
        check_free(out, DIFFUSERS_FOLDER if to is Form.DIFFUSERS else ADAPTER_FOLDER, force)
    saved = read_adapter(adapter)
    if to is not Form.MERGED:
        plain = make_plain(saved.layers, saved.other_tensors, saved.config, rank, uniform=uniform)
        if to is Form.DIFFUSERS:
            write_diffusers(plain, out, force=force)
        else:
            write_plain(plain, out, force=force)
        lost = f", relative error {plain.relative_error:.3g}" if rank is not None else ""
        output.print(f"wrote {out}: rank {plain.config.r}{lost}", markup=False, highlight=False)
        return
    if rank is not None or uniform:
        option = "--uniform" if rank is None else "--rank"
        raise CheckpointError(f"{option} does not go with --to merged: a merged model holds the whole update.")
    base, tokenizer, _ = resolve_model(_base_name(model, saved.config.base_model_name_or_path, adapter), head="text")
    with warnings_said():
        merged = load_checkpoint(base, adapter, trainable=False)
    write_merged(merged, tokenizer, out, force=force)
    output.print(f"wrote {out}: the whole model, merged", markup=False, highlight=False)


@app.command()
def inspect(
    adapter: Adapter,
    model: Annotated[str | None, typer.Option("--model", help="Check that the adapter fits this base model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every layer.")] = False,
) -> None:
    """Show an adapter's ranks, norms and spectra, and the base model that it fits."""
    from headstart.layers.checkpoint import load_checkpoint, read_adapter
    from headstart.layers.inspection import inspect_adapter
    from headstart.training.models import resolve_model

    saved = read_adapter(adapter)
    description = inspect_adapter(saved)
    if as_json:
        output.print_json(json.dumps(description.to_dict()))
    else:
        for line in description.lines():
            output.print(line, markup=False, highlight=False)
        table = Table(box=None, pad_edge=False)
        for title in (
            "layers",
            "count",
            "shape",
            "form",
            "r",
            "s",
            "|update|",
            "largest s.v.",
            "smallest s.v.",
            "stable rank",
        ):
            table.add_column(title, justify="left" if title == "layers" else "right")
        for row in description.table():
            table.add_row(*row)
        output.print(table)
    if model is not None:
        with warnings_said():
            load_checkpoint(resolve_model(model, head="text")[0], adapter, trainable=False)
        output.print(f"it fits {model}", markup=False)


def _base_name(given: str | None, noted: str | None, adapter: Path) -> str:
    name = given or noted
    if not name:
        raise CheckpointError(f"{adapter} doesn't say what base model it belongs to: name it with --model.")
    return name
