"""What bfloat16 does to a start that is subtracted from the weight, and to the anchored form of the same start."""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import headstart as hs
from bench.harness import paragraph, table, token_batches, write
from headstart.layers.anchored import anchors
from headstart.layers.install import Subtracting
from headstart.training.models import resolve_model

RANK, STEPS, RATE = 8, 30, 1e-3
VOCABULARY, USED, WIDTH, LENGTH, ROWS = 1000, 64, 512, 32, 4
METHODS = ("pissa", "inilora-alpha", "init-ab", "inilora:solver=svd", "olora")
FORMS: tuple[Subtracting, ...] = ("anchored", "residual")
SCALINGS = (1, 2)
Key = tuple[str, int]  # a method and s


@dataclass(frozen=True)
class Drift:
    """How far logits are from others, over the root mean square of the others: root mean square and largest."""

    rms: float
    largest: float

    def __str__(self) -> str:
        return "0" if self.largest == 0 else f"{percent(self.rms)} % ({percent(self.largest)} %)"


def percent(share: float) -> str:
    """Return a share in percent, with two digits."""
    return f"{float(f'{100 * share:.2g}'):g}"


def drift(output: Tensor, reference: Tensor) -> Drift:
    """Compare logits with others of the same shape."""
    size = reference.square().mean().sqrt()
    apart = output - reference
    return Drift(float(apart.square().mean().sqrt() / size), float(apart.abs().max() / size))


# Models and data.


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy with its parameters in this precision; buffers stay as they are, as when it is loaded so."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def random_llama() -> Any:
    """Return a random Llama in bfloat16 whose weights have Llama's own scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.02,
    )
    return in_dtype(LlamaForCausalLM(config), torch.bfloat16).eval()


def scale_of(model: nn.Module) -> float:
    """Return the standard deviation of the weights of all linear layers, the output layer left out."""
    weights = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    return float(torch.cat([weight.detach().float().flatten() for weight in weights]).std())


def sequences(count: int, seed: int) -> Tensor:
    """Return token sequences (count, LENGTH) of a fixed chain: few tokens are used, and each has four successors."""
    successors = torch.randint(USED, (USED, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(USED, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(successors[tokens[-1], torch.randint(4, (count,), generator=generator)])
    return torch.stack(tokens, dim=1)


def wrapped(base: Any, method: str, scaling: int, form: Subtracting) -> Any:
    """Return a copy of the base model with LoRA layers that are started; PEFT keeps their factors in float32."""
    config = LoraConfig(r=RANK, lora_alpha=scaling * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(base), config)
    hs.initialize_(model, method, form=form, progress=False)
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits in float32."""
    model.eval()
    output: Tensor = model(input_ids=tokens).logits.float()
    return output


