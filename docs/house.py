"""Draws docs/architecture.md from the code: what imports what, and the files that one batch passes.

``python docs/house.py`` writes the page; a test compares it with the code.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

SOURCE = Path(__file__).parent.parent / "src" / "headstart"
PAGE = Path(__file__).with_name("architecture.md")
EXAMPLE = Path(__file__).parent.parent / "tests" / "starts" / "of_gradient.py"
# Data flow one way: a room imports from those above it only. Single files are rooms of their own.
ROOMS: dict[str, str] = {
    "ground": "errors, settings, progress, files, processes, names, compat, context, environment: all may stand on it",
    "report": "what a start did, as a table and as plain types",
    "linalg": "decompositions, inverses; where and in what precision they are solved",
    "methods": "one file a start: what it wants, the form it lives in, what it refuses, its factors",
    "layers": "the layers of an adapter: found, read, given their start; saved and loaded",
    "store": "entries that several processes make together, each once, and believe only whole",
    "statistics": "passes over the data: what is summed for each layer, for whom, and how samples weigh",
    "monitor": "what layers do while they train, in the terms of the scaling theory",
    "cache": "factors that depend on weights alone, kept between runs",
    "solve": "from what is known of the layers to their factors",
    "reporting": "the lines of the report",
    "initialize": "the verb: find, check, collect, solve, install, report",
    "allocate": "an adapter's ranks, shared out among its layers before a start",
    "tasks": "one file a family: how rows become examples, the prompt, how answers are graded",
    "training": "models, data, one run of fine-tuning",
    "evaluation": "what a model is worth: losses, graded answers, intervals; generated programs run confined",
    "runs": "one run: its settings, its stages, its result",
    "stream": "the same from a checkpoint's shards, layer by layer",
    "study": "cells, each a run, in one grid; who does them; what they show, with statistics that hold",
    "reports": "a study's page, tables and charts",
    "dynamics": "the scaling theory, measured: the toy model of its paper, and exponents over widths",
    "advise": "before training: what starts cost, and how sharp the loss is along their first step",
    "cli": "the command line",
}
GROUND = {
    "errors",
    "settings",
    "progress",
    "files",
    "processes",
    "names",
    "compat",
    "context",
    "environment",
    "_version",
    "_imports",
}


def room_of(module: str) -> str:
    """Return the room of a module such as ``headstart.layers.find``; the package itself is the roof."""
    parts = module.split(".")
    if len(parts) == 1:
        return "roof"
    return "ground" if parts[1] in GROUND else parts[1]


def imports() -> dict[str, set[str]]:
    """Return by room the rooms that its files import from."""
    edges: dict[str, set[str]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("headstart", *path.relative_to(SOURCE).with_suffix("").parts)
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("headstart"):
                names = [f"headstart.{each.name}" if node.module == "headstart" else node.module for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names if each.name.startswith("headstart")]
            for name in names:
                here, there = room_of(module), room_of(name)
                if here not in ("roof", there) and there in ROOMS:
                    edges[here].add(there)
    return edges


def against_the_order(edges: dict[str, set[str]]) -> list[str]:
    """Return the imports that go the wrong way."""
    place = {room: number for number, room in enumerate(ROOMS)}
    return sorted(f"{a} imports {b}" for a, others in edges.items() for b in others if place[b] > place[a])


def drawing(edges: dict[str, set[str]]) -> str:
    """Return the rooms as a flowchart; an arrow that two others make up for is left out."""
    reached: dict[str, set[str]] = {}
    for room in ROOMS:
        reached[room] = set(edges[room]).union(*(reached[other] for other in edges[room] if other in reached))
    lines = ["```mermaid", "flowchart BT"]
    for room in ROOMS:
        near = [a for a in ROOMS if a in edges[room] and not any(a in reached[b] for b in edges[room] if b != a)]
        lines += [f"    {room} --> {other}" for other in near]
    return "\n".join([*lines, "```"])


def walked(function: Any) -> list[str]:
    """Return the files that a call passes, in the order in which it comes to them."""
    files: dict[str, None] = {}

    def notice(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE):
            files.setdefault(path.relative_to(SOURCE).as_posix(), None)

    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(None)
    return list(files)


def batch_walk() -> list[str]:
    """Return the files that a batch passes on its way to factors: read, summed, averaged, solved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from headstart.context import Context
    from headstart.layers.adapters import find
    from headstart.methods.base import Training
    from headstart.methods.registry import get_method
    from headstart.solve import solve
    from headstart.statistics.prepare import prepare

    torch.manual_seed(0)
    widths = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=31)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**widths)), LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.randint(1, 31, (4, 9))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 2
    method, adapter = get_method("lora-one", samples=8), find(model, None)
    modules = {layer.name: layer.module for layer in adapter.layers}
    wants = {layer.name: method.wants(layer.facts()) for layer in adapter.layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector = prepare(model, modules, wants, data, 8)
        # Once before, so that what is found out from the first sample is known.
        for statistics in collector.passes():
            del statistics

        context, training = Context(), Training()

        def once() -> None:
            for statistics in collector.passes():
                solve(method, adapter.layers, statistics, context, training)

        return walked(once)


def page() -> str:
    """Return the page."""
    edges = imports()
    rooms = "\n".join(f"| `{room}` | {what} |" for room, what in ROOMS.items())
    walk = batch_walk()
    steps = "\n".join(f"{number}. `{file}`" for number, file in enumerate(walk, start=1))
    return f"""# The house

<!-- Drawn from the code by `make docs`; a test compares. -->

Data flow one way: a room imports from those above it in the table only.

| room | what is in it |
|---|---|
{rooms}

{drawing(edges)}

## The verb

`initialize_` in [initialize.py](../src/headstart/initialize.py) is a table of contents: it finds the layers (LoRA's,
VeRA's; shards of a checkpoint are the same to all that follows), lets the method refuse what it can't start, collects
what the method wants, solves, installs all layers or none, and reports. One object, `Context`, carries what every step
needs: seed, processes, progress, clock, notes.

## One batch, from file to file

What a batch of tokens passes on its way to `lora-one`'s factors, {len(walk)} files, in the order in which it comes to
them:

{steps}

## A new start

One file. It says what it wants of a layer, the form that its start lives in, and its factors:

```python
{EXAMPLE.read_text(encoding="utf-8")}```

In `headstart/methods/` it is found by itself; in a package of your own, name its module under the entry point group
`headstart.methods`. The verb, the command line, the tables, the cache (for starts from weights, with an
`arithmetic_version`), several processes and FSDP2 then know it: `tests/test_own_starts.py` runs four of them, each in a
file of less than forty lines.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
