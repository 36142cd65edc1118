"""An anchored layer that trains differences to its start, against one that trains whole factors.

``python -m bench.differences 5`` takes five rounds instead of the usual number. The form with whole factors computes
s [(B - B0) (A x) + B0 ((A - A0) x)] from A and B, with a backward pass written out by hand, so that it keeps no more
than plain LoRA and reads x once.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import headstart as hs
from bench.harness import Timing, paired_ratio, paragraph, table, write
from headstart.errors import LayerError
from headstart.layers.anchored import Formed, anchors

PLAIN, WHOLE, DIFFERENCES = "plain LoRA", "whole factors", "differences"
ROUNDS, STEPS, RATE = 15, 60, 1e-4
# d_in, d_out, tokens: SmolLM2's attention, Llama-3.2-1B's attention and its up projection.
SHAPES = {
    "576 x 576, 1024 tokens": (576, 576, 1024),
    "2048 x 2048, 512": (2048, 2048, 512),
    "2048 x 8192, 512": (2048, 8192, 512),
}


class _Whole(torch.autograd.Function):
    """The form with whole factors; keeps x and r numbers a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scaling: float) -> Tensor:
        inner = functional.linear(x, torch.cat((A, A - A0))) * scaling
        ctx.save_for_backward(x, inner[..., : len(A)].contiguous(), A, B, A0, B0)
        ctx.scaling = scaling
        return functional.linear(inner, torch.cat((B - B0, B0), dim=1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, A, B, A0, B0 = ctx.saved_tensors
        (grad,), r = grads, len(A)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_inner = rows @ torch.cat((B - B0, B0), dim=1) * ctx.scaling
        grad_x = (grad_inner @ torch.cat((A, A - A0))).reshape(x.shape) if ctx.needs_input_grad[0] else None
        grad_A = (grad_inner[:, :r] + grad_inner[:, r:]).T @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_A, rows.T @ inner.reshape(-1, r), None, None, None


class WholeVariant(Formed):
    """A layer whose lora_A and lora_B hold A and B themselves."""

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the adapter's part to the base layer's output."""
        self.note_run()
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        A0, B0 = (anchor.detach().to(A.dtype) for anchor in start_of(module))
        x = module.lora_dropout[active_adapter](x)
        apply: Any = _Whole.apply
        return result + apply(x, A, B, A0, B0, module.scaling[active_adapter])


def start_of(module: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return (A0, B0) of an anchored layer."""
    start = anchors(module, "default")
    if start is None:
        raise LayerError("the layer has no anchors.")
    return start


def formed(base: nn.Module, form: str, targets: list[str] | str, r: int = 8) -> Any:
    """Return a model with PiSSA's start in one of the forms, or plain LoRA."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules=targets))
    hs.initialize_(model, "lora" if form == PLAIN else "pissa", progress=False, cache=False)
    if form == WHOLE:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    A0, B0 = start_of(module)
                    module.lora_A["default"].weight.copy_(A0)
                    module.lora_B["default"].weight.copy_(B0)
                    module.lora_variant["default"] = WholeVariant()
    return model


def tiny() -> LlamaForCausalLM:
    """Return a small Llama with random weights."""
    torch.manual_seed(0)
    settings = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**settings))


def data(steps: int) -> list[dict[str, Tensor]]:
    """Return batches of sequences that repeat themselves, which is something to learn."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randint(1, 256, (8, 16), generator=generator) for _ in range(steps)]
    return [dict(input_ids=torch.cat((half, half), 1), labels=torch.cat((half, half), 1)) for half in halves]


def trained(form: str, dtype: torch.dtype) -> tuple[Any, float, float]:
    """Train; return the model, the mean loss of the last ten steps and the share of updates that changed nothing."""
    model = formed(tiny().to(dtype), form, "all-linear").to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses, lost, count = [], 0, 0
    for batch in data(STEPS):
        loss = model(**batch).loss
        loss.backward()
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            moves = parameter.grad != 0
            lost += int((moves & (parameter == old)).sum())
            count += int(moves.sum())
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, sum(losses[-10:]) / 10, lost / count


@torch.no_grad()
def lost_in_cast(model: Any) -> float:
    """Return which share of the logits' change is lost when the adapter is cast to bfloat16 after training."""
    batch = data(1)[0]
    expected = model(**batch).logits
    with model.disable_adapter():
        change = (expected - model(**batch).logits).norm()
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    return float((rounded(**batch).logits - expected).norm() / change)


def kept_bytes(model: Any, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(sizes.values())


def cpu_seconds(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, Timing]:
    """Run every step once a round, in turn, after one round that isn't counted; return the CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: Timing(values) for name, values in seconds.items()}


def stepper(model: Any, x: Tensor) -> Callable[[], None]:
    """Return a forward and a backward pass through a layer, with the gradient of its input."""

    def step() -> None:
        out = model(x)
        out.backward(torch.ones_like(out))
        model.zero_grad()
        x.grad = None

    return step


def step_lines(rounds: int) -> list[str]:
    """Time a layer's forward and backward pass in each form, in turn."""
    rows = []
    for shape, (d_in, d_out, tokens) in SHAPES.items():
        for r in (8, 64):
            x = torch.randn(1, tokens, d_in, requires_grad=True)
            layer = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
            models = {form: formed(copy.deepcopy(layer), form, ["0"], r) for form in (PLAIN, WHOLE, DIFFERENCES)}
            for model in models.values():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data += 1e-3
            seconds = cpu_seconds({form: stepper(model, x) for form, model in models.items()}, rounds)
            row = [shape, str(r), f"{1e3 * seconds[PLAIN].median:.1f}"]
            row += [f"{paired_ratio(seconds, form, PLAIN):.3f}" for form in (WHOLE, DIFFERENCES)]
            kept = {form: kept_bytes(model, x) for form, model in models.items()}
            row += [f"{kept[form] / kept[PLAIN]:.3f}" for form in (WHOLE, DIFFERENCES)]
            rows.append(row)
    titles = ["d_in x d_out", "r", "plain, ms", "time: whole", "time: differences", "kept: whole", "kept: differences"]
    return table(titles, rows)


def main() -> None:
    """Measure, and write the page."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdecimal() else ROUNDS
    torch.set_num_threads(1)
    rows = []
    for form in (PLAIN, WHOLE, DIFFERENCES):
        row = [form]
        for dtype in (torch.float32, torch.bfloat16):
            model, loss, lost = trained(form, dtype)
            row += [f"{loss:.4f}", f"{lost:.3f}"]
            if dtype == torch.float32:
                row.append(f"{lost_in_cast(model):.4f}")
        rows.append(row)
    titles = ["what trains", "loss, float32", "lost, float32", "lost in a cast", "loss, bfloat16", "lost, bfloat16"]
    lines = ["## Training and casts", ""]
    lines += paragraph(
        "A Llama of two layers (hidden size 64, random weights), PiSSA's start of rank 8 in every linear layer, "
        f"{STEPS} steps of AdamW at {RATE:g} on sequences that repeat themselves. Loss: mean of the last ten steps. "
        "Lost: the share of the single numbers' updates that changed nothing, because the number's last digit is "
        "coarser than the update. Lost in a cast: the share of what training changed in the logits that goes when the "
        "adapter of the float32 run is rounded to bfloat16."
    )
    lines += ["", *table(titles, rows), "", "## Time and memory", ""]
    lines += paragraph(
        f"Forward and backward pass of one layer, with the gradient of its input, {rounds} interleaved rounds: CPU "
        "time, whose ratios to plain LoRA are medians over the rounds. Kept: bytes kept for the backward pass, "
        "parameters left out. The form with whole factors has a backward pass of its own, written out, which takes no "
        "second derivative and reads its factors past their modules; the differences are torch's own operations."
    )
    lines += ["", *step_lines(rounds)]
    write("differences", "Anchored layers: whole factors, or differences to the start", lines)


if __name__ == "__main__":
    main()
