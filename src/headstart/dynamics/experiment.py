"""Figure 2 of "Beyond Zero Initialization": loss of the toy model over rates and sizes of the start, kept seed by seed.

Appendix D.1: ten rates, twelve standard deviations, Init[A] (B at zero) and Init[AB] (both of one deviation, not
subtracted), 100 steps of 64, ten seeds. A seed settles the order of the images and the two standard normal matrices
that all its cells scale, so that cells of one seed are paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from headstart.dynamics.images import Images, read_images
from headstart.dynamics.toy import (
    Frozen,
    Network,
    batches,
    fine_tune_,
    fresh_network,
    frozen_part,
    measure,
    pretrain,
)
from headstart.errors import CheckpointError, DataError, RunError
from headstart.files import write_json, write_whole
from headstart.linalg.precision import full_precision, one_thread_each
from headstart.progress import Show, silent
from headstart.settings import differing
from headstart.store.claims import alone_in

STARTS = ("Init[A]", "Init[AB]")
RATES = (3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4, 9e-4, 1e-3, 2e-3, 3e-3)
DEVIATIONS = (2e-5, 5e-5, 8e-5, 1e-4, 4e-4, 7e-4, 1e-3, 3e-3, 6e-3, 9e-3, 2e-2, 5e-2)

SETTINGS = "toy.json"
# Cells that a thread takes at a time.
_TOGETHER = 12


@dataclass(frozen=True)
class Settings:
    """What the figure depends on; the defaults are appendix D.1's.

    Attributes:
        width, rank: n and r of the model.
        pretrain_steps, pretrain_rate: of AdamW on the first set of images.
        pretrain: one model for all seeds ("once"), or one for each ("each").
        steps: of fine-tuning.
        batch: images a step, in both.
        rates, deviations: of fine-tuning, and of the entries of what starts at random.
        seeds: repetitions.
        test_images: of the second set, on which a cell is measured; None for all.
    """

    width: int = 4096
    rank: int = 32
    pretrain_steps: int = 2000
    pretrain_rate: float = 1e-3
    pretrain: Literal["once", "each"] = "once"
    steps: int = 100
    batch: int = 64
    rates: tuple[float, ...] = RATES
    deviations: tuple[float, ...] = DEVIATIONS
    seeds: int = 10
    test_images: int | None = None

    def __post_init__(self) -> None:
        numbers = ("width", "rank", "pretrain_steps", "steps", "batch", "seeds")
        for name in (*numbers, *(("test_images",) if self.test_images is not None else ())):
            if getattr(self, name) < 1:
                raise RunError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.rank > self.width:
            raise RunError(f"rank {self.rank} is larger than the width {self.width}.")
        for name in ("rates", "deviations"):
            values = getattr(self, name)
            if not values or any(not 0 < value < float("inf") for value in values) or len(set(values)) < len(values):
                raise RunError(f"{name} must be positive numbers, each given once.")
        if not self.pretrain_rate > 0:
            raise RunError(f"pretrain_rate must be positive, not {self.pretrain_rate}.")


@dataclass(frozen=True)
class Cell:
    """What one cell came to.

    Attributes:
        start: "Init[A]" or "Init[AB]".
        deviation, rate: of its start and its training.
        loss, accuracy: on the test images, after the last step.
        losses: of each step's batch, before the step.
    """

    start: str
    deviation: float
    rate: float
    loss: float
    accuracy: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Seed:
    """One repetition.

    Attributes:
        seed: its number.
        before: loss on the test images of the pretrained model.
        cells: all of them.
    """

    seed: int
    before: float
    cells: tuple[Cell, ...]


def run_toy(
    settings: Settings, pretraining: Path, fine_tuning: Path, folder: Path, show: Show = silent
) -> tuple[Settings, list[Seed]]:
    """Do what is left of the experiment in its folder; return what :func:`read_toy` then does.

    Args:
        settings: of the experiment.
        pretraining, fine_tuning: folders of MNIST and FashionMNIST.
        folder: gets the settings, the pretrained models, and a file for each seed that is finished; the same call goes
            on after a kill.
        show: draws progress.

    Raises:
        DataError: images are missing or damaged.
        RunError: the folder holds something else, or another process works in it.
    """
    first, second = read_images(pretraining, "train"), read_images(fine_tuning, "train")
    test = read_images(fine_tuning, "test", settings.test_images)
    for images, place in ((first, pretraining), (second, fine_tuning)):
        if len(images) < settings.batch:
            raise DataError(f"{place} has {len(images)} images to learn from, fewer than a batch of {settings.batch}.")
    _claim(folder, settings)
    with alone_in(folder), full_precision():
        for seed in range(settings.seeds):
            if read_seed(folder, settings, seed) is None:
                network = _pretrained(folder, settings, seed if settings.pretrain == "each" else 0, first, show)
                write_json(asdict(_one_seed(settings, network, second, test, seed, show)), _file(folder, seed))
    return read_toy(folder)


def read_toy(folder: Path) -> tuple[Settings, list[Seed]]:
    """Return an experiment's settings and the seeds that are finished.

    Raises:
        RunError: the folder holds no such experiment.
        CheckpointError: a file of it is damaged; names it.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise RunError(f"{folder} holds no toy experiment: it has no {SETTINGS}.")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known.update((name, tuple(known[name])) for name in ("rates", "deviations"))
        settings = Settings(**known)
    except (OSError, ValueError, KeyError, TypeError, RunError) as error:
        raise CheckpointError(f"{path} is damaged, or another release's: {error}") from error
    seeds = [read_seed(folder, settings, seed) for seed in range(settings.seeds)]
    return settings, [seed for seed in seeds if seed is not None]


