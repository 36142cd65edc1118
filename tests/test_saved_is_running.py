"""The file is the model: over wrappers, casts, forms and ways to save, what was saved computes what runs."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import headstart as hs
from test_wrappers import compiled_base, eager

pytestmark = pytest.mark.usefixtures("process_group")


class Net(nn.Module):
    """Layers of several shapes, with names that end alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 20), "proj": nn.Linear(20, 12)}) for _ in range(2)
        )
        self.proj = nn.Linear(12, 7)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["proj"](block["up"](x).tanh())
        return self.proj(x)


def compiled_parts(model):
    net = model.get_base_model()
    for block in net.blocks:
        block["up"] = eager(block["up"])
    net.proj.compile(backend="eager")
    return model


WRAPPERS = {
    "none": lambda model: model,
    "compile": eager,
    "compiled base": compiled_base,
    "compiled parts": compiled_parts,
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "compile(DDP(compiled parts))": lambda model: eager(DistributedDataParallel(compiled_parts(model))),
}
FORMS = {
    "kept": ("init-ab-plus", {}),
    "anchored": ("pissa", {}),
    "residual": ("pissa", {"form": "residual"}),
    "core": ("lora-xs:std=0.5", {}),
}
CASTS = ("none", "double", "bfloat16 factors", "bfloat16 model")
WAYS = ("save_lora", "rank", "uniform", "save_checkpoint", "save_pretrained", "merge_and_unload")


def inputs():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def exact(model):
    """The model's output in float64, on the numbers that it holds."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(inputs().double())


def dtype_of(cast):
    return {"double": torch.float64, "bfloat16 model": torch.bfloat16}.get(cast, torch.float32)


def run(wrapper, cast, form, use_rslora):
    """Start, cast, wrap, train, cast: return what stands outside, and PEFT's model inside."""
    torch._dynamo.reset()
    inside = get_peft_model(
        Net(),
        LoraConfig(r=3, lora_alpha=5, target_modules=r".*(up|proj)", rank_pattern={"^proj": 2}, use_rslora=use_rslora),
    )
    method, options = FORMS[form]
    hs.initialize_(inside, method, progress=False, **options)
    if cast == "bfloat16 factors":
        for parameter in inside.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    model = WRAPPERS[wrapper](inside)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for _ in range(3):
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.to(dtype_of(cast)), inside


def reloaded(model, inside, cast, way, folder):
    """Save a model in one of the ways, and return what a fresh base model makes of it."""
    base = Net().to(dtype_of(cast))
    if way == "merge_and_unload":
        return copy.deepcopy(inside).merge_and_unload()
    if way in ("save_lora", "rank", "uniform"):
        hs.save_lora(model, folder, **{"save_lora": {}, "rank": {"rank": 50}, "uniform": {"uniform": True}}[way])
        return PeftModel.from_pretrained(base, folder)
    if way == "save_checkpoint":
        hs.save_checkpoint(model, folder)
    else:
        inside.save_pretrained(folder)
    return hs.load_checkpoint(base, folder)


COMBINATIONS = [(cast, form) for cast in CASTS for form in FORMS]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(WRAPPERS)), st.sampled_from(COMBINATIONS), st.sampled_from(WAYS), st.booleans())
def test_what_is_saved_is_what_runs(tmp_path_factory, wrapper, combination, way, use_rslora):
    cast, form = combination
    model, inside = run(wrapper, cast, form, use_rslora)
    with torch.no_grad():
        running = model(inputs().to(dtype_of(cast))).double()
    wanted, change = exact(inside), exact(inside) - exact(Net().to(dtype_of(cast)))
    assert change.norm() > 0.01 * wanted.norm()
    rounding = torch.finfo(torch.bfloat16 if "bfloat16" in cast else torch.float32).eps
    assert (running - wanted).norm() <= 10 * rounding * wanted.norm()
    loaded = reloaded(model, inside, cast, way, tmp_path_factory.mktemp("saved") / "a")
    # A merged weight is rounded as the base model's are, and so is a residual one that is cast.
    rounded = way == "merge_and_unload" or form == "residual"
    tolerance = 4 * torch.finfo(dtype_of(cast)).eps if rounded else 0
    # A residual weight was rounded once when the start was taken out of it, in float32.
    tolerance = max(tolerance, 1e-6)
    assert (exact(loaded) - wanted).norm() <= tolerance * wanted.norm()
