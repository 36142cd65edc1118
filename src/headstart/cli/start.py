"""``headstart init``: make a start and write it as a checkpoint to train from."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.app import app
from headstart.cli.console import console, output
from headstart.cli.options import (
    Alpha,
    Force,
    Form,
    MaxLength,
    Model,
    Parameters,
    Rank,
    RsLora,
    Seed,
    SubtractingForm,
    Targets,
    target_modules,
    words,
)
from headstart.errors import DataError, LayerError
from headstart.files import check_free
from headstart.methods import ANY_LAYER, Method, Training, parse_method
from headstart.methods.given import BOTH_KINDS

_METHOD = """Such as pissa or lora-one:samples=64; by layers, per-layer:{"q_proj|v_proj": "pissa", "*": "lora"}."""


@app.command("init")
def init(
    context: typer.Context,
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help=_METHOD)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    data: Annotated[str | None, typer.Option("--data", help="JSONL file, folder or hub name; see the README.")] = None,
    preserve: Annotated[
        str | None, typer.Option("--preserve", metavar="TEXT", help="Of an ability that sc-lora, lora-null protect.")
    ] = None,
    rank: Rank = 8,
    alpha: Alpha = 16,
    rslora: RsLora = False,
    targets: Targets = "all-linear",
    parameters: Parameters = "",
    seed: Seed = 0,
    form: Form = SubtractingForm.ANCHORED,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    max_length: MaxLength = 512,
    lr: Annotated[
        float | None, typer.Option("--lr", help="The rate of the first optimizer step to come; lora-sb asks for it.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", help="For what a pass over the data sums, such as 6GiB.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Look up, and keep, what depends on weights alone.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a layer would fall back.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the folder's shards layer by layer; never build the model.")
    ] = False,
    force: Force = False,
) -> None:
    """Initialise an adapter and write it as a checkpoint (headstart.load_checkpoint reads it)."""
    # What can be refused is refused before the model is loaded.
    parsed = parse_method(method)
    if stream:
        for name in ("data", "preserve", "batch_size", "max_length", "lr", "memory_budget"):
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise DataError(
                    f"--{name.replace('_', '-')} is for methods that read data through the whole model, which --stream "
                    "never builds: leave one of the two out."
                )
        _stream(model, parsed, out, rank, alpha, rslora, targets, parameters, seed, form, cache, strict, force)
        return

    from headstart.layers.files import ADAPTER_FOLDER

    check_free(out, ADAPTER_FOLDER, force)
    probe = replace(ANY_LAYER, training=Training(None, lr))
    for own in parsed.methods:
        with suppress(LayerError):  # of a setting that is missing; what is wrong with layers, the verb finds
            own.check(probe)
    reading = [own for own in parsed.methods if own.reads_task]
    if reading and data is None:
        raise DataError(f"method {reading[0].name!r} needs data: give a JSONL file with --data.")
    from headstart.runs.preserved import check_preserved, preserved_data

    check_preserved(parsed, preserve, "--preserve")
    if preserve is not None and not parsed.reads_preserved:
        console.print(f"note: method {parsed.name!r} protects no ability, so --preserve is left unread", markup=False)
    if data is not None and not reading:
        console.print(f"note: method {parsed.name!r} reads no data, so --data is left unread", markup=False)
        data = None

    from headstart.initialize import initialize_
    from headstart.layers.checkpoint import save_checkpoint
    from headstart.statistics.training import TrainingData
    from headstart.tasks.rows import read
    from headstart.tasks.text import Text
    from headstart.training.data import batches, tokenize_examples
    from headstart.training.models import resolve_model
    from headstart.training.wrap import accelerator, wrap_lora

    loaded, tokenizer, name = resolve_model(model)
    rows: list[dict[str, list[int]]] = []
    population = None
    if data is not None:
        counts_all = any(own.wants(layer).population for own in reading for layer in BOTH_KINDS)
        limit = None if counts_all else max(own.sample_count() for own in reading)
        every = read(Text(), data, limit=limit).examples
        population = len(every)
        counts = sorted(own.sample_count(population) for own in reading)
        tokenized = tokenize_examples(every[: counts[-1]], tokenizer, max_length=max_length)
        if tokenized.dropped or tokenized.truncated:
            console.print(
                f"warning: {tokenized.dropped} examples were left out and {tokenized.truncated} cut off at "
                f"--max-length {max_length}",
                markup=False,
                highlight=False,
            )
        rows = tokenized.rows
        # By length, but each method's own samples before what others read beyond them.
        for begin, end in pairwise([0, *counts]):
            rows[begin:end] = sorted(rows[begin:end], key=lambda row: len(row["input_ids"]))
    wrapped = wrap_lora(
        loaded.to(accelerator()),
        target_modules(targets),
        target_parameters=list(words(parameters)) or None,
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )
    report = initialize_(
        wrapped,
        parsed,
        data=TrainingData(
            batches(rows, batch_size, tokenizer.pad_token_id) if rows else None, training=Training(population, lr)
        ),
        preserve=preserved_data(preserve, parsed, tokenizer, max_length=max_length, batch_size=batch_size),
        seed=seed,
        form=form.word,
        memory_budget=memory_budget,
        cache=cache,
        strict=strict,
    )
    save_checkpoint(wrapped, out, force=force)
    output.print(report)
    output.print(f"wrote {out}", markup=False)


def _stream(
    model: str,
    method: Method,
    out: Path,
    rank: int,
    alpha: int,
    rslora: bool,
    targets: str,
    parameters: str,
    seed: int,
    form: SubtractingForm,
    cache: bool,
    strict: bool,
    force: bool,
) -> None:
    from peft import LoraConfig

    from headstart.stream import FOLDER, stream_start, task_type
    from headstart.training.wrap import accelerator

    folder = Path(model).expanduser()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=modules if isinstance(modules := target_modules(targets), str) else list(modules),
        target_parameters=list(words(parameters)) or None,
        task_type=task_type(folder),
    )
    report = stream_start(
        folder,
        method,
        config,
        out,
        seed=seed,
        form=form.word,
        name=model,
        device=accelerator(),
        cache=cache,
        strict=strict,
        force=force,
    )
    if report is not None:
        output.print(report)
        residual = f", and the residual model in {out / FOLDER} (headstart.stream.load_residual loads both)"
        output.print(f"wrote {out}{residual if (out / FOLDER).is_dir() else ''}", markup=False)
