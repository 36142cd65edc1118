"""Factors that follow from their key, and how to fetch and age them, for the tests of the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time

import torch

from headstart.cache import FactorCache
from headstart.cache.eviction import entry_path
from headstart.cache.factors import pack, unpack
from headstart.methods.base import Factors, Layer, Moments
from headstart.store.entries import decode, encode


def key_of(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def factors_of(key, r=2, d_out=5, d_in=7):
    """Factors in which everything depends on the key, with values that a text format would lose."""
    number = int(key[:12], 16)
    generator = torch.Generator().manual_seed(number)
    A = torch.randn(r, d_in, generator=generator)
    A.view(-1)[:3] = torch.tensor([float("nan"), -0.0, 1e-45])
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    core = torch.randn(r, r, generator=generator).bfloat16() if number % 2 else None
    info = {"error": 0.1 * number, "steps": number, "bound": float("inf")}
    return Factors(
        A,
        B,
        core,
        info=info,
        note="a note: é",
        repair=f"repair {number}",
        caution=f"caution {number}",
        frozen=("lora_A",) if number % 2 else (),
        history=((0, 0.1 * number), (100, 1e-300)),
        spare=torch.randn(1, d_in, generator=generator) if number % 5 else None,
        worth=(0.1 * number, 1e-300),
        keeps="alpha" if number % 3 else "scaling",
    )


def encoded(key, factors, about=None):
    """The content of the file that holds factors."""
    return encode(key, *pack(factors, about or {}))


def decoded(key, content):
    return unpack(decode(key, content))


def bits(tensor):
    return (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).tolist())


def content(factors):
    """Everything in factors, comparable to the last bit."""
    values = [getattr(factors, field.name) for field in dataclasses.fields(factors)]
    values = [tuple(value) if isinstance(value, list) else value for value in values]
    return [bits(value) if isinstance(value, torch.Tensor) else value for value in values]


class Maker:
    """What computes factors, and remembers what it was asked for."""

    def __init__(self, keys, make=factors_of):
        self.keys, self.make, self.calls = list(keys), make, []

    def __call__(self, positions):
        self.calls.append([self.keys[position] for position in positions])
        return [self.make(self.keys[position]) for position in positions]

    @property
    def asked(self):
        return [key for call in self.calls for key in call]


def fetch(folder, keys, *, limit=2**40, make=factors_of, **options):
    """Fetch from a fresh store; return the factors' contents, the keys that were computed, and the warnings."""
    sentences = []
    maker = Maker(keys, make)
    store = FactorCache(folder, limit, sentences.append)
    found = store.fetch(keys, maker, **options)
    assert store.computed == len(maker.asked)
    assert store.computed + store.served == len(set(keys))
    return [content(each) for each in found], maker.asked, sentences


def contents(keys, make=factors_of):
    return [content(make(key)) for key in keys]


def known(**changes):
    """A small layer of which shapes, settings and moments are known, for keys and descriptions."""
    fields = dict(name="q", d_out=6, d_in=5, r=2, scaling=2.0, seed=0, moments=Moments(0.0, 0.02))
    return Layer(**(fields | changes))


def age(folder, key, seconds):
    """Let an entry have been used last so many seconds ago."""
    then = time.time() - seconds
    os.utime(entry_path(folder, key), (then, then))
