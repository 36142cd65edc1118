"""What starts on what: each cell of a table is run, and docs/supported.md holds what came of it.

``python tests/supported.py`` writes the table anew; tests/test_supported.py runs each cell against what is written.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import headstart as hs
from conftest import ARCHITECTURES, tiny_llama, token_batch
from embedded import MODELS
from embedded import base_of as base_with_rows
from mixtures import EXPERTS, batch, moe
from quantised_bases import WAYS, WIDE

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
BEGIN, END = "<!-- The table of tests/supported.py. -->\n", "<!-- Its end. -->\n"

# Those that can be made here without a kernel that wants a GPU.
FORMATS = ("torchao int8", "torchao int4", "torchao float8", "HQQ 4")

FAMILIES = {
    "shapes, kept: `init-ab-plus`": ("init-ab-plus", "anchored"),
    "shapes, anchored: `init-ab`": ("init-ab", "anchored"),
    "weight, anchored: `pissa`": ("pissa", "anchored"),
    "weight, residual: `pissa`": ("pissa", "residual"),
    "inputs, anchored: `corda`": ("corda:samples=4", "anchored"),
    "gradient, kept: `lora-one`": ("lora-one:samples=4", "anchored"),
    "gradient, anchored: `lora-ga`": ("lora-ga:samples=4", "anchored"),
    "Fisher, kept: `lora-da`": ("lora-da:samples=4", "anchored"),
    "core: `lora-xs`": ("lora-xs", "anchored"),
}


@dataclass(frozen=True)
class Row:
    """A model, a batch of its data, which of its layers are adapted, and what must be installed for that."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    adapter: dict[str, Any]
    needs: str = "torch"


def _usual(name: str) -> Row:
    make, batch_of, targets = ARCHITECTURES[name]
    return Row(make, batch_of, {"target_modules": targets, "fan_in_fan_out": name == "gpt2"})


def _mixture(name: str, parameters: list[str]) -> Row:
    def make() -> nn.Module:
        model = moe(name)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "experts" in parameter_name:
                    parameter *= 4  # for the loss to feel, in float32, which expert a token goes to
        return model

    return Row(make, batch, {"target_modules": [], "target_parameters": parameters})


def _quantised(needs: str, load: Callable[[str, torch.dtype], nn.Module]) -> Row:
    """A Llama whose linear layers a library quantises while they are loaded."""

    def make() -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            tiny_llama(**WIDE).save_pretrained(folder)
            return load(folder, torch.float32)

    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    return Row(make, token_batch, {"target_modules": targets}, needs)


def _by_bitsandbytes(**bits: bool) -> Row:
    def load(folder: str, dtype: torch.dtype) -> nn.Module:
        config = BitsAndBytesConfig(**bits)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
        )

    return _quantised("bitsandbytes", load)


def _embeddings(name: str) -> Row:
    _, batch_of, targets = MODELS[name]
    return Row(lambda: base_with_rows(name), batch_of, {"target_modules": targets})


ROWS = {
    "Llama, `nn.Linear`": _usual("llama"),
    "GPT-2, `Conv1D`": _usual("gpt2"),
    "T5, `nn.Linear`": _usual("t5"),
    "BERT, `nn.Linear`": _usual("bert"),
    "ViT, `nn.Linear`": _usual("vit"),
    "ViT, `nn.Conv2d`": Row(*ARCHITECTURES["vit"][:2], {"target_modules": ["projection"]}),
    "Llama, `nn.Embedding`": _embeddings("llama"),
    "Llama, `nn.Embedding`, tied": _embeddings("tied"),
    "Gemma, `nn.Embedding`, scaled": _embeddings("gemma"),
    "BERT, `nn.Embedding`": _embeddings("bert"),
    "Mixtral, experts": _mixture("mixtral", EXPERTS),
    "Mixtral, routers": _mixture("mixtral", ["gate.weight"]),
    "Qwen3-MoE, experts": _mixture("qwen3-moe", EXPERTS),
    "Qwen3.5-MoE, experts": _mixture("qwen3.5-moe", EXPERTS),
    "DeepSeek-V3, experts": _mixture("deepseek-v3", EXPERTS),
    "gpt-oss, experts": _mixture("gpt-oss", EXPERTS),
    "Llama 4, experts": _mixture("llama4", EXPERTS),
    "Llama, bitsandbytes 4-bit": _by_bitsandbytes(load_in_4bit=True),
    "Llama, bitsandbytes 8-bit": _by_bitsandbytes(load_in_8bit=True),
    **{f"Llama, {name}": _quantised(WAYS[name].package, WAYS[name].make) for name in FORMATS},
}


