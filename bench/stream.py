"""Starts from the shards of a checkpoint of Llama-8B's shapes: seconds a layer, peak memory, and how both grow.

``python -m bench.stream --folder DIR`` makes the checkpoint there (16 GB; the disk is looked at first), runs every case
in a process of its own, and removes what it made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from bench.harness import paragraph, table, write
from headstart.context import peak_resident
from headstart.stream import stream_start
from headstart.stream.tensors import Planned, tensor_bytes, write_file

RANK = 8
QV = "q_proj,v_proj"
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
GROWTH = (1, 8, 32)
GOAL = 2.5
# Directions that stand out of the noise, as in trained weights; a spectrum of noise alone has no leading ones to find.
SPIKES = 64


@dataclass(frozen=True)
class Shapes:
    """What the model's config says."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256

    def config(self, layers: int) -> dict[str, Any]:
        """Return config.json's content."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "num_hidden_layers": layers,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one block's tensors."""
        keys = self.hidden // self.heads * self.key_heads
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}

    def ends(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors outside the blocks."""
        table = (self.vocabulary, self.hidden)
        return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (self.hidden,)}

    def bytes(self, layers: int) -> int:
        """Return the size on disk."""
        shapes = [*self.ends().values(), *(shape for n in range(layers) for shape in self.layer(n).values())]
        return sum(2 * torch.Size(shape).numel() for shape in shapes)


TINY = Shapes(hidden=256, inner=512, heads=8, key_heads=2, vocabulary=1000)


def planned(shape: tuple[int, ...], seed: int) -> Planned:
    """Plan a random tensor, drawn when it is written: noise of standard deviation 0.02, and leading directions."""

    def data() -> Iterator[bytes]:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        count = min(SPIKES, rows, columns)
        right = torch.randn(count, columns, generator=generator) / columns**0.5
        # The largest singular value of the noise is about 0.02 (sqrt(rows) + sqrt(columns)).
        edge = 0.02 * (rows**0.5 + columns**0.5)
        values = edge * (1 + 4 / torch.arange(1, count + 1)) / rows**0.5
        for start in range(0, rows, 4096):
            height = min(4096, rows - start)
            left = torch.randn(height, count, generator=generator) * values
            noise = torch.empty(height, columns).normal_(0, 0.02, generator=generator)
            yield tensor_bytes(noise.addmm_(left, right).to(torch.bfloat16))

    return Planned(torch.bfloat16, shape, data)


def make(folder: Path, shapes: Shapes, layers: int) -> None:
    """Write a checkpoint, one shard a layer and one for the rest."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    pieces = [shapes.ends(), *(shapes.layer(number) for number in range(layers))]
    for number, piece in enumerate(pieces):
        name = f"model-{number + 1:05d}-of-{len(pieces):05d}.safetensors"
        write_file(
            folder / name,
            {key: planned(shape, 1000 * number + place) for place, (key, shape) in enumerate(piece.items())},
            {"format": "pt"},
        )
        places |= dict.fromkeys(piece, name)
        print(f"wrote {name}", file=sys.stderr, flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(shapes.config(layers)))


def shorter(folder: Path, shapes: Shapes, layers: int) -> Path:
    """Return a checkpoint of the first layers of another, whose shards are links to the other's."""
    short = folder.parent / f"{folder.name}-{layers}"
    if short.exists():
        return short
    short.mkdir()
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {*shapes.ends(), *(name for number in range(layers) for name in shapes.layer(number))}
    places = {name: file for name, file in index.items() if name in kept}
    for file in set(places.values()):
        (short / file).symlink_to(folder / file)
    (short / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (short / "config.json").write_text(json.dumps(shapes.config(layers)))
    return short


def run_case(folder: Path, method: str, targets: str) -> None:
    """Run one case in this process, and print the layers, the seconds, and the resident set before and at its peak."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        before = peak_resident() // 1024
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets.split(","), task_type="CAUSAL_LM")
        began = time.perf_counter()
        report = stream_start(folder, method, config, Path(work) / "out", cache=False, progress=False)
        seconds = time.perf_counter() - began
    assert report is not None
    peak = peak_resident() // 1024
    print(json.dumps({"layers": len(report.layers), "seconds": seconds, "before": before, "peak": peak}))


@dataclass(frozen=True)
class Case:
    """A method, the kinds of layers it is for, and how many blocks of the model."""

    method: str
    targets: str
    blocks: int

    def run(self, folder: Path, shapes: Shapes) -> list[str]:
        """Run it in a process of its own and return its row."""
        command = [sys.executable, "-m", "bench.stream", "--one", str(shorter(folder, shapes, self.blocks))]
        done = subprocess.run([*command, self.method, self.targets], check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        kinds = "all seven" if self.targets == ALL else self.targets.replace("_proj", "").replace(",", " and ")
        print(f"{self.method}, {kinds}, {self.blocks}: {figures}", file=sys.stderr, flush=True)
        return [
            f"`{self.method}`",
            kinds,
            str(self.blocks),
            str(figures["layers"]),
            f"{figures['seconds']:.1f}",
            f"{figures['seconds'] / figures['layers']:.2f}",
            f"{figures['before'] / 2**20:.2f}",
            f"{figures['peak'] / 2**20:.2f}",
        ]


def cases(layers: int, slow: int) -> list[Case]:
    """Return the cases: those that read only on the whole model, those that decompose on its first ``slow`` blocks."""
    growth = [Case("init-ab", QV, blocks) for blocks in GROWTH if blocks <= layers]
    listed = [
        *(growth if Case("init-ab", QV, layers) in growth else [*growth, Case("init-ab", QV, layers)]),
        Case("init-ab", ALL, layers),
        *(Case("pissa", QV, blocks) for blocks in GROWTH if blocks <= layers),
        Case("inilora:solver=svd", QV, min(8, layers)),
        Case("pissa", ALL, min(slow, layers)),
        Case("inilora:solver=svd", ALL, min(slow, layers)),
    ]
    return list(dict.fromkeys(listed))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model; halved where the disk is small")
    parser.add_argument("--first", type=int, default=2, help="blocks for the cases that take longest")
    parser.add_argument("--tiny", action="store_true", help="small shapes, no page: to try the script")
    chosen = parser.parse_args([] if arguments is None else arguments)
    shapes, layers = (TINY if chosen.tiny else Shapes()), chosen.layers
    free = shutil.disk_usage(chosen.folder).free
    while shapes.bytes(layers) * 1.1 > free and layers > 1:
        layers //= 2
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="headstart-stream-") as work:
        folder = Path(work) / "model"
        make(folder, shapes, layers)
        rows = [case.run(folder, shapes) for case in cases(layers, chosen.first)]
    most = max(float(row[-1]) for row in rows)
    titles = ["method", "kinds", "blocks", "layers", "seconds", "seconds a layer", "GiB at first", "peak GiB"]
    text = (
        f"A random bfloat16 checkpoint of Llama-8B's shapes with {layers} blocks ({shapes.bytes(layers) / 1e9:.1f} GB "
        f"on disk, one shard a block), rank {RANK}: noise with {SPIKES} directions above it. Cases on fewer blocks "
        "read the same shards: what takes long is measured on some of them. Each case is a process of its own: seconds "
        "of the whole call; resident set with the libraries imported, and at its peak (VmHWM). One run a case; the "
        "checkpoint was just written, so part of it comes from the system's cache. The model itself would take "
        f"{shapes.bytes(layers) / 2**30:.1f} GiB in bfloat16, and twice that in float32."
    )
    lines = [
        *paragraph(text),
        "",
        *table(titles, rows),
        "",
        f"Largest peak: {most:.2f} GiB (goal: under {GOAL} GB, which is {GOAL * 1e9 / 2**30:.2f} GiB).",
    ]
    if chosen.tiny or layers < 8:
        print("\n".join(lines))
    else:
        write("stream", "Starts for models larger than memory", lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_case(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main(sys.argv[1:])
