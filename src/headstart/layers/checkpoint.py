"""Checkpoints: everything that going on training needs, anchors included, checked when they come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, set_requires_grad
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor, nn

from headstart._version import __version__
from headstart.errors import BASE_PREFIX, CheckpointError
from headstart.files import sha256, whole_folder, write_json
from headstart.layers.adapter import AdapterLayer, split
from headstart.layers.anchored import anchors, drop_anchors, set_anchors
from headstart.layers.base_check import check_shapes, check_weights
from headstart.layers.core import core_of, drop_core, form_of, set_core
from headstart.layers.experts import stack_of
from headstart.layers.export import adapter_tensors, one_writes, plainly_named, portable_config, save_config
from headstart.layers.factors import both
from headstart.layers.files import (
    ADAPTER_FOLDER,
    CONFIG,
    RECORD,
    WEIGHTS,
    read_json,
    read_tensors,
    write_tensors,
)
from headstart.layers.find import (
    TargetLayer,
    active_adapters,
    lora_layers,
    record,
    residual_owner,
    resolve_adapter,
    set_record,
    tied_layers,
)
from headstart.layers.frozen import freeze_factors, frozen_factors, thaw_factors
from headstart.layers.install import mark_config, subtract_product
from headstart.layers.mark import StackOf, marked_form, marked_stacks
from headstart.layers.quantised import quantisation
from headstart.layers.told import stacks_told_by
from headstart.layers.unwrap import looks_through, plain_name
from headstart.layers.watch import watch
from headstart.layers.weights import adapted_parameter, assign, fingerprint, give_values

_FORMAT = 1


@looks_through
def save_checkpoint(model: nn.Module, path: str | Path, *, adapter: str | None = None, force: bool = False) -> None:
    """Write everything needed to go on training: factors, anchors, trained heads, and how the start was made.

    Embeddings are written where PEFT would write them, after ``resize_token_embeddings`` above all.

    The folder holds ``adapter_model.safetensors``, ``adapter_config.json`` and ``headstart.json``. Other programs
    can't load it, and PEFT says so; :func:`headstart.save_lora` writes what they can.

    Args:
        model: the PEFT model. Of one that FSDP2 has sharded, every process must call this, and the first one writes.
        path: the folder to write, whole or not at all.
        adapter: the adapter's name; the active one by default.
        force: replace an adapter's files in a folder that exists; what else is in it stays.

    Raises:
        LayerError: the model has no such adapter.
        CheckpointError: the path exists.
    """
    adapter = resolve_adapter(model, adapter)
    tensors = adapter_tensors(model, adapter, "auto")
    records = {layer.name: record_to_save(layer) for layer in lora_layers(model, adapter)}
    with one_writes(model) as writes:
        if not writes:
            return
        with whole_folder(path, ADAPTER_FOLDER, force=force) as folder:
            digest = write_tensors(tensors, folder / WEIGHTS)
            save_config(portable_config(model, adapter), folder)
            write_record(folder, digest, records)


def write_record(folder: Path, digest: str, layers: Mapping[str, Any]) -> None:
    """Write ``headstart.json``, beside weights of this SHA-256: how each layer's start was made."""
    content = {"format": _FORMAT, "version": __version__, "sha256": {WEIGHTS: digest}, "layers": dict(layers)}
    write_json(content, folder / RECORD)