def read_seed(folder: Path, settings: Settings, seed: int) -> Seed | None:
    """Return a finished seed; None where it isn't.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = _file(folder, seed)
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(Cell(**cell | {"losses": tuple(cell["losses"])}) for cell in known["cells"])
        if [(cell.start, cell.deviation, cell.rate) for cell in cells] != list(_cells(settings)):
            raise ValueError("it holds other cells")
        return Seed(known["seed"], known["before"], cells)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Remove it, and the same command makes it anew.") from error


def _one_seed(settings: Settings, network: Network, images: Images, test: Images, seed: int, show: Show) -> Seed:
    """Return all cells of a seed."""
    order = batches(len(images), settings.steps, settings.batch, seed)
    data = [frozen_part(network, images, rows) for rows in order]
    held_out = frozen_part(network, test)
    generator = torch.Generator("cpu").manual_seed(seed)
    r, n = settings.rank, settings.width
    normal_A = torch.randn(r, n, generator=generator, dtype=torch.float32, device="cpu")
    normal_B = torch.randn(n, r, generator=generator, dtype=torch.float32, device="cpu")

    def trained(cell: tuple[str, float, float]) -> Cell:
        start, deviation, rate = cell
        A = normal_A * deviation
        B = normal_B * deviation if start == "Init[AB]" else torch.zeros_like(normal_B)
        losses = fine_tune_(A, B, network.out, data, rate)
        return Cell(*cell, *measure(A, B, network.out, held_out), tuple(losses))

    cells = list(_cells(settings))
    done: list[Cell] = []
    for first in range(0, len(cells), _TOGETHER):
        done += one_thread_each(trained, cells[first : first + _TOGETHER])
        show("fine-tuning cells", seed * len(cells) + len(done), settings.seeds * len(cells))
    return Seed(seed, _before(network, held_out), tuple(done))


def _before(network: Network, held_out: Frozen) -> float:
    nothing = network.middle.new_zeros(1, network.width)
    return measure(nothing, nothing.mT, network.out, held_out)[0]


def _cells(settings: Settings) -> Iterator[tuple[str, float, float]]:
    for start in STARTS:
        for deviation in settings.deviations:
            for rate in settings.rates:
                yield start, deviation, rate


def _pretrained(folder: Path, settings: Settings, seed: int, images: Images, show: Show) -> Network:
    """Return the pretrained network of a seed, from its file where that is there."""
    path = folder / f"pretrained-{seed}.safetensors"
    names = [field.name for field in fields(Network)]
    if path.is_file():
        try:
            tensors = load_file(path)
            return Network(*(tensors[name] for name in names))
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: remove it, and the same command makes it anew.") from error
    network = pretrain(
        fresh_network(settings.width, seed),
        images,
        steps=settings.pretrain_steps,
        rate=settings.pretrain_rate,
        batch=settings.batch,
        seed=seed,
        show=show,
    )
    write_whole(path, save({name: getattr(network, name) for name in names}))
    return network


def _claim(folder: Path, settings: Settings) -> None:
    """Note whose the folder is, or check that it is this experiment's."""
    path, known = folder / SETTINGS, _plain(settings)
    if path.is_file():
        before, _ = read_toy(folder)
        # More seeds are more of the same.
        changed = sorted(set(differing(_plain(before), known)) - {"seeds"})
        if changed:
            raise RunError(f"{folder} holds an experiment with other {', '.join(changed)}: give another --out.")
        known["seeds"] = max(known["seeds"], before.seeds)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and holds no toy experiment: give another --out.")
    write_json(known, path)


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


def _file(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.json"
