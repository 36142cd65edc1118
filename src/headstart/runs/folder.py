"""What a run keeps in its folder, so that it goes on where it was: settings, adapters, and the trainer's saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict

from headstart.allocate import take_ranks
from headstart.errors import CheckpointError, RunError
from headstart.files import write_json
from headstart.layers.checkpoint import load_checkpoint, save_checkpoint
from headstart.layers.export import save_lora
from headstart.methods import parse_method
from headstart.processes import Processes, is_sharded, together
from headstart.runs.result import FILE, Result, read_result, write_result
from headstart.runs.tree import Run
from headstart.settings import differing

SETTINGS, START, TRAINED, SAVES = "run.json", "start", "trained", "trainer"
ITEMS, LOSSES, CHECKPOINT = "items.json", "losses.json", "checkpoint"


def claim(run: Run, folder: Path) -> None:
    """Note whose the folder is, or check that it is this run's."""
    other = noted_run(folder)
    if other is not None:
        if other.key != run.key:
            changed = ", ".join(changed_settings(run, other))
            raise RunError(f"{folder} holds a run with other settings ({changed}): give another --out.")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and holds no run: give another --out.")
    write_json({"key": run.key, "settings": run.model_dump(mode="json")}, folder / SETTINGS)


def noted_run(folder: Path) -> Run | None:
    """Return the run that a folder is for; None where it is for none.

    Raises:
        CheckpointError: its file of settings is damaged, or another release's.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return Run.model_validate(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged, or another release's: remove it, or give another --out.") from error


def changed_settings(run: Run, other: Run) -> list[str]:
    """Return the dotted keys by which two runs differ."""
    return sorted(differing(run.model_dump(mode="json"), other.model_dump(mode="json")))


def save_trained(trainer: Any, tokenizer: Any, run: Run, place: Path, result: Result) -> None:
    """Save what was trained: of a sharded model every process gathers, and one writes, for which the others wait."""
    model, main, processes = trainer.model, trainer.is_world_process_zero(), Processes.joined()
    lora = run.trains in ("adapter", "lora-fa") and run.adapter.kind == "lora"
    state = None if lora else trainer.accelerator.get_state_dict(model)
    if lora and (main or is_sharded(model)):
        keep(model, run, place / CHECKPOINT)
        save_lora(model, place / "adapter", force=True)
    with together(processes):
        if not main:
            return
        if run.trains not in ("adapter", "lora-fa"):
            model.save_pretrained(place / "model", state_dict=state)
            tokenizer.save_pretrained(place / "model")
        elif not lora:
            for name in (CHECKPOINT, "adapter"):
                model.save_pretrained(place / name, state_dict=state)
        result.file_size = _saved_bytes(place)
        write_result(result, place)


def _saved_bytes(trained: Path) -> int:
    """Return the size of the adapter, or the model, that another program loads."""
    places = [trained / "adapter", trained / "model"]
    return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))


def keep(model: Any, run: Run, place: Path) -> None:
    """Save an adapter to go on from; VeRA's are plain tensors, for which PEFT's own way is enough."""
    if run.adapter.kind == "lora":
        save_checkpoint(model, place, force=True)
    else:
        model.save_pretrained(place)


def take(model: Any, run: Run, place: Path) -> None:
    """Give the model's adapter what was kept."""
    if run.adapter.kind == "lora":
        if any(method.shares_ranks for method in parse_method(run.start.method).methods):
            take_ranks(model, place)
        load_checkpoint(model, place)
        return
    device = next(model.parameters()).device
    set_peft_model_state_dict(model, load_peft_weights(str(place), device=str(device)))


def take_trained(model: Any, run: Run, place: Path) -> None:
    """Give the model what ``save_trained`` wrote."""
    if run.trains in ("adapter", "lora-fa"):
        take(model, run, place / CHECKPOINT)
        return
    # By Transformers, which saves some models (mixtures) under other names than their parameters have.
    place /= "model"
    saved, said = type(model).from_pretrained(place, dtype=model.dtype, output_loading_info=True)
    if wrong := sorted(name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in said[kind]):
        raise CheckpointError(f"{place} doesn't hold the model that was trained ({wrong[0]}): remove {place.parent}.")
    model.load_state_dict(saved.state_dict())


def check_count(folder: Path, count: int) -> None:
    """Raise RunError where training would go on in another number of processes: its steps would see other batches."""
    begun = read_result(folder / START)
    if begun is None or begun.processes == count or (folder / TRAINED / FILE).is_file():
        return
    if last_save(folder / SAVES) is not None:
        raise RunError(
            f"{folder} was trained so far by a number of {begun.processes} processes, and a step of {count} would see "
            f"other samples: go on with {begun.processes}, or give another --out."
        )


def last_save(output: Path) -> str | None:
    """Return the last whole save to go on from: the Trainer writes its state last, and a kill may leave half of it.

    That of the last step is none: the Trainer would make another step from it.
    """
    saves = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in saves:
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if state["global_step"] < state["max_steps"]:
            return str(path)
    return None
