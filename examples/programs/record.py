"""Run a program and keep its first training batch with its logits: ``python record.py OUT.safetensors SCRIPT …``.

The program runs as it would by itself; of the first call of a Llama in training mode the tensors and the logits are
written, for ``compare.py``.
"""

from __future__ import annotations

import functools
import runpy
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

READ = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


def watch(out: str) -> None:
    """Let the first call in training write what it was given, and its logits."""
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def recorded(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            LlamaForCausalLM.forward = forward
            tensors = {name: torch.as_tensor(kwargs[name]).clone() for name in READ if kwargs.get(name) is not None}
            save_file(tensors | {"logits": output.logits.detach().float().contiguous()}, out)
        return output

    LlamaForCausalLM.forward = recorded


if __name__ == "__main__":
    out, *sys.argv = sys.argv[1:]
    watch(out)
    runpy.run_path(sys.argv[0], run_name="__main__")
