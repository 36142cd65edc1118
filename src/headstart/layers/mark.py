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

SENTENCE = "headstart: load with headstart.load_checkpoint, or make a plain LoRA with headstart.save_lora"
PLAIN = "plain"
_REST = "*"


def make_mark(forms: Mapping[str, str]) -> str:
    """Return the mark of an adapter whose layers have these forms, by name: the usual one, and who differs."""
    usual = Counter(forms.values()).most_common(1)[0][0]
    others = {name: form for name, form in sorted(forms.items()) if form != usual}
    return f"{SENTENCE} {json.dumps({_REST: usual, **others})}"


def is_mark(value: object) -> bool:
    """Return whether a config's ``init_lora_weights`` is a mark."""
    return isinstance(value, str) and value.startswith(SENTENCE)


def marked_form(value: object, layer: str) -> str | None:
    """Return the form that a mark gives a layer, None for a plain one, or where the mark doesn't say.

    Earlier versions wrote the sentence alone: there the tensors say which form a layer has.
    """
    if not isinstance(value, str) or not is_mark(value):
        return None
    try:
        forms = json.loads(value.removeprefix(SENTENCE) or "{}")
        form = forms.get(layer, forms.get(_REST))
    except (json.JSONDecodeError, AttributeError):
        return None
    return None if form == PLAIN else form
