"""Random matrices by the names that the papers use."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal[
    "kaiming-normal",
    "kaiming-uniform",
    "xavier-normal",
    "xavier-uniform",
    "normal",
    "uniform",
    "orthogonal",
    "sparse",
    "constant",
]


def empty(rows: int, columns: int) -> Tensor:
    """Return an unset matrix, float32 on the CPU whatever torch's defaults are, to be filled from a CPU generator."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


def draw(
    shape: tuple[int, int], distribution: Literal["normal", "uniform"], std: float, generator: torch.Generator
) -> Tensor:
    """Return a zero-mean matrix (rows, columns) of standard deviation ``std``, float32 on the CPU."""
    matrix = empty(*shape)
    if distribution == "uniform":
        bound = math.sqrt(3) * std
        return matrix.uniform_(-bound, bound, generator=generator)
    return matrix.normal_(0.0, std, generator=generator)


def draw_named(shape: tuple[int, int], distribution: Distribution, generator: torch.Generator) -> Tensor:
    """Return a matrix (fan_out, fan_in) drawn as IniLoRA's Figure 4 names it, with PyTorch's defaults.

    kaiming: gain sqrt(2), fan-in. xavier: gain 1. normal: standard deviation 0.01. uniform: -0.1 to 0.1.
    sparse: half of each column zero, the rest normal with standard deviation 0.01. constant: 0.001.
    """
    matrix = empty(*shape)
    init = torch.nn.init
    if distribution == "kaiming-normal":
        return init.kaiming_normal_(matrix, generator=generator)
    if distribution == "kaiming-uniform":
        return init.kaiming_uniform_(matrix, generator=generator)
    if distribution == "xavier-normal":
        return init.xavier_normal_(matrix, generator=generator)
    if distribution == "xavier-uniform":
        return init.xavier_uniform_(matrix, generator=generator)
    if distribution == "normal":
        return matrix.normal_(0.0, 0.01, generator=generator)
    if distribution == "uniform":
        return matrix.uniform_(-0.1, 0.1, generator=generator)
    if distribution == "orthogonal":
        return init.orthogonal_(matrix, generator=generator)
    if distribution == "sparse":
        matrix.normal_(0.0, 0.01, generator=generator)
        order = empty(*shape).uniform_(generator=generator).argsort(dim=0)
        # torch.nn.init.sparse_ takes no generator for the places of the zeros, and rounds half of an odd number up: of
        # a single row (r = 1) it leaves nothing.
        return matrix.masked_fill_(order < shape[0] // 2, 0.0)
    return matrix.fill_(0.001)
