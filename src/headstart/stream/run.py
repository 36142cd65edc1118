"""The verb: read the headers, build the skeleton, make what is missing, put it together."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig

from headstart._version import __version__
from headstart.cache import FileDigests, open_store
from headstart.cache.locks import LONGEST_WAIT, Patience
from headstart.context import Clock, Memory, shown
from headstart.errors import CheckpointError, HeadstartError, HeadstartWarning, LayerError, MethodError
from headstart.files import check_free
from headstart.layers.find import TargetLayer
from headstart.layers.install import Subtracting, check_form
from headstart.layers.reach import left_out
from headstart.methods.base import ANY_LAYER, Method, Training
from headstart.methods.registry import method_class, method_names, parse_method
from headstart.processes import Processes
from headstart.progress import Show
from headstart.report import LayerReport, Report
from headstart.solve import check
from headstart.stream.assemble import assemble
from headstart.stream.parts import Work
from headstart.stream.pieces import Maker, averaged, layer_name
from headstart.stream.residual import STREAMED_FOLDER, check_place, make_shard
from headstart.stream.skeleton import ADAPTER, build
from headstart.stream.source import Source

Make = Callable[[Sequence[int], Show], None]

_POLL = 0.2
_PATIENCE = 120.0


@dataclass(frozen=True)
class Crew:
    """The processes that share one start, as ``torchrun`` numbers them in the environment."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Crew:
        """Return this process's place; alone where nothing is said."""
        return cls(_number("RANK", 0), _number("WORLD_SIZE", 1))

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own accelerator of that type; the CPU is everyone's, and a numbered one is meant."""
        shared = device.type == "cpu" or device.index is not None or "LOCAL_RANK" not in os.environ
        if shared:
            return device
        # Each process may see its own alone, as under Slurm.
        return torch.device(device.type, _number("LOCAL_RANK", 0) % max(1, torch.accelerator.device_count()))


def _number(variable: str, default: int) -> int:
    found = os.environ.get(variable, str(default))
    if not found.isdecimal():
        raise HeadstartError(f"{variable}={found!r} in the environment is not a process's number: unset it.")
    return int(found)


