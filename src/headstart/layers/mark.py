"""What an adapter's config says of its layers' forms, where PEFT keeps how factors are drawn.

PEFT's own loading code builds every layer before it reads the weights, and stops at a value of ``init_lora_weights``
that it does not know. So a program that never imported headstart says so, in the words of :data:`SENTENCE`, and does
not drop anchors silently. In one that did, the rest of the value says which form each layer has, so that PEFT builds
layers of that form from the config alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headstart.names import in_base

SENTENCE = "headstart: load with headstart.load_checkpoint, or make a plain LoRA with headstart.save_lora"
PLAIN = "plain"
_REST = "*"
_STACKS = "#"


@dataclass(frozen=True)
class StackOf:
    """What is known of a layer whose parameter stacks matrices: how many, and the parameter's name."""

    experts: int
    parameter: str


def key_of(name: str, stack: StackOf | None) -> str:
    """Return the name by which PEFT's patterns know a layer: with its parameter's, and without what is around it."""
    return name if stack is None else f"{in_base(name)}.{stack.parameter}"


def matrix_names(name: str, stack: StackOf | None) -> list[str]:
    """Return what the matrices of a layer are called: a parameter's as those of separate layers would be.

    Several are ``mlp.experts.3.gate_up_proj``; a single one has the parameter's name, and a ``weight`` its module's.
    """
    if stack is None:
        return [name]
    if stack.experts > 1:
        return [f"{in_base(name)}.{expert}.{stack.parameter}" for expert in range(stack.experts)]
    return [in_base(name) if stack.parameter == "weight" else key_of(name, stack)]


def make_mark(forms: Mapping[str, str], stacks: Mapping[str, StackOf] | None = None) -> str:
    """Return the mark of an adapter whose layers have these forms, by name: the usual one, and who differs.

    Of layers whose parameters stack matrices it says how many and what the parameters are called, which their tensors
    don't tell.
    """
    usual = Counter(forms.values()).most_common(1)[0][0]
    others = {name: form for name, form in sorted(forms.items()) if form != usual}
    told = {name: [stack.experts, stack.parameter] for name, stack in sorted((stacks or {}).items())}
    return f"{SENTENCE} {json.dumps({_REST: usual, **others, **({_STACKS: told} if told else {})})}"


def is_mark(value: object) -> bool:
    """Return whether a config's ``init_lora_weights`` is a mark."""
    return isinstance(value, str) and value.startswith(SENTENCE)


def marked_form(value: object, layer: str) -> str | None:
    """Return the form that a mark gives a layer, None for a plain one, or where the mark doesn't say.

    Earlier versions wrote the sentence alone: there the tensors say which form a layer has, as they do for a layer
    whose name PEFT doesn't tell ("", of a convolution or an embedding) where others have another form.
    """
    forms = _read(value)
    if not layer and len({form for form in forms.values() if isinstance(form, str)}) > 1:
        return None
    form = forms.get(layer, forms.get(_REST))
    return form if isinstance(form, str) and form != PLAIN else None


def marked_form_of(value: object, parameter: str) -> str | None:
    """Return the form that a mark gives all layers of parameters of this name; None for plain, or several, forms."""
    names = [name for name, stack in marked_stacks(value).items() if stack.parameter == parameter]
    forms = {marked_form(value, name) for name in names}
    return forms.pop() if len(forms) == 1 else None


def marked_stacks(value: object) -> dict[str, StackOf]:
    """Return what a mark says of layers whose parameters stack matrices, by name."""
    told = _read(value).get(_STACKS, {})
    return {name: StackOf(int(experts), str(parameter)) for name, (experts, parameter) in told.items()}


def _read(value: object) -> dict[str, Any]:
    if not isinstance(value, str) or not is_mark(value):
        return {}
    try:
        content = json.loads(value.removeprefix(SENTENCE) or "{}")
    except json.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}
