"""A few steps of GRPO on SmolLM2 from several starts, by TRL's own trainer: what a run there needs, and that it works.

``python -m bench.grpo --out runs/grpo``; cut off, the same command goes on with the starts that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import headstart as hs
from bench.harness import paragraph, table, write
from headstart.files import write_json
from headstart.tasks.registry import parse_task
from headstart.tasks.rows import read
from headstart.training.models import resolve_model

STARTS = ("lora", "rlpo", "olora-tail", "pissa")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
STEPS, PROMPTS, GENERATIONS, TOKENS = 5, 2, 4, 48
RATE, BETA, RANK, ALPHA, SEED = 1e-4, 0.04, 8, 16, 0
WORDS = "Give the answer as a number after ####."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FORM = re.compile(r"\s*(?:####\s*)?\$?-?\d")


def right(completions: Sequence[str], reference: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the last number of a completion is the reference, else 0."""
    numbers = [_NUMBER.findall(completion) for completion in completions]
    return [
        float(bool(own) and float(own[-1].replace(",", "")) == float(answer.replace(",", "")))
        for own, answer in zip(numbers, reference, strict=True)
    ]


def form(completions: Sequence[str], **_: Any) -> list[float]:
    """Return 0.2 where a completion begins with a number, "####" before it or not, else 0."""
    return [0.2 * bool(_FORM.match(completion)) for completion in completions]


def prompts(count: int) -> Dataset:
    """Return the first training problems of GSM8K as prompts with the answers to grade by."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]]
    answers = [str(example.reference) for example in read(parse_task("gsm8k"), DATA, limit=count).examples]
    texts = [f"Question: {row['question'].strip()}\n{WORDS}\nAnswer:" for row in rows]
    pairs = zip(texts, answers, strict=True)
    return Dataset.from_list([{"prompt": text, "reference": answer} for text, answer in pairs])


def settings(folder: Path, **changes: Any) -> GRPOConfig:
    """Return the trainer's settings."""
    return GRPOConfig(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": PROMPTS * GENERATIONS,
            "num_generations": GENERATIONS,
            "max_completion_length": TOKENS,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "beta": BETA,
            "seed": SEED,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        | changes
    )


def run(method: str, folder: Path) -> dict[str, Any]:
    """Train from one start; return what each step logged, and how the start and the reference compare to the base."""
    base, tokenizer, _ = resolve_model("smollm2", progress=False)
    data = prompts(STEPS * PROMPTS)
    ids = tokenizer(data[0]["prompt"], return_tensors="pt")["input_ids"]
    of_base = _logits(base, ids)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        base,
        reward_funcs=[right, form],
        args=settings(folder),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
    )
    report = hs.initialize_(trainer.model, method, seed=SEED, progress=False)
    at_start = _logits(trainer.model, ids)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    with trainer.model.disable_adapter():
        reference = _logits(trainer.model, ids)
    return {
        "method": method,
        "form": report.form,
        "trainable": report.trainable,
        "seconds": seconds,
        "start_is_base": bool(torch.equal(at_start, of_base)),
        "reference_is_base": bool(torch.equal(reference, of_base)),
        "moved": float((_logits(trainer.model, ids) - of_base).abs().max()),
        "steps": [log for log in trainer.state.log_history if "grad_norm" in log],
    }


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=ids).logits.clone()


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grpo"), help="folder of what was run")
    out = parser.parse_args().out
    results = []
    for method in STARTS:
        path = out / f"{method}.json"
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_json(run(method, out / method), path)
        results.append(json.loads(path.read_text(encoding="utf-8")))
    write("grpo", "A few steps of GRPO", page(results))


def page(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the page, all numbers from the runs."""
    rows = [
        [
            f"`{result['method']}`" if step is result["steps"][0] else "",
            str(step["step"]),
            f"{step['reward']:.3f}",
            f"{step['rewards/right/mean']:.3f}",
            f"{step['kl']:.4f}",
            f"{step['frac_reward_zero_std']:.1f}",
            f"{step['grad_norm']:.3g}",
            f"{step['completions/mean_length']:.0f}",
        ]
        for result in results
        for step in result["steps"]
    ]
    whole = [
        [
            f"`{result['method']}`",
            result["form"],
            f"{result['trainable']:,}",
            "yes" if result["start_is_base"] else "no",
            "yes" if result["reference_is_base"] else "no",
            f"{result['moved']:.2g}",
            f"{result['seconds']:.0f}",
        ]
        for result in results
    ]
    first = {(steps[0]["reward"], steps[0]["completions/mean_length"]) for steps in (run["steps"] for run in results)}
    alike = (
        "the same seed draws the same completions in the first step" if len(first) == 1 else "their first steps differ"
    )
    exact = all(
        result["start_is_base"] and result["reference_is_base"] and result["steps"][0]["kl"] == 0 for result in results
    )
    return [
        *paragraph(
            f"TRL {version('trl')}'s `GRPOTrainer` on SmolLM2-135M with `peft_config=` (rank {RANK}, alpha {ALPHA}, "
            "all linear layers); then `hs.initialize_(trainer.model, METHOD)`; then `trainer.train()`: "
            f"{STEPS} steps of {PROMPTS} prompts (GSM8K's first {STEPS * PROMPTS} training problems, each followed by "
            f'"{WORDS}") with {GENERATIONS} completions of at most {TOKENS} tokens each, drawn at temperature 1. '
            f"AdamW at {RATE:g}, constant, without warm-up; beta {BETA:g}; one update a batch; gradients clipped at "
            f"norm 1; seed {SEED}; all else TRL's defaults. Reward: 1 where the completion's last number is the "
            "answer, and 0.2 where the completion begins with a number, after `####` or not. The reference is the "
            "model with its adapter off."
        ),
        "",
        *table(["start", "step", "reward", "of it right", "KL", "without advantage", "gradient norm", "tokens"], rows),
        "",
        *paragraph(
            "Reward, KL (as TRL estimates it) and tokens are means over the step's completions; the gradient's norm is "
            "that before clipping. Where all completions of a prompt have the same reward they have no advantage "
            "(the share of such prompts is given), and only the KL term moves the model: so the small gradients. A "
            "step's figures are those of the model before its update. The machine was busy with other things, so that "
            "the seconds below compare nothing."
        ),
        "",
        *table(
            [
                "start",
                "form",
                "trainable",
                "logits at the start are the base's, bit for bit",
                "the reference's after training, too",
                "largest change of a logit by then",
                "seconds",
            ],
            whole,
        ),
        "",
        *paragraph(
            "- **It works.** "
            + (
                f"All four begin at the base model's own logits, so that {alike} and the first KL is zero, and after "
                "training the reference is still the untouched base, to the last bit: nothing was subtracted from it."
                if exact
                else "But not all begin at the base model's own logits, at a KL of zero, and keep it for reference."
            )
        ),
        *paragraph(
            f"- **It does not say which start is better.** {STEPS * PROMPTS * GENERATIONS} completions a start, one "
            "seed, one rate for all: differences in reward are those of the draws."
        ),
        *paragraph(
            "- **Nor whether one collapses.** Starts with singular values in their factors are reported to, in long "
            "runs at one rate for all (arXiv 2512.23165; why: arXiv 2606.31813). So few steps neither show that nor "
            "speak against it. What they show is how far each start's first updates go at one and the same rate, by "
            "gradient norm, KL and the largest change of a logit."
        ),
    ]


if __name__ == "__main__":
    main()
