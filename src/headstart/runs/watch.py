"""Watching training: the bar, the time, the end of a loss that is no number, and what it cost between measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from headstart.progress import Show

# (losses by step, steps in all) -> why to give up, or None.
Judge = Callable[[Sequence[tuple[int, float]], int], str | None]


class Watch(TrainerCallback):
    """Shows how far training is, times it, and ends it where the loss is no number.

    Each step's row in the trainer's history, which its saves keep, gets ``step_seconds`` (without measurements and
    saves), of texts ``step_tokens``, and of CUDA ``allocated`` and ``reserved``, in bytes.

    Args:
        show: draws the bar.
        judge: called after each step with the training losses so far and the number of steps; what it returns in
            words ends training.

    Attributes:
        pruned: why a judge ended training; empty where none did.
        diverged: the step at which the loss was no number, None where it always was one.
        seconds: since training began; of a run that goes on, of its rest.
        first: the step that it went on from.
    """

    def __init__(self, show: Show, judge: Judge | None = None) -> None:
        self.pruned = ""
        self._judge = judge
        self.diverged: int | None = None
        self.first = 0
        self._show = show
        self._began = self._step_began = time.perf_counter()
        self._tokens = 0
        self._detail = ""

    @property
    def seconds(self) -> float:
        """Seconds since training began, or went on."""
        return time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the time, and the step that training goes on from."""
        self._began, self.first = time.perf_counter(), state.global_step
        self._step_began = self._began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the step."""
        self._show(f"training\t{self._detail}", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Note the loss; end training where it is no number."""
        if logs is None or "loss" not in logs:
            return
        state.log_history[-1].update(self._costs(logs))
        self._detail = f"loss {logs['loss']:.4g}, rate {logs.get('learning_rate', 0.0):.2g}"
        if not math.isfinite(float(logs["loss"])) and self.diverged is None:
            self.diverged = state.global_step
            control.should_training_stop = True
        elif self._judge is not None and not self.pruned:
            losses = [(row["step"], float(row["loss"])) for row in state.log_history if "loss" in row]
            self.pruned = self._judge(losses, state.max_steps) or ""
            control.should_training_stop = control.should_training_stop or bool(self.pruned)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the next step begin now."""
        self._step_began = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the next step begin now."""
        self._step_began = time.perf_counter()

    def _costs(self, logs: dict[str, Any]) -> dict[str, float]:
        """Return what a step took; its loss has been read, so an accelerator has done it."""
        began, self._step_began = self._step_began, time.perf_counter()
        costs: dict[str, float] = {"step_seconds": self._step_began - began}
        if "num_tokens" in logs:  # TRL's, which each process counts from its own beginning
            costs["step_tokens"], self._tokens = int(logs["num_tokens"]) - self._tokens, int(logs["num_tokens"])
        if torch.cuda.is_available():
            costs |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        return costs


def windows(history: Sequence[dict[str, Any]], samples: int) -> list[dict[str, float]]:
    """Return what training was from one held-out measurement to the next, and to the end.

    Args:
        history: a trainer's, with :class:`Watch`'s additions.
        samples: of a step, over all processes.

    Returns:
        For each: ``step``, its last; ``loss``, the mean of its steps'; ``samples``; ``seconds`` of its steps;
        ``evaluation_seconds`` of the measurement after it, where there was one; ``tokens``, of texts; and the means of
        ``allocated`` and ``reserved`` bytes, of CUDA.
    """
    rows: list[dict[str, float]] = []
    steps: list[dict[str, Any]] = []
    for row in [*history, {"eval_runtime": None}]:
        if "loss" in row:
            steps.append(row)
        elif "eval_runtime" in row and steps:
            count = len(steps)
            window = {"step": steps[-1]["step"], "loss": sum(step["loss"] for step in steps) / count}
            window |= {"samples": samples * count, "seconds": sum(step["step_seconds"] for step in steps)}
            if row["eval_runtime"] is not None:
                window["evaluation_seconds"] = row["eval_runtime"]
            if "step_tokens" in steps[-1]:
                window["tokens"] = sum(step["step_tokens"] for step in steps)
            for name in ("allocated", "reserved"):
                if name in steps[-1]:
                    window[name] = sum(step[name] for step in steps) / count
            rows.append(window)
            steps = []
    return rows


def reserved(history: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the mean and the 99th percentile, over the steps, of the bytes that CUDA's allocator had reserved."""
    steps = [row["reserved"] for row in history if "reserved" in row]
    if not steps:
        return {}
    return {"reserved_mean": int(np.mean(steps)), "reserved_99th": int(np.percentile(steps, 99))}