def stream_start(
    folder: str | Path,
    method: Method | str,
    config: LoraConfig,
    out: str | Path,
    *,
    seed: int = 0,
    form: Subtracting = "anchored",
    name: str | None = None,
    device: torch.device | str = "cpu",
    cache: bool | str | os.PathLike[str] = True,
    strict: bool = False,
    force: bool = False,
    progress: Show | bool = True,
) -> Report | None:
    """Make a start from a checkpoint's shards and write it as a checkpoint to train from, never building the model.

    The folder is the one that ``initialize_`` and ``save_checkpoint`` would write, bit for bit, of a model loaded in
    the types of its shards. At most two layers' weights are held at a time. What is finished is kept beside ``out``
    (in ``.NAME.stream-...``), and the same call goes on from there after a kill. Under ``torchrun`` the processes
    share the layers through that folder, and each takes over what another left; the first one puts all together.

    Args:
        folder: a folder with config.json and safetensors shards.
        method: one that needs only shapes, weights or their moments, or its name with settings.
        config: PEFT's; targets, ranks and patterns are resolved as PEFT does.
        out: the folder to write. With ``form="residual"`` the residual model is in ``base`` in it
            (:func:`headstart.stream.load_residual` loads both), unless the method subtracts nothing.
        seed: the same seed gives the same factors.
        form: "anchored" leaves the checkpoint alone; "residual" writes W - s B A, in the shards' own type, as well.
        name: the base model's name for the adapter's config; ``folder`` by default.
        device: where factors are computed; of several processes each takes its own of that type.
        cache: as in ``initialize_``; the content of a file is hashed once, and known from then on.
        strict: raise where a layer can't be started as asked for, instead of falling back with a note.
        force: replace what an earlier start wrote in a folder that exists; what else is in it stays.
        progress: as in ``initialize_``.

    Returns:
        The report; None in all processes but the first.

    Raises:
        MethodError: an unknown method, or one that reads data.
        LayerError: see :func:`headstart.layers.find.find_layers`; also for NaN or infinity in weights.
        ModelError, CheckpointError: the checkpoint is damaged or not one; the path exists; or the disk is full.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise MethodError(f"{method!r} is not a method: give one like hs.PiSSA(), or its name.")
    _check_method(method)
    check_form(form)
    crew, clock = Crew.here(), Clock()
    out = Path(out)
    if crew.rank == 0:
        check_free(out, STREAMED_FOLDER, force)
        if form == "residual":
            check_place(out)
    _check_apart(Path(folder), out)
    with clock("find"):
        source = Source.open(Path(folder))
        skeleton = build(source, config, name)
        check(method, skeleton.layers, Training())
        live_form = form if method.form == "anchored" else method.form
        notes: list[str] = []
        store = open_store(cache, notes.append)
        digests = FileDigests(store.folder) if store else None
        maker = Maker(source, skeleton, method, live_form, seed, crew.device(torch.device(device)), store, digests)
        work = Work(out, _key(maker))
    if crew.rank == 0:
        work.create()
    elif not _invited(work, out, crew):
        return None
    memory = Memory(maker.device)
    with shown(progress, Processes(crew.rank, crew.count)) as show:
        try:
            _make_all(maker, work, crew, clock, show, strict, notes.append)
        except CheckpointError:
            if crew.rank and not work.is_open():
                return None  # the first process has put everything together
            raise
        finally:
            if digests:
                digests.save()
        if crew.rank:
            return None
        source.check_unchanged()
        with clock("write"):
            parts = assemble(maker, work, out, force)
    reports = [LayerReport(**facts["report"]) for facts in parts]
    notes = [f"{layer.name}: {layer.note}" for layer in reports if layer.note] + notes
    for sentence in notes:
        warnings.warn(sentence, HeadstartWarning, stacklevel=2)
    return Report(
        method=str(method),
        form=maker.form,
        adapter=ADAPTER,
        seed=seed,
        layers=reports,
        seconds=clock.total(),
        seconds_by_step=clock.seconds,
        peak_memory=memory.peak(),
        trainable=sum(facts["trainable"] for facts in parts),
        left_out=left_out(maker.skeleton.model, maker.skeleton.layers),
        cached=store.served if store else 0,
        warnings=notes,
    )


def _make_all(
    maker: Maker, work: Work, crew: Crew, clock: Clock, show: Show, strict: bool, warn: Callable[[str], None]
) -> None:
    layers = maker.skeleton.layers

    def shared(groups: Sequence[Sequence[int]], finished: Callable[[int], bool], make: Make, what: str) -> None:
        share(groups, finished, make, what, work, crew, show, warn)

    if maker.method.wants(ANY_LAYER).moments:
        names = [f"moments-{place:05d}" for place in range(len(layers))]

        def moments(group: Sequence[int], _: Show) -> None:
            for place in group:
                found = maker.layer_moments(layers[place])
                work.put(names[place], {}, {"mean": found.mean, "std": found.std})

        with clock("moments"):
            groups = [[place] for place in range(len(layers))]
            shared(groups, lambda place: work.get(names[place]) is not None, moments, "moments")
            maker.moments = averaged([layer.kind for layer in layers], [work.need(name) for name in names])

    def start(group: Sequence[int], inner: Show) -> None:
        for place, (tensors, facts) in zip(group, maker.starts([layers[place] for place in group], inner), strict=True):
            work.put(layer_name(place), tensors, facts)

    with clock("factorise"):
        groups = _groups(maker, layers)
        shared(groups, lambda place: work.get(layer_name(place)) is not None, start, "layer")
    for place, layer in enumerate(layers if strict else ()):
        if note := work.need(layer_name(place)).facts["report"]["note"]:
            raise LayerError(f"{layer.name}: {note}")
    if maker.form == "residual":
        shards = list(maker.source.shards)

        def shard(group: Sequence[int], _: Show) -> None:
            for place in group:
                make_shard(maker, work, shards[place])

        with clock("residual"):
            groups = [[place] for place in range(len(shards))]
            shared(groups, lambda place: work.file_digest(shards[place]) is not None, shard, "shard")


def share(
    groups: Sequence[Sequence[int]],
    finished: Callable[[int], bool],
    make: Make,
    what: str,
    work: Work,
    crew: Crew,
    show: Show,
    warn: Callable[[str], None],
) -> None:
    """Make all that is not finished, together with the other processes; return when everything is there.

    A piece that another process has claimed is left to it, and looked at again later: should that process die, its
    claim is free. Where nothing comes for 10 minutes, it is made here as well, and ``warn`` is called with a sentence.
    """
    total = sum(map(len, groups))
    first = len(groups) * crew.rank // crew.count
    left = [*groups[first:], *groups[:first]]
    done = 0

    def inner(step: str, count: int, of: int) -> None:
        if step != "factorising":  # the layers of this group alone
            show(step, count, of)

    patience = Patience(LONGEST_WAIT)
    while left:
        waiting = []
        for group in left:
            with ExitStack() as claims:
                mine = {place: claims.enter_context(work.claim(f"{what}-{place:05d}")) for place in group}
                missing = [place for place in group if not finished(place)]
                if claimed := [place for place in missing if mine[place]]:
                    make(claimed, inner)
                    patience.renew()
            if len(claimed) < len(missing):
                if patience.over:
                    for place in missing:
                        warn(work.disregard(f"{what}-{place:05d}", patience.waited))
                waiting.append(group)
                continue
            done += len(group)
            patience.renew()
            show(f"streaming: {what}s", done, total)
        if len(waiting) == len(left):
            time.sleep(_POLL)
        left = waiting


def _groups(maker: Maker, layers: Sequence[TargetLayer]) -> list[list[int]]:
    """Return which layers to hold together: two of one shape where both can be decomposed at once, else one."""
    pairs = (
        type(maker.method).factors_batch is not Method.factors_batch
        and maker.device.type == "cpu"
        and torch.get_num_threads() > 1
    )
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, int, int], list[int]] = {}
    for place, layer in enumerate(layers):
        shape = (layer.d_out, layer.d_in, layer.r)
        if pairs and shape in open_groups:
            open_groups.pop(shape).append(place)
            continue
        groups.append([place])
        open_groups[shape] = groups[-1]
    return groups


def _key(maker: Maker) -> dict[str, Any]:
    """Return all that finished pieces depend on."""
    config = maker.skeleton.model.peft_config[ADAPTER].to_dict()
    config.pop("base_model_name_or_path", None)
    return {
        "format": 1,
        "versions": [__version__, torch.__version__],
        "method": [maker.method.name, {name: repr(value) for name, value in maker.method.settings().items()}],
        "seed": maker.seed,
        "form": maker.form,
        "device": maker.device.type,
        "config": {name: repr(sorted(value) if isinstance(value, set) else value) for name, value in config.items()},
        "checkpoint": maker.source.identity(),
        "layers": [[layer.name, layer.r, layer.scaling] for layer in maker.skeleton.layers],
    }


def _check_method(method: Method) -> None:
    if method.wants(ANY_LAYER).data:
        wants = {name: method_class(name)().wants(ANY_LAYER) for name in method_names()}
        able = [name for name, wanted in wants.items() if not wanted.data and not wanted.original]
        raise MethodError(
            f"method {method.name!r} needs the whole model, which streaming never builds; initialise in memory, or use "
            f"one of {', '.join(able)}."
        )
    if type(method).settle is not Method.settle:
        raise MethodError(
            f"method {method.name!r} settles the starts of all layers together, and streaming never holds them all; "
            "initialise in memory."
        )


def _check_apart(folder: Path, out: Path) -> None:
    if out.resolve() == folder.resolve() or folder.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(f"{out} holds the checkpoint itself: choose another folder to write.")


def _invited(work: Work, out: Path, crew: Crew) -> bool:
    """Wait for the first process to open the folder; False where it has finished everything.

    Raises:
        CheckpointError: it doesn't come.
    """
    began = time.monotonic()
    born = psutil.Process().create_time()
    while time.monotonic() - began < _PATIENCE:
        if work.is_open():
            return True
        record = out / "headstart.json"
        if record.is_file() and record.stat().st_mtime >= born:
            return False
        time.sleep(_POLL)
    raise CheckpointError(
        f"process {crew.rank} waited {_PATIENCE:g} s for process 0 to open {work.folder}: all processes must see the "
        "same folder for --out."
    )
