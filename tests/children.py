"""Processes that a test forks, with one thread each: begun, waited for, killed."""

from __future__ import annotations

import multiprocessing

import torch


def forked(work, *arguments):
    """Begin ``work`` in a process of its own, which ends with this one at the latest."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(work, *arguments), daemon=True)
    process.start()
    return process


def _alone(work, *arguments):
    torch.set_num_threads(1)
    work(*arguments)


def ended(process):
    """Wait for a process; return its exit code, negative for a signal, or None after five minutes."""
    process.join(300)
    return process.exitcode


def killed(process):
    """Kill a process and wait for its end; return its exit code."""
    process.kill()
    return ended(process)
