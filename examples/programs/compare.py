"""Compare a program's first logits with headstart's own: ``python compare.py RECORDED.safetensors BASE START``.

START is a folder that ``headstart init`` wrote; the last line also says how far the base model itself is.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import headstart as hs


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((first - second).norm() / second.norm())


@torch.no_grad()
def main(recorded: str, base: str, start: str) -> None:
    """Print the two distances; exit with 1 where the program's logits are not the start's."""
    batch = {name: tensor if tensor.ndim else tensor.item() for name, tensor in load_file(recorded).items()}
    logits = batch.pop("logits")
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    apart = distance(logits, bare(**batch).logits)
    own = distance(logits, hs.load_checkpoint(bare, start).eval()(**batch).logits)
    print(f"logits at the first step: {own:.1e} from headstart's start, {apart:.1e} from the base model")
    if own > 1e-5:
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
