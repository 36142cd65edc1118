"""``headstart init``: make a start and write it as a checkpoint to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output
from headstart.cli.options import (
    Alpha,
    Base,
    BaseForm,
    Force,
    MaxLength,
    Model,
    Rank,
    RsLora,
    Seed,
    Targets,
    target_modules,
)
from headstart.errors import CheckpointError, DataError
from headstart.methods import Needs, parse_method
from headstart.progress import progress_bars


@app.command("init")
def init(
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help="Such as pissa or lora-one:samples=64.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    data: Annotated[str | None, typer.Option("--data", help="JSONL file, folder or hub name; see the README.")] = None,
    rank: Rank = 8,
    alpha: Alpha = 16,
    rslora: RsLora = False,
    targets: Targets = "all-linear",
    seed: Seed = 0,
    base: Base = BaseForm.ANCHORED,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    max_length: MaxLength = 512,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a layer would fall back.")] = False,
    force: Force = False,
) -> None:
    """Initialise an adapter and write it as a checkpoint (headstart.load_checkpoint reads it)."""
    # What can be refused is refused before the model is loaded.
    made = parse_method(method)
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists: choose another --out, or overwrite it with --force.")
    if Needs.GRADIENT in made.needs and data is None:
        raise DataError(f"method {made.name!r} needs data: give a JSONL file with --data.")

    from peft import LoraConfig, get_peft_model

    from headstart.initialize import initialize_
    from headstart.layers.checkpoint import save_checkpoint
    from headstart.training.data import batches, load_examples, tokenize_examples
    from headstart.training.models import resolve_model

    loaded, tokenizer, name = resolve_model(model)
    rows: list[dict[str, list[int]]] = []
    if data is not None:
        samples = int(str(made.settings().get("samples", 256)))
        rows = tokenize_examples(load_examples(data, limit=samples), tokenizer, max_length=max_length).rows
        rows.sort(key=lambda row: len(row["input_ids"]))
    chosen = target_modules(targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=chosen if isinstance(chosen, str) else list(chosen),
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )
    wrapped = get_peft_model(loaded, config)
    with progress_bars(console) as show:
        report = initialize_(
            wrapped,
            made,
            data=batches(rows, batch_size, tokenizer.pad_token_id) if rows else None,
            seed=seed,
            base=base.word,
            strict=strict,
            progress=show,
        )
    save_checkpoint(wrapped, out, force=force)
    output.print(report)
    output.print(f"wrote {out}", markup=False)