def loss_of(output: Tensor, tokens: Tensor) -> float:
    """Return the mean loss of the next token, in nats."""
    return float(functional.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


# The start.


@dataclass(frozen=True)
class Start:
    """The drift of a fresh model, by form: from the base model's logits, and from those of its float32 copy."""

    base: Mapping[str, Drift]
    exact: Mapping[str, Drift]


def starts(base: Any, tokens: Tensor) -> tuple[Drift, dict[Key, Start]]:
    """Return the drift of the base model from its float32 copy, and that of every start."""
    own, exact = logits(base, tokens), logits(in_dtype(base, torch.float32), tokens)
    drifts = {}
    for method, scaling in itertools.product(METHODS, SCALINGS):
        outputs = {form: logits(wrapped(base, method, scaling, form), tokens) for form in FORMS}
        drifts[method, scaling] = Start(
            {form: drift(value, own) for form, value in outputs.items()},
            {form: drift(value, exact) for form, value in outputs.items()},
        )
        print(
            f"start {method} s={scaling}: residual off by {drifts[method, scaling].base['residual']}", file=sys.stderr
        )
    return drift(own, exact), drifts


def start_lines(floor: Drift, drifts: Mapping[Key, Start]) -> list[str]:
    """Return the table of the starts."""
    rows = [["base model itself", "", "0", "0", str(floor), str(floor)]]
    for (method, scaling), start in drifts.items():
        rows.append(
            [method, str(scaling), *(str(by_form[form]) for by_form in (start.base, start.exact) for form in FORMS)]
        )
    titles = ["start", "s", *(f"{form}, from {what}" for what in ("the base", "float32") for form in FORMS)]
    return table(titles, rows)


# After training.


@dataclass(frozen=True)
class Trained:
    """A model in bfloat16 after training, against the same start trained in float32.

    Attributes:
        loss: held-out, minus that of float32.
        apart: its logits from those of float32.
        removed: the logits with the adapter disabled, from the base model's before.
        restored: the share of entries of the weights that differ once s B0 A0 is added back to them; None for anchored.
        exported: the logits of the adapter that ``save_lora`` writes, on the untouched base, from its own.
    """

    loss: float
    apart: Drift
    removed: Drift
    restored: float | None
    exported: Drift


@dataclass(frozen=True)
class Outcome:
    """What training did in float32 to the held-out loss and to the logits, and what each form in bfloat16 gives."""

    loss: float
    moved: Drift
    forms: Mapping[str, Trained]


def train(model: Any) -> Any:
    """Take the same steps on the same sequences with every model."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        tokens = sequences(ROWS, seed=1 + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def outcome(base: Any, method: str, scaling: int, tokens: Tensor) -> Outcome:
    """Train in float32 and, in both forms, in bfloat16."""
    exact = in_dtype(base, torch.float32)
    before = logits(exact, tokens)
    reference = logits(train(wrapped(exact, method, scaling, "anchored")), tokens)
    loss = loss_of(reference, tokens)
    forms: dict[str, Trained] = {}
    for form in FORMS if method != "lora" else FORMS[:1]:
        model = train(wrapped(base, method, scaling, form))
        own = logits(model, tokens)
        with model.disable_adapter():
            removed = logits(model, tokens)
        forms[form] = Trained(
            loss_of(own, tokens) - loss,
            drift(own, reference),
            drift(removed, logits(base, tokens)),
            None if form == "anchored" else changed_by_restoring(model, base),
            drift(logits(exported(model, base), tokens), own),
        )
    print(f"trained {method} s={scaling}: {loss:.4f}, {forms}", file=sys.stderr)
    return Outcome(loss, drift(reference, before), forms)


def exported(model: Any, base: Any) -> Any:
    """Return the plain adapter on the untouched base model, loaded by PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        hs.save_lora(model, Path(folder) / "adapter")
        return PeftModel.from_pretrained(copy.deepcopy(base), Path(folder) / "adapter")


@torch.no_grad()
def changed_by_restoring(model: nn.Module, base: nn.Module) -> float:
    """Return the share of entries of W - s B0 A0 + s B0 A0, each sum rounded to bfloat16, that are not W's."""
    weights = {name: module.weight for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    changed = total = 0
    for name, module in model.named_modules():
        start = anchors(module, "default") if isinstance(module, LoraLayer) else None
        if start is None or not isinstance(module, LoraLayer):
            continue
        A0, B0 = start
        weight = module.get_base_layer().weight
        restored = (weight.float() + module.scaling["default"] * (B0.float() @ A0.float())).to(weight.dtype)
        changed += int((restored != weights[name.removeprefix("base_model.model.")]).sum())
        total += weight.numel()
    return changed / total


def trained_lines(results: Mapping[Key, Outcome]) -> list[str]:
    """Return the tables of the trained models."""
    rows, removed = [], []
    for (method, scaling), result in results.items():
        first = [method, str(scaling)]
        forms = [result.forms.get(form) for form in FORMS]
        differences = [
            cell for form in forms for cell in ((f"{form.loss:+.4f}", str(form.apart)) if form else ("", ""))
        ]
        rows.append([*first, f"{result.loss:.4f}", str(result.moved), *differences])
        cells = [str(getattr(form, what)) if form else "" for what in ("removed", "exported") for form in forms]
        restored = next((form.restored for form in forms if form and form.restored is not None), None)
        removed.append([*first, *cells[:2], "" if restored is None else f"{100 * restored:.1f} %", *cells[2:]])
    apart = [f"{form}, {what}" for form in FORMS for what in ("loss minus it", "logits from it")]
    off = [f"{form}, {what}" for what in ("adapter disabled", "exported") for form in FORMS]
    return [
        *table(["start", "s", "float32: loss", "logits moved by", *apart], rows),
        "",
        "Taking the adapter off, and exporting it, after that training:",
        "",
        *table(["start", "s", *off[:2], "weights not restored", *off[2:]], removed),
    ]


# In words.


def spread(drifts: Sequence[Drift]) -> str:
    """Return the range of root mean squares."""
    low, high = min(value.rms for value in drifts), max(value.rms for value in drifts)
    return f"{percent(low)} %" if low == high else f"{percent(low)} to {percent(high)} %"


def conclusions(floor: Drift, drifts: Mapping[Key, Start], results: Mapping[Key, Outcome]) -> str:
    """Say what follows from the random model's numbers."""
    exact = sum(start.base["anchored"].largest == 0 for start in drifts.values())
    residual = {key: start.base["residual"] for key, start in drifts.items()}
    (method, scaling), worst = max(residual.items(), key=lambda item: item[1].rms)
    others = [value for (name, _), value in residual.items() if name != method]
    two = [result.forms for result in results.values() if "residual" in result.forms]
    closer = sum(abs(forms["anchored"].loss) < abs(forms["residual"].loss) for forms in two)
    nearer = sum(forms["anchored"].apart.rms < forms["residual"].apart.rms for forms in two)
    kept = sum(forms["anchored"].removed.largest == 0 for forms in two)
    restored = [100 * share for forms in two if (share := forms["residual"].restored) is not None]
    loss = {form: max(abs(forms[form].loss) for forms in two) for form in FORMS}
    plain = spread([result.forms["anchored"].apart for result in results.values() if "residual" not in result.forms])
    apart, removed, written = (
        {form: spread([getattr(forms[form], what) for forms in two]) for form in FORMS}
        for what in ("apart", "removed", "exported")
    )
    return (
        f"At the start the anchored form is the bfloat16 base bit for bit in {exact} of {len(drifts)} starts. The "
        f"residual form is off by {spread(list(residual.values()))} of the logits' root mean square, most for "
        f"`{method}` with s = {scaling} ({worst}) and without that method by {spread(others)}; bfloat16 by itself is "
        f"off float32 by {floor}. After training, the "
        f"anchored form is nearer to the float32 run than the residual one in {nearer} of {len(two)} pairs in logits "
        f"(off by {apart['anchored']} against {apart['residual']}) and in {closer} of {len(two)} in loss (off by at "
        f"most {loss['anchored']:.4f} against {loss['residual']:.4f}); plain LoRA, which subtracts nothing, is off by "
        f"{plain}. With the adapter disabled the anchored model is the base bit for "
        f"bit in {kept} of {len(two)}; the residual one is off by {removed['residual']}, and adding s·B0·A0 back "
        f"leaves {min(restored):.1f} to {max(restored):.1f} % of the weights changed. The adapter that `save_lora` "
        "writes for the untouched base is off the model that it was written from by "
        f"{written['residual']} where that was trained in the residual form, by {written['anchored']} where in the "
        "anchored one."
    )


def main() -> None:
    logging.disable_progress_bar()
    base, tokens = random_llama(), sequences(2 * ROWS, seed=0)
    floor, drifts = starts(base, tokens)
    pairs = [("lora", 1), ("lora", 2), *itertools.product(METHODS, SCALINGS)]
    results = {(method, scaling): outcome(base, method, scaling, tokens) for method, scaling in pairs}
    smol, tokenizer, _ = resolve_model("smollm2", dtype=torch.bfloat16, progress=False)
    batches, what = token_batches(4, 1, tokenizer)
    smol_floor, smol_drifts = starts(smol, batches[0]["input_ids"])
    lines = paragraph(
        "Frozen weights in bfloat16, factors and anchors in float32 as PEFT keeps them, all linear layers, rank "
        f"{RANK}, alpha r or 2 r (s = 1 or 2). Residual subtracts s·B0·A0 from the frozen weight and rounds that to "
        "bfloat16; anchored leaves the weight alone. Drift of logits is the root mean square of the difference over "
        "that of the logits, in brackets its largest entry over the same."
    )
    lines += ["", *paragraph(conclusions(floor, drifts, results)), ""]
    lines += ["## A random Llama, its weights 0.02 in scale", ""]
    lines += paragraph(
        f"Four layers of width {WIDTH}, {tokens.numel()} tokens. Drift of a fresh model from the bfloat16 base model, "
        "and from the base model's copy in float32 (the same weights, computed in float32):"
    )
    lines += ["", *start_lines(floor, drifts), ""]
    lines += paragraph(
        f"After {STEPS} AdamW steps of {ROWS} sequences at a rate of {RATE:g}, the same for all, against the same "
        "start trained in float32. `lora` has nothing to subtract: what it differs by is what bfloat16 does to any "
        f"training. The held-out loss was {loss_of(logits(base, tokens), tokens):.4f} before."
    )
    lines += ["", *trained_lines(results), ""]
    lines += paragraph(
        "Not restored: the share of frozen weights that are another number once s·B0·A0 is added back. Exported: "
        "`save_lora`'s adapter of rank 2 r on the untouched base, against the model that it was written from."
    )
    lines += ["", "## SmolLM2-135M", ""]
    lines += paragraph(
        f"At the start, on the first of {what}. The standard deviation of its linear weights is {scale_of(smol):.3f}:"
    )
    lines += ["", *start_lines(smol_floor, smol_drifts)]
    write("bfloat16", "What bfloat16 does", lines, precision="bfloat16 and float32")


if __name__ == "__main__":
    main()