@looks_through
def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str = "default",
    trainable: bool = True,
    check_base: bool = True,
) -> PeftModel:
    """Load a checkpoint, of :func:`save_checkpoint` or as a ``Trainer`` saves it, ready to go on training.

    Args:
        model: the base model, or a PEFT model to load into: an adapter of that name is overwritten, else added.
        path: the folder.
        adapter: the adapter's name.
        trainable: False freezes the adapter, for inference.
        check_base: False takes any base model whose layers have the same names and shapes. By default a sample of its
            weights is compared with that of the checkpoint's own base; where one of the two is quantised, they may
            differ as quantisation makes them differ, and a HeadstartWarning says so.

    Returns:
        The PEFT model, without what stood around it.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, or belongs to another base model, rank or set of
            trained heads. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{model!r} is not a model: give the base model itself, as from_pretrained returns it.")
    folder = Path(path)
    saved = read_adapter(folder)
    config, layers, records = saved.config, saved.layers, saved.record.get("layers", {})
    holders = check_shapes(model, layers, folder, adapter)
    if check_base:
        check_weights(model, holders, records, folder, adapter)

    config.inference_mode = not trainable
    with ExitStack() as undo:
        wrapped = _with_adapter(model, config, adapter, undo)
        targets = {target.name: target for target in lora_layers(wrapped, adapter)}
        _check_targets(targets, layers, folder)
        for name, layer in layers.items():
            check_form(targets[name], layer)
        residual = [targets[name] for name, layer in layers.items() if layer.kind == "residual"]
        for target, other in tied_layers(wrapped, residual):
            raise CheckpointError(
                f"{folder} belongs to another base model: layer {target.name!r} is residual there, and here its "
                f"weight, which that would change, is that of {other!r} as well."
            )
        for name, layer in layers.items():
            _prepare_layer(targets[name], layer, undo)
        try:
            result = set_peft_model_state_dict(wrapped, _placed(wrapped, saved, undo), adapter_name=adapter)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            # A head of another shape; PyTorch's sentence names it.
            reason = str(error).strip().split("\n")[-1].strip().rstrip(".")
            raise CheckpointError(f"{folder} belongs to another base model: {reason}.") from error
        # With bias="all" PEFT writes the bias of a trained head twice, once under a name that it can't read again.
        unplaced = [key for key in result.unexpected_keys if ".modules_to_save." not in key]
        if unplaced:
            raise CheckpointError(f"{folder / WEIGHTS}: no place in the model for {unplaced[0]!r}.")
        for name, content in records.items():
            if content is not None:
                set_record(targets[name], content)
        for name, target in targets.items():
            _freeze_as(target, (records.get(name) or {}).get("frozen", ()), trainable)
        if any(layer.kind != "lora" for layer in layers.values()):
            mark_config(wrapped, adapter, undo)
        undo.pop_all()
    return wrapped


def _with_adapter(model: Any, config: LoraConfig, adapter: str, undo: ExitStack) -> Any:
    """Return a PEFT model that holds the adapter: the model itself if it does, else with the adapter added."""
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    if not hasattr(model, "peft_config"):
        wrapped = get_peft_model(model, config, adapter_name=adapter)
        undo.callback(wrapped.unload)
        return wrapped
    if adapter not in model.peft_config:
        undo.callback(_drop_adapter, model, adapter)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
        else:  # its own add_adapter has other arguments
            inject_adapter_in_model(config, model, adapter)
        return model
    lacking = sorted(set(config.modules_to_save or ()) - set(model.peft_config[adapter].modules_to_save or ()))
    if lacking:
        raise CheckpointError(
            f"the checkpoint holds {lacking[0]!r}, trained whole, and adapter {adapter!r} of the model has no such "
            "part: wrap the model with the same modules_to_save, or give the base model."
        )
    for parameter in _own_parameters(model, adapter):
        undo.callback(assign, parameter, parameter.detach().clone())
    for target in lora_layers(model, adapter):
        undo.callback(set_record, target, record(target))
    if config.inference_mode or adapter in active_adapters(model):
        set_requires_grad(model, adapter, requires_grad=not config.inference_mode)
    return model


def _drop_adapter(model: Any, adapter: str) -> None:
    if isinstance(model, PeftModel) and adapter in model.peft_config:
        model.delete_adapter(adapter)
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(adapter)
    model.peft_config.pop(adapter, None)


def _placed(model: nn.Module, saved: AdapterFolder, undo: ExitStack) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the names that they have in this model; note the base's that they replace."""
    prefix = BASE_PREFIX if isinstance(model, PeftModel) else ""
    tensors = {f"{prefix}{name.removeprefix(BASE_PREFIX)}": tensor for name, tensor in saved.tensors.items()}
    for name, parameter in model.named_parameters():
        if name in tensors:  # embeddings
            undo.callback(assign, parameter, parameter.detach().clone())
    return tensors


