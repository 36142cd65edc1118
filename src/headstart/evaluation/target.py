"""What is evaluated: a run's folder, an adapter on its base model, or a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from headstart.errors import CheckpointError, ModelError
from headstart.files import sha256
from headstart.layers.files import CONFIG, RECORD, read_json
from headstart.tasks.registry import parse_task

_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")
# What says how weights are used and texts become tokens: settings, a tokenizer's files, chat templates, programs.
_BESIDE = ("*.json", "*.jinja", "*/*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")
_SAMPLES, _SAMPLE_BYTES = 64, 1024


@dataclass(frozen=True)
class Target:
    """What is evaluated, before anything of it is loaded.

    Attributes:
        name: as it was given.
        kind: what it is.
        base: the model, as :func:`headstart.training.models.resolve_model` takes it.
        adapter: the folder of what is put on it; None where that is nothing.
        labels: how many classes a classifier's head has, 1 of a regression; 0 of a language model.
        dtype: of the weights in memory; ``bits`` below 16 load them quantised.
        revision: of the base model.
        max_length: of what a classifier or an encoder is given, in tokens.
        seed: of what a classifier's base model lacks and its adapter doesn't hold.
    """

    name: str
    kind: Literal["run", "adapter", "model"]
    base: str
    adapter: Path | None = None
    labels: int = 0
    dtype: str = "float32"
    bits: int = 16
    revision: str | None = None
    max_length: int | None = None
    seed: int = 0

    def digest(self) -> str:
        """Return a digest of local weights and of what lies beside them that says how they are used.

        Of weights it is that of their files' sizes and of samples of their bytes, which training changes.
        """
        digest = hashlib.sha256()
        for place in (Path(self.base).expanduser(), self.adapter):
            files = [place] if place and place.is_file() else []
            if place and place.is_dir():
                files = sorted(file for pattern in _WEIGHTS for file in place.glob(pattern))
                for file in sorted(file for pattern in _BESIDE for file in place.glob(pattern) if file.is_file()):
                    digest.update(f"{file.relative_to(place)} {sha256(file)} ".encode())
            for file in files:
                size = file.stat().st_size
                digest.update(f"{file.name} {size} ".encode())
                with file.open("rb") as stream:
                    for sample in range(_SAMPLES):
                        stream.seek(size * sample // _SAMPLES)
                        digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def load(self) -> tuple[Any, Any]:
        """Return the model on the device that it computes on, in evaluation mode, and its tokenizer.

        Raises:
            ModelError, CheckpointError: something isn't there, is damaged, or doesn't fit.
        """
        from headstart.training.wrap import load_placed

        options: dict[str, Any] = {"num_labels": self.labels} if self.labels else {}
        model, tokenizer = load_placed(
            self.base,
            dtype=self.dtype,
            bits=self.bits,
            revision=self.revision,
            seed=self.seed,
            head="classification" if self.labels else "text",
            **options,
        )
        return self.adapted(model), tokenizer

    def adapted(self, model: Any) -> Any:
        """Return the base model, loaded, with the adapter on it where there is one.

        Raises:
            CheckpointError: the adapter is damaged, or doesn't fit.
        """
        from peft import PeftModel

        from headstart.layers.checkpoint import load_checkpoint

        if self.adapter is not None and (self.adapter / RECORD).is_file():
            model = load_checkpoint(model, self.adapter, trainable=False)
        elif self.adapter is not None:
            try:
                model = PeftModel.from_pretrained(model, str(self.adapter))
            except (RuntimeError, ValueError, KeyError) as error:
                reason = str(error).strip().split("\n")[-1].strip().rstrip(".")
                raise CheckpointError(f"{self.adapter} can't be put on {self.base}: {reason}.") from error
        return model.eval()

    def untrained(self) -> Target:
        """Return the model that training began from, which a run and an adapter name.

        Raises:
            ModelError: this is a whole model, which doesn't say.
        """
        if self.adapter is not None:
            return replace(self, kind="model", adapter=None)
        if self.kind == "model":
            raise ModelError(
                f"{self.name} is a whole model, which doesn't say what it was trained from: give its run or adapter, "
                "or measure --text of this model and of its base."
            )
        model = _settings_of(Path(self.name).expanduser())[1]["model"]
        return replace(self, kind="model", base=str(model["name"]), revision=model["revision"])


def find_target(name: str, *, base: str | None = None, dtype: str | None = None) -> Target:
    """Return what a name stands for; nothing is loaded.

    Args:
        name: a run's folder, an adapter's, or a model's name, folder or GGUF file.
        base: the model for an adapter, in place of the one it was made on.
        dtype: of the weights; by default as the run has it, else float32.

    Raises:
        ModelError: there is no such thing, or ``base`` is given beside a whole model.
        CheckpointError: the run isn't finished or its settings are damaged; the adapter is a classifier's.
    """
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file():
        target = _of_run(name, folder, base, dtype)
    elif (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if config.get("task_type") == "SEQ_CLS":
            raise CheckpointError(f"{name} is a classifier's adapter, whose head only its run knows: give that folder.")
        noted = base or config.get("base_model_name_or_path")
        if not noted:
            raise CheckpointError(f"{name} doesn't say what base model it belongs to: name it with --base.")
        revision = None if base else config.get("revision")
        target = Target(name, "adapter", noted, folder, dtype=dtype or "float32", revision=revision)
    else:
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        if (folder.is_dir() and not (folder / "config.json").is_file()) or (not folder.exists() and looks_like_path):
            raise ModelError(f"{name} is no run, adapter or model: there is no run.json, {CONFIG} or config.json.")
        target = Target(name, "model", name, labels=_labels(folder), dtype=dtype or "float32")
    if base and target.adapter is None:
        raise ModelError(f"{name} is a whole model, which no base model goes with: leave --base out.")
    return target


def _of_run(name: str, folder: Path, base: str | None, dtype: str | None) -> Target:
    path, settings = _settings_of(folder)
    try:
        model, trains, seed = settings["model"], settings["trains"], int(settings["seed"])
        task, max_length = settings["data"]["task"], int(settings["batch"]["max_length"])
        given = {"bits": int(model["bits"]), "revision": model["revision"]}
        pretrained, precision = str(model["name"]), dtype or str(model["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it holds no run's settings.") from error
    asked = parse_task(task)
    labels = 0 if asked.kind == "text" else len(asked.labels) or 1
    common: dict[str, Any] = dict(labels=labels, dtype=precision, max_length=max_length, seed=seed)
    adapter = trains in ("adapter", "lora-fa")
    trained = folder / "trained" / ("checkpoint" if adapter else "model")
    if not trained.is_dir():
        raise CheckpointError(f"{name} is a run that has nothing trained yet: `headstart train` goes on with it.")
    if adapter:
        return Target(name, "run", base or pretrained, trained, **common, **({} if base else given))
    return Target(name, "run", str(trained), **common)


def _settings_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "run.json"
    try:
        return path, dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it holds no run's settings.") from error


def _labels(folder: Path) -> int:
    """Return how many classes a model's folder was trained to tell; 0 where it is none of a classifier."""
    if not (folder / "config.json").is_file():
        return 0
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classifies = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
        return len(config.get("id2label") or "ab") if classifies else 0
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read as JSON.") from error
