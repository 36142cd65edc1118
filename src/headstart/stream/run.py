"""The verb: read the headers, build the skeleton, make what is missing, put it together."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from peft import LoraConfig

from headstart._version import __version__
from headstart.cache import arithmetic, open_cache
from headstart.context import Context, Memory, shown
from headstart.errors import CheckpointError, HeadstartWarning, LayerError, MethodError
from headstart.files import check_free
from headstart.layers.experts import lower_ranks
from headstart.layers.find import TargetLayer
from headstart.layers.install import Subtracting, check_form
from headstart.layers.parts import check_stacks
from headstart.layers.reach import left_out
from headstart.methods.base import ANY_LAYER, Method, Training
from headstart.methods.registry import method_class, method_names, parse_method
from headstart.processes import Processes, environment_number
from headstart.progress import Show
from headstart.report import LayerReport, Report
from headstart.solve import check
from headstart.stream.assemble import assemble, saved_layers
from headstart.stream.pieces import Finished, Maker, averaged, layer_name
from headstart.stream.residual import STREAMED_FOLDER, check_place, check_writable, make_shard
from headstart.stream.skeleton import ADAPTER, build
from headstart.stream.source import Source
from headstart.stream.work import Work

T = TypeVar("T")

_POLL = 0.2
_PATIENCE = 120.0


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
    context = Context(seed=seed, processes=Processes.numbered())
    first = context.processes.rank == 0
    out = Path(out)
    if first:
        check_free(out, STREAMED_FOLDER, force)
        if form == "residual":
            check_place(out)
    _check_apart(Path(folder), out)
    with context.clock("find"):
        source = Source.open(Path(folder))
        skeleton = build(source, config, name)
        kept = open_cache(cache, context.notes.append)
        maker = Maker(source, skeleton, method, form, _own_device(torch.device(device)), context, kept)
        check_stacks(maker.parts, form)
        for part in maker.parts:
            check(part.method, part.layers, Training())
        check_writable(maker)
        work = Work(out, _settings(maker), context.notes.append)
    if first:
        work.create()
    elif not _invited(work, out, context.processes):
        return None
    memory = Memory(maker.device)
    with shown(progress, context.processes) as show:
        try:
            finished = _make_all(maker, work, show, strict)
        except CheckpointError:
            if not first and not work.is_open():
                return None  # the first process has put everything together
            raise
        if not first:
            return None
        source.check_unchanged()
        with context.clock("write"):
            saved = saved_layers(maker, finished)
            assemble(maker, work, out, saved, finished.shards, force)
    reports = [LayerReport(**facts["report"]) for facts in finished.layers.values()]
    notes = [f"{layer.name}: {layer.note}" for layer in reports if layer.note] + context.notes
    for sentence in notes:
        warnings.warn(sentence, HeadstartWarning, stacklevel=2)
    return Report(
        method=str(method),
        form=" and ".join(dict.fromkeys(maker.forms.values())),
        adapter=ADAPTER,
        seed=seed,
        layers=reports,
        seconds=context.clock.total(),
        seconds_by_step=context.clock.seconds,
        peak_memory=memory.peak(),
        trainable=sum(layer.trainable for layer in saved.values()),
        left_out=left_out(maker.skeleton.model, maker.skeleton.layers),
        lower_ranks=lower_ranks(maker.skeleton.layers),
        cached=kept.served if kept else 0,
        warnings=notes,
    )


def _make_all(maker: Maker, work: Work, show: Show, strict: bool) -> Finished:
    """Make what is missing, together with the other processes, and return all."""
    context, layers = maker.context, maker.skeleton.layers
    places = {layer.name: place for place, layer in enumerate(layers)}

    def show_inner(step: str, done: int, total: int) -> None:
        if step != "factorising":  # the layers of one group alone
            show(step, done, total)

    context.show = show_inner

    def make_together(
        names: Sequence[str],
        groups: Sequence[Sequence[int]],
        look_up: Callable[[str], T | None],
        make: Callable[[list[int]], Iterable[T]],
        what: str,
    ) -> dict[str, T]:
        """Return by name what ``make`` makes of places, each process beginning elsewhere."""
        position = {name: place for place, name in enumerate(names)}
        begin = len(groups) * context.processes.rank // context.processes.count
        by_name = work.make_all(
            [[names[place] for place in group] for group in [*groups[begin:], *groups[:begin]]],
            look_up,
            lambda missing: dict(zip(missing, make([position[name] for name in missing]), strict=True)),
            what=what,
            step=f"streaming: {what}",
            show=show,
        )
        return {name: by_name[name] for name in names}

    def moments(measured: Mapping[str, TargetLayer], chosen: Sequence[int]) -> Iterator[dict[str, Any]]:
        for name, layer in (list(measured.items())[place] for place in chosen):
            facts = asdict(maker.layer_moments(layer))
            work.put(name, {}, facts)
            yield facts

    def starts(chosen: Sequence[int]) -> Iterator[dict[str, Any]]:
        made = maker.starts([layers[place] for place in chosen])
        for place, (tensors, facts) in zip(chosen, made, strict=True):
            work.put(layer_name(place), tensors, facts)
            yield facts

    for part in maker.parts:
        if not part.method.wants(ANY_LAYER).moments:
            continue
        measured = {f"moments-{places[layer.name]:05d}": layer for layer in part.layers}
        with context.clock("moments"):
            singly = [[place] for place in range(len(measured))]
            of_layers = make_together(list(measured), singly, work.facts, partial(moments, measured), "moments")
            of_kinds = averaged([layer.kind for layer in part.layers], list(of_layers.values()))
        maker.moments |= {layer.name: of_kinds[layer.kind] for layer in part.layers}
    with context.clock("solve"):
        names = [layer_name(place) for place in range(len(layers))]
        finished = Finished(make_together(names, _groups(maker, layers), work.facts, starts, "layers"), {})
    if strict:
        for layer, facts in zip(layers, finished.layers.values(), strict=True):
            if note := facts["report"]["note"]:
                raise LayerError(f"{layer.name}: {note}")
    if maker.residual:
        shards = list(maker.source.shards)
        with context.clock("residual"):
            digests = make_together(
                shards,
                [[place] for place in range(len(shards))],
                work.file_digest,
                lambda places: [make_shard(maker, work, shards[place]) for place in places],
                "shards",
            )
        finished = replace(finished, shards=digests)
    return finished


def _groups(maker: Maker, layers: Sequence[TargetLayer]) -> list[list[int]]:
    """Return which layers to hold together: two of one shape where both can be decomposed at once, else one."""
    parallel = maker.device.type == "cpu" and torch.get_num_threads() > 1
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, int, int, int], list[int]] = {}
    for place, layer in enumerate(layers):
        part = maker.part_of[layer.name]
        pairs = parallel and type(part.method).factors_batch is not Method.factors_batch
        shape = (id(part), layer.d_out, layer.d_in, layer.r)
        if pairs and shape in open_groups:
            open_groups.pop(shape).append(place)
            continue
        groups.append([place])
        open_groups[shape] = groups[-1]
    return groups


def _settings(maker: Maker) -> dict[str, Any]:
    """Return all that finished pieces depend on."""
    config = maker.skeleton.model.peft_config[ADAPTER].to_dict()
    config.pop("base_model_name_or_path", None)
    return {
        "format": 3,
        "versions": [__version__, torch.__version__],
        "arithmetic": [arithmetic(method) for method in maker.method.methods],
        "method": [maker.method.name, {name: repr(value) for name, value in maker.method.settings().items()}],
        "seed": maker.context.seed,
        "form": list(maker.forms.values()),
        "device": maker.device.type,
        "config": {name: repr(sorted(value) if isinstance(value, set) else value) for name, value in config.items()},
        "checkpoint": maker.source.identity(),
        "layers": [[layer.name, layer.r, layer.scaling] for layer in maker.skeleton.layers],
    }


def _check_method(method: Method) -> None:
    for own in method.methods:
        _check_one(own)


def _check_one(method: Method) -> None:
    if method.reads_data:
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


def _own_device(device: torch.device) -> torch.device:
    """Return this process's own accelerator of that type; the CPU is everyone's, and a numbered one is meant."""
    if device.type == "cpu" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    # Each process may see its own alone, as under Slurm.
    return torch.device(device.type, environment_number("LOCAL_RANK", 0) % max(1, torch.accelerator.device_count()))


def _invited(work: Work, out: Path, processes: Processes) -> bool:
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
        f"process {processes.rank} waited {_PATIENCE:g} s for process 0 to open {work.folder}: all processes must see "
        "the same folder for --out."
    )