def _own_parameters(model: nn.Module, adapter: str) -> Iterator[Tensor]:
    """Yield all that PEFT keeps for an adapter: factors, magnitudes, cores, heads."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            by_adapter = getattr(module, name, {})
            if adapter in by_adapter:
                own = by_adapter[adapter]
                yield from [own] if isinstance(own, Tensor) else own.parameters()


def _freeze_as(target: TargetLayer, names: Sequence[str], trainable: bool) -> None:
    """Freeze the factors that a checkpoint's start froze, and no B that another start froze before."""
    frozen = frozen_factors(target.module, target.adapter)
    if "lora_B" in frozen and "lora_B" not in names and core_of(target.module, target.adapter) is None:
        thaw_factors(target.module, target.adapter, trainable)
        frozen = tuple(name for name in frozen if name != "lora_B")
    if wanted := {*frozen, *names}:
        freeze_factors(target.module, target.adapter, sorted(wanted))


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as read from its folder: what PEFT stores, sorted into layers and others, and headstart's record.

    ``record`` is empty where headstart did not write the folder.
    """

    path: Path
    tensors: dict[str, Tensor]
    layers: dict[str, AdapterLayer]
    other_tensors: dict[str, Tensor]
    config: LoraConfig
    record: dict[str, Any]


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read an adapter's folder, a headstart checkpoint or any LoRA that PEFT wrote.

    Raises:
        CheckpointError: it is damaged or incomplete, or not a LoRA.
    """
    folder = Path(path)
    record = _read_record(folder)
    tensors = {plain_name(name): tensor for name, tensor in read_tensors(folder / WEIGHTS).items()}
    config, mark = _read_config(folder)
    known = marked_stacks(mark) | _recorded_stacks(record)
    layers, other_tensors = split(tensors, config, stacks_told_by(config, tensors, known))
    if not layers:
        raise CheckpointError(f"{folder / WEIGHTS} holds no LoRA layer.")
    for name, layer in layers.items():
        if layer.kind == "lora" and (form := marked_form(mark, name)):
            raise CheckpointError(
                f"{folder / WEIGHTS} lacks the start of layer {name!r}, which is {form}: what wrote it leaves out what "
                "doesn't train, as a Trainer under DeepSpeed's ZeRO-3 does; save with headstart.save_checkpoint, or a "
                "plain adapter with headstart.save_lora."
            )
    return AdapterFolder(folder, tensors, layers, other_tensors, config, record)


def record_to_save(layer: TargetLayer) -> dict[str, object]:
    """Return what is to be remembered of a layer in a file: how its start was made, and what its tensors don't tell."""
    base = layer.module.get_base_layer()
    content = record(layer)
    if content is None:
        sample = fingerprint(base, adapted_parameter(layer.module))
        content = {"method": None} | ({} if sample is None else {"weight": sample})
    quantised, stack = quantisation(base), stack_of(layer)
    if stack is not None:
        content |= {"stack": [stack.experts, stack.parameter]}
    return content | ({} if quantised is None else {"quantised": quantised})