@functools.cache
def base_of(row: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The row's base model in evaluation mode, its batch, and its logits."""
    torch.manual_seed(0)
    base, inputs = ROWS[row].make().eval(), ROWS[row].batch()
    with torch.no_grad():
        return base, inputs, base(**inputs).logits


def outcome(row: str, family: str) -> str:
    """Return "yes", or the sentence of the refusal with the names of layers left out.

    "Yes" is a start of which this holds: an anchored one gives the base model's logits bit for bit, a residual one to
    rounding; the loss has a gradient by what trains, and a small step down it lowers the loss; and what ``save_lora``
    then writes, PEFT loads on the untouched base model with the same logits.

    Raises:
        AssertionError: one of these does not hold.
    """
    spec, form = FAMILIES[family]
    base, inputs, expected = base_of(row)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, **ROWS[row].adapter)).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hs.errors.HeadstartWarning)  # of experts that no token reached
            hs.initialize_(model, spec, data=[inputs], form=form, progress=False)
    except hs.HeadstartError as error:
        return re.sub(r"layer '[^']*'", "layer '…'", str(error))
    start = model(**inputs)
    if family.split(":")[0].endswith("anchored"):
        assert torch.equal(start.logits, expected)
    elif family.split(":")[0].endswith("residual"):
        torch.testing.assert_close(start.logits, expected, rtol=1e-4, atol=1e-5)
    after = _lower(model, inputs, start.loss)
    with tempfile.TemporaryDirectory() as folder:
        hs.save_lora(model, Path(folder) / "lora")
        plain = PeftModel.from_pretrained(copy.deepcopy(base), str(Path(folder) / "lora")).eval()
    torch.testing.assert_close(plain(**inputs).logits, after, rtol=1e-4, atol=1e-4)
    return "yes"


def _lower(model: nn.Module, inputs: dict[str, Tensor], loss: Tensor) -> Tensor:
    """Go down the gradient to a lower loss, and return the logits there.

    The first step should lower the loss by 0.001, to first order; each further one goes back by half of it.
    """
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    rate = 1e-3 / sum(float(p.grad.square().sum()) for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter -= rate * parameter.grad
        for _ in range(12):
            there = model(**inputs)
            if there.loss < loss:
                return there.logits
            rate /= 2
            for parameter in trained:
                parameter += rate * parameter.grad
    raise AssertionError("no step down the gradient lowers the loss")


def table(cells: dict[tuple[str, str], str]) -> str:
    """Return the outcomes in Markdown: a line a row, "yes" or a number, and the sentences by their numbers."""
    sentences = list(dict.fromkeys(text for text in cells.values() if text != "yes"))
    lines = [f"| | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
    for row in ROWS:
        texts = (cells[row, family] for family in FAMILIES)
        marks = ("yes" if text == "yes" else f"no ({sentences.index(text) + 1})" for text in texts)
        lines.append(f"| {row} | {' | '.join(marks)} |")
    return "\n".join([*lines, "", *(f"{i}. {text}" for i, text in enumerate(sentences, 1)), ""])


def written() -> dict[tuple[str, str], str]:
    """Return the outcomes that docs/supported.md holds."""
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    sentences = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    marks = {(row[0], family): mark for row in rows[1:] for family, mark in zip(rows[0][1:], row[1:], strict=True)}
    return {at: mark if mark == "yes" else sentences[mark[4:-1]] for at, mark in marks.items()}


def main() -> None:
    """Run every cell, and write the table into docs/supported.md."""
    cells = {(row, family): outcome(row, family) for row in ROWS for family in FAMILIES}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(cells) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
