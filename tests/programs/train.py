"""A training script as users write them: a Trainer that saves, and goes on from its last save when started again.

    python train.py FOLDER SETTINGS

trains one adapter after another in FOLDER (see ``FORMS``), with as many processes as it is started with, and prints a
line a step; SETTINGS is a JSON object with what :func:`run` takes. The tests start it, kill it, and call its functions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import headstart as hs
from conftest import tiny_llama, token_batch, wrap

# One method for each form that a layer can have: anchored, core, and a start that is kept.
FORMS = {"anchored": "pissa", "core": "lora-xs:std=0.01", "kept": "lora-one:samples=8"}


class Rows(torch.utils.data.Dataset):
    """64 rows of token ids, of different lengths."""

    def __init__(self):
        batches = [token_batch(4, 12, seed=seed) for seed in range(16)]
        self.rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(4)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Announce(TrainerCallback):
    """Prints a line a step, for whoever watches."""

    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)


def prepare(form: str, **changes):
    """A tiny Llama with an adapter of this form, started from seed 0."""
    model = wrap(tiny_llama(), **changes)
    initialize(model, form)
    return model


def initialize(model, form: str) -> None:
    """Start the adapter of a wrapped model."""
    data = [token_batch(4, 12, seed=seed) for seed in range(2)] if form == "kept" else None
    hs.initialize_(model, FORMS[form], data=data, progress=False)


def train(model, folder: Path, *, steps: int, batch_size: int, callbacks=None, **changes) -> Trainer:
    """Train, going on from the last whole save in ``folder``."""
    settings = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        use_cpu=True,
    )
    arguments = TrainingArguments(**(settings | changes))
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last_save(folder))
    return trainer


def last_save(folder: Path) -> str | None:
    """The last save that the Trainer finished: it writes its state last. A killed one may lack files."""
    saves = {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob("checkpoint-*")}
    whole = [step for step, path in saves.items() if _is_json(path / "trainer_state.json")]
    return str(saves[max(whole)]) if whole else None


def _is_json(path: Path) -> bool:
    """Whether the file is there to its end: the Trainer writes it in place, and a kill may leave it empty."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def losses(trainer: Trainer) -> dict[int, float]:
    """The loss of each step, those before a cut included."""
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def factors(model) -> dict[str, torch.Tensor]:
    """Everything that belongs to the adapter, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def run(form: str, folder: Path, *, steps: int, batch_size: int, dropout: float = 0.0, callbacks=None, **changes):
    """Train one form in ``folder``; afterwards it holds the losses and, of each process, the factors."""
    trainer = train(
        prepare(form, lora_dropout=dropout),
        folder,
        steps=steps,
        batch_size=batch_size,
        callbacks=callbacks,
        **changes,
    )
    save_file(factors(trainer.model), folder / f"factors-{trainer.args.process_index}.safetensors")
    if trainer.args.process_index == 0:
        unfinished = folder / "losses.partial"
        unfinished.write_text(json.dumps(losses(trainer)))
        unfinished.rename(folder / "losses.json")


def main(folder: Path, settings: dict) -> None:
    """Train every form that isn't done yet."""
    torch.set_num_threads(1)
    for form in FORMS:
        place = folder / form
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "losses.json").is_file():
            run(form, place, callbacks=[Announce()], **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
