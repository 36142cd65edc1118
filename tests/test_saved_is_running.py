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
# A core that is not so large that outputs are small differences of large parts, which rounding would rule.
FORMS = {
    "kept": ("init-ab-plus", {}),
    "anchored": ("pissa", {}),
    "residual": ("pissa", {"form": "residual"}),
    "core": ("lora-xs:std=0.25", {}),
}
CASTS = ("none", "double", "bfloat16 factors", "bfloat16 model")
# Casts of the whole model, made after training; the other one is made before it, and of the factors alone.
WHOLE = {"double": torch.float64, "bfloat16 model": torch.bfloat16}
# Of the running model beside exact arithmetic on its numbers: twice the most over all combinations, and in double none.
RUNNING = {"none": 6e-7, "double": 1e-14, "bfloat16 factors": 1.5e-2, "bfloat16 model": 2.3e-2}
WAYS = ("save_lora", "rank", "uniform", "save_checkpoint", "save_pretrained", "merge_and_unload")


def inputs():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def exact(model):
    """The model's output in float64, on the numbers that it holds."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(inputs().double())


def dtype_of(cast):
    return WHOLE.get(cast, torch.float32)


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
    return model.to(WHOLE[cast]) if cast in WHOLE else model, inside


def rounded(cast, form, way):
    """Whether something that differs between the file and the model is rounded to bfloat16."""
    if cast == "bfloat16 model":
        # A merged weight is, as the base model's are, and a residual one, which the file's reader makes anew.
        return way == "merge_and_unload" or form == "residual"
    # PEFT's own product of the factors is in their dtype; what anchored and core layers merge is in float32.
    return cast == "bfloat16 factors" and way == "merge_and_unload" and form in ("kept", "residual")


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


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(list(WRAPPERS)), st.sampled_from(COMBINATIONS), st.booleans())
def test_what_is_saved_is_what_runs(tmp_path_factory, wrapper, combination, use_rslora):
    cast, form = combination
    model, inside = run(wrapper, cast, form, use_rslora)
    factors = torch.bfloat16 if cast == "bfloat16 factors" else dtype_of(cast)
    assert {parameter.dtype for parameter in inside.parameters() if parameter.requires_grad} == {factors}
    with torch.no_grad():
        running = model(inputs().to(dtype_of(cast))).double()
    wanted, change = exact(inside), exact(inside) - exact(Net().to(dtype_of(cast)))
    assert change.norm() > 0.01 * wanted.norm()
    assert (running - wanted).norm() <= RUNNING[cast] * wanted.norm()
    for way in WAYS:
        loaded = reloaded(model, inside, cast, way, tmp_path_factory.mktemp("saved") / "a")
        # Else there are products and a residual weight that were rounded in float32; what rounds to bfloat16 does so
        # once.
        tolerance = 2 * torch.finfo(torch.bfloat16).eps if rounded(cast, form, way) else 1e-6
        assert (exact(loaded) - wanted).norm() <= tolerance * wanted.norm(), way