def _read_record(folder: Path) -> dict[str, Any]:
    """Read and check ``headstart.json``; a folder that a Trainer wrote has none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that holds {CONFIG}.")
    if not (folder / RECORD).exists():
        return {}
    content = read_json(folder / RECORD)
    if content.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder / RECORD} has format {content.get('format')!r}, and this version of headstart reads {_FORMAT}: "
            "upgrade headstart."
        )
    expected = content.get("sha256", {}).get(WEIGHTS)
    if (folder / WEIGHTS).is_file() and sha256(folder / WEIGHTS) != expected:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or truncated (its checksum is not the one in {RECORD}): restore it from a "
            "copy."
        )
    return content


def _recorded_stacks(record: dict[str, Any]) -> dict[str, StackOf]:
    """Return what the record says of layers whose parameters stack matrices."""
    told = {name: (content or {}).get("stack") for name, content in record.get("layers", {}).items()}
    return {name: StackOf(int(stack[0]), str(stack[1])) for name, stack in told.items() if stack}


def _read_config(folder: Path) -> tuple[LoraConfig, object]:
    """Read the adapter's config, made plain, and the mark that it may have had."""
    content = read_json(folder / CONFIG)
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG} has peft_type {content.get('peft_type')!r}; headstart reads LORA.")
    config = plainly_named(LoraConfig.from_pretrained(str(folder)))
    mark = config.init_lora_weights
    # What it holds says that unaware programs must not load it; here the layers are made plain and then anchored.
    config.init_lora_weights = True
    return config, mark


def _check_targets(targets: dict[str, TargetLayer], layers: dict[str, AdapterLayer], folder: Path) -> None:
    missing = sorted(set(targets) ^ set(layers))
    if missing:
        raise CheckpointError(
            f"{folder} and the model don't adapt the same layers: {missing[0]!r} is only in "
            f"{'the model' if missing[0] in targets else 'the checkpoint'}."
        )


def check_form(target: TargetLayer, layer: AdapterLayer) -> None:
    """Raise CheckpointError where a layer's tensors can't be loaded into the form that the layer has."""
    form = form_of(target.module, target.adapter)
    if form is not None and layer.kind != form:
        saved_form = "plain" if layer.kind == "lora" else layer.kind
        raise CheckpointError(
            f"layer {target.name!r} is {form} in the model, and {saved_form} in the checkpoint; load it on a "
            "fresh base."
        )
    if layer.kind == "residual":
        own_anchors = anchors(target.module, target.adapter)
        same = own_anchors is not None and all(map(_same, own_anchors, (layer.A0, layer.B0)))
        if not same and residual_owner(target.module) is not None:
            raise CheckpointError(
                f"layer {target.name!r} was made residual with another start than the checkpoint's: load it on a fresh "
                "base model."
            )


def _prepare_layer(target: TargetLayer, layer: AdapterLayer, undo: ExitStack) -> None:
    """Give a layer the anchors that the checkpoint's tensors go with, and a residual one its residual weight."""
    module, adapter = target.module, target.adapter
    give_values(module, adapter, undo)
    if layer.core is not None:
        core = core_of(module, adapter)
        if core is None:
            undo.callback(drop_core, module, adapter)
            set_core(module, adapter, layer.core)
            undo.callback(watch(module, adapter, target.name))
        else:
            undo.callback(assign, core, core.detach().clone())
    if layer.A0 is None or layer.B0 is None:
        return
    before = anchors(module, adapter)
    if before is not None:
        undo.callback(set_anchors, module, adapter, before[0].detach().clone(), before[1].detach().clone(), layer.kind)
    else:
        undo.callback(drop_anchors, module, adapter)
    if layer.kind == "residual" and residual_owner(module) is None:
        for parameter, start in zip(both(module, adapter), (layer.A0, layer.B0), strict=True):
            parameter.data.copy_(start)
        subtract_product(target, undo)
    set_anchors(module, adapter, layer.A0, layer.B0, layer.kind)
    if layer.kind == "anchored":
        undo.callback(watch(module, adapter, target.name))


def _same(anchor: Tensor, saved: Tensor | None) -> bool:
    return (
        saved is not None
        and anchor.shape == saved.shape
        and bool(torch.equal(anchor.cpu(), saved.to(anchor.dtype).cpu()))
    )
