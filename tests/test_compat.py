"""Private names of others: each is there; where one has changed, a warning says what is lost, and the rest works."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer

import headstart as hs
from conftest import logits, started, tiny_llama, tiny_mixtral, wrap
from headstart import compat


@pytest.mark.parametrize("step", compat.STEPS, ids=lambda step: step.path)
def test_every_step_is_as_it_is_known(step):
    holder, name, there = compat.find(step)
    function = getattr(there, "__func__", there)
    assert getattr(holder, name) and function.extended_by_headstart
    assert step.without.endswith(".")


@pytest.mark.parametrize("name", compat.READ)
def test_every_name_that_is_read_is_there(name):
    holder, _, attribute = name.partition(".")
    layer = next(module for module in wrap(tiny_llama()).modules() if isinstance(module, lora_layer.LoraLayer))
    assert isinstance(layer, (lora_layer.LoraLayer, BaseTunerLayer))
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    wrapper = next(
        module
        for module in get_peft_model(tiny_mixtral(), config).modules()
        if isinstance(module, lora_layer.ParamWrapper)
    )
    holders = {
        "LoraLayer": layer,
        "BaseTunerLayer": layer,
        "ParamWrapper": wrapper,
        "PreTrainedConfig": tiny_llama().config,
        "Trainer": Trainer,
    }
    assert hasattr(holders[holder], attribute)
    assert compat.lora_variant() is lora_layer.LoraVariant


# In a process of its own: PEFT is changed before headstart is imported.
PROGRAM = """
import sys, warnings
import peft, torch
import peft.tuners.lora.layer, peft.tuners.lora.model, peft.utils.hotswap
from peft import LoraConfig, PeftModel, get_peft_model
{change}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import headstart as hs
    from headstart.errors import HeadstartWarning
sentences = [str(each.message) for each in caught if issubclass(each.category, HeadstartWarning)]
sys.path.insert(0, {tests!r})
from conftest import tiny_llama, token_batch, wrap, logits
{program}
"""

PLAIN = """
plain = wrap(tiny_llama(), init_lora_weights=False)
plain.save_pretrained({folder!r})
again = PeftModel.from_pretrained(tiny_llama(), {folder!r})
assert torch.equal(logits(again, token_batch()), logits(plain, token_batch()))
model = wrap(tiny_llama())
hs.initialize_(model, "pissa", progress=False)
hs.save_checkpoint(model, {folder!r} + "/start")
again = hs.load_checkpoint(tiny_llama(), {folder!r} + "/start")
assert torch.equal(logits(again, token_batch()), logits(model, token_batch()))
"""


def run(change, program, folder, tests, fresh):
    text = PROGRAM.format(change=change, tests=str(tests), program=program.replace("{folder!r}", repr(str(folder))))
    fresh.run(text)


def test_changed_steps_warn_and_leave_the_rest_alone(tmp_path, request, fresh):
    """All four at once: two are gone, and two have other arguments."""
    change = """
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
LoraLayer.reset_anew = LoraLayer.reset_lora_parameters
def reset(self, name, how):
    return self.reset_anew(name, how)
LoraLayer.reset_lora_parameters = reset
LoraModel.renamed_check = LoraModel._check_add_weighted_adapter
del LoraModel._check_add_weighted_adapter
loading = LoraModel.__dict__["_remap_adapter_state_dict_for_load"].__func__
def changed(cls, **given):
    return loading(cls, **given)
LoraModel._remap_adapter_state_dict_for_load = classmethod(changed)
del peft.utils.hotswap.hotswap_adapter_from_state_dict
"""
    program = (
        """
assert len(sentences) == 4, sentences
for part in ("can't add or load", "doesn't check the form", "add_weighted_adapter isn't", "hotswap_adapter isn't"):
    assert any(part in each for each in sentences), (part, sentences)
"""
        + PLAIN
        + """
try:
    PeftModel.from_pretrained(tiny_llama(), {folder!r} + "/start")
except ValueError as error:
    assert "headstart.load_checkpoint" in str(error)
else:
    raise SystemExit("anchors were dropped in silence")
"""
    )
    run(change, program, tmp_path / "a", request.path.parent, fresh)


def test_extending_twice_is_extending_once():
    holder, name, there = compat.find(compat.COMBINING)
    assert compat.extend(compat.COMBINING, lambda arguments: pytest.fail("twice"))
    assert compat.find(compat.COMBINING) == (holder, name, there)


def test_arguments_can_be_given_in_any_way(batch):
    """By place or by name, as PEFT's callers do."""
    model = started(tiny_llama(), "pissa")
    with pytest.raises(hs.LayerError, match="PEFT combines B A alone"):
        model.base_model._check_add_weighted_adapter(["default"], "linear", None)
    with pytest.raises(hs.LayerError, match="PEFT combines B A alone"):
        model.base_model._check_add_weighted_adapter(adapters=["default"], combination_type="linear", svd_rank=None)
    assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
