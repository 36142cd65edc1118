"""Calling PEFT's own starts on a model that is wrapped already, and taking their factors over.

PEFT changes the frozen weight where its start subtracts something. Here each weight is put back, and what PEFT made is
installed like any other start: anchored by default, so that all methods of a comparison have the same base model.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft import replace_lora_weights_loftq as peft_loftq
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import prepare_model_inputs_fn_language_modeling
from torch import Tensor, nn

from headstart.errors import BASE_PREFIX, DataError, HeadstartError, LayerError, MethodError
from headstart.layers.find import TargetLayer, lora_layers
from headstart.layers.install import check_factors
from headstart.layers.weights import full_precision, quantisation
from headstart.methods.base import Factors, Needs
from headstart.methods.handed import EVA, CorDA, HandedOver, LoftQ, MiCA, PiSSANiter
from headstart.progress import Show
from headstart.statistics.batches import Batch, iterate_samples, single_sample
from headstart.statistics.processes import Processes, is_sharded
from headstart.statistics.quiet import adapters_off, dropout_off

Starts = list[tuple[TargetLayer, Factors]]
# EVA reads its data again and again until its vectors stand still; more often than this, they never will.
_EVA_PASSES = 100
# Whose forward hooks PEFT leaves behind where an error ends its start, and what CorDA notes on base layers.
_HOOKING = ("peft.tuners.lora.eva", "peft.tuners.lora.corda")
_REORDERS = "support_avx512bf16_for_cpu"
_NOTES = ("sample_count", "covariance_matrix", "corda_method", "rank", "eigens")


@torch.no_grad()
def peft_starts(
    method: HandedOver,
    model: nn.Module,
    layers: Sequence[TargetLayer],
    data: Iterable[Any] | None,
    seed: int,
    show: Show,
    **reading: Any,
) -> Starts:
    """Return the layers with the factors that PEFT computes; ``reading`` goes to ``iterate_samples``.

    EVA may have changed ranks, or taken a layer's adapter away: the layers returned are those that are left. Then, and
    only then, an error later on finds the model changed.

    Raises:
        MethodError, LayerError, DataError: the model, a layer or the data are not what PEFT's start works on.
    """
    if Needs.WEIGHT in method.needs:
        _check_dense(method, layers)
    _check_processes(method, model)
    batches: list[Batch] = []
    if Needs.INPUTS in method.needs:
        if data is None:
            raise DataError(f"method {method.name!r} needs data: give batches as data=.")
        batches = [each.batch for each in iterate_samples(data, method.sample_count(), **reading)]
    # What PEFT does to all layers at once (eva, loftq); layer by layer each weight is put back as soon as it is done.
    with _weights_kept(layers), _modules_kept(model, layers):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                starts = _starts(method, model, layers, batches, show)
            for layer, factors in starts:
                check_factors(layer, factors)
            return starts
        except HeadstartError:
            raise
        except (ValueError, TypeError, OSError, RuntimeError, LookupError, AssertionError) as error:
            raise MethodError(f"method {method.name!r}: PEFT says: {str(error).rstrip('.')}.") from error


def _starts(
    method: HandedOver, model: nn.Module, layers: Sequence[TargetLayer], batches: Sequence[Batch], show: Show
) -> Starts:
    if isinstance(method, EVA):
        return _eva(method, model, layers, batches)
    if isinstance(method, CorDA):
        _covariances(method, model, layers, batches)
    elif isinstance(method, LoftQ):
        _loftq(method, model, layers)
    return _one_by_one(method, layers, show)


def _check_processes(method: HandedOver, model: nn.Module) -> None:
    if is_sharded(model) or (Needs.INPUTS in method.needs and Processes.joined().several):
        raise MethodError(
            f"method {method.name!r} is PEFT's own, which does not share its work between processes: initialise in "
            "one, before the model is sharded, and load the checkpoint in the others."
        )


def _check_dense(method: HandedOver, layers: Sequence[TargetLayer]) -> None:
    for layer in layers:
        if kind := quantisation(layer.module.get_base_layer()):
            raise LayerError(
                f"layer {layer.name!r} is quantised ({kind}), and PEFT's {method.name} wants its weight in floating "
                "point; load the base unquantised, or use another method."
            )


@contextmanager
def _weights_kept(layers: Sequence[TargetLayer]) -> Iterator[None]:
    """Put every frozen weight and factor back after the block; PEFT sets new tensors and leaves the old ones be."""
    held: list[tuple[nn.Parameter, Tensor]] = []
    for layer in layers:
        factors = (layer.module.lora_A[layer.adapter].weight, layer.module.lora_B[layer.adapter].weight)
        held += [(each, each.data.clone()) for each in factors]
        weight = layer.module.get_base_layer().weight
        held.append((weight, weight.data))
    try:
        yield
    finally:
        for parameter, before in held:
            parameter.data = before


@contextmanager
def _modules_kept(model: nn.Module, layers: Sequence[TargetLayer]) -> Iterator[None]:
    """Put every module's mode back after the block, and remove the hooks and notes that PEFT left, done or not."""
    modules = list(model.modules())
    # By name: PEFT makes parts of a layer anew when its rank changes, and a new dropout would be switched on.
    modes = {name: module.training for name, module in model.named_modules()}
    # bitsandbytes would reorder 4-bit weights for evaluation on a CPU, and compute with them what training doesn't.
    reordering = [module for module in modules if getattr(module, _REORDERS, False)]
    bases = [layer.module.get_base_layer() for layer in layers]
    fresh = [[name for name in _NOTES if name not in vars(base)] for base in bases]
    try:
        for module in reordering:
            setattr(module, _REORDERS, False)
        yield
    finally:
        for module in reordering:
            setattr(module, _REORDERS, True)
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
        for module in modules:
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) in _HOOKING:
                    del module._forward_hooks[key]
        for base, names in zip(bases, fresh, strict=True):
            for name in names:
                vars(base).pop(name, None)


def _one_by_one(method: HandedOver, layers: Sequence[TargetLayer], show: Show) -> Starts:
    """Let PEFT make each layer's factors, and copy them."""
    starts: dict[type[HandedOver], Callable[[Any, str], None]] = {
        PiSSANiter: lambda module, adapter: module.pissa_init(adapter, f"pissa_niter_{_iterations(method)}"),
        MiCA: lambda module, adapter: module.mica_init(adapter),
        CorDA: lambda module, adapter: module.corda_init(adapter, "corda"),
        LoftQ: lambda module, adapter: None,  # done for all layers at once
    }
    made: Starts = []
    for layer in layers:
        # Layer by layer, so that one weight is held twice, not all.
        with _weights_kept([layer]), full_precision([layer.module]):
            starts[type(method)](layer.module, layer.adapter)
            parts = (layer.module.lora_A, layer.module.lora_B)
            A, B = (part[layer.adapter].weight.detach().float().clone() for part in parts)
        keeps = isinstance(method, MiCA | LoftQ)
        frozen = ("lora_B",) if isinstance(method, MiCA) else ()
        made.append((layer, Factors(A, B, offset="keep" if keeps else "subtract", frozen=frozen)))
        show("factorising", len(made), len(layers))
    return made


def _iterations(method: HandedOver) -> int:
    return method.iterations if isinstance(method, PiSSANiter) else 0


def _covariances(method: CorDA, model: Any, layers: Sequence[TargetLayer], batches: Sequence[Batch]) -> None:
    """Let PEFT collect the covariances of the layers' inputs; it leaves what it needs on each base layer."""
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ModuleNotFoundError as error:  # PEFT doesn't require all that it imports there
        raise MethodError(f"method 'corda' needs the package attrs ({error}): pip install attrs.") from error
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [f"{layer.name}.base_layer" for layer in layers]
    ranks = {name: layer.r for name, layer in zip(names, layers, strict=True)}
    config = LoraConfig(target_modules=names, rank_pattern=ranks)
    config.corda_config = CordaConfig(corda_method=method.mode)

    def read() -> None:
        for batch in batches:
            for index in range(next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))):
                base(**_moved(single_sample(batch, index), base))

    # It squeezes the first dimension away, so samples have to come one at a time, without padding.
    with dropout_off(model), adapters_off([layer.module for layer in layers]):
        preprocess_corda(base, config, read)


def _loftq(method: LoftQ, model: Any, layers: Sequence[TargetLayer]) -> None:
    for layer in layers:
        if quantisation(layer.module.get_base_layer()) != "4-bit":
            raise LayerError(
                f"layer {layer.name!r} is not quantised to 4 bits, and loftq makes up for what that loses; load the "
                "base with BitsAndBytesConfig(load_in_4bit=True), or use another method."
            )
    if not torch.accelerator.is_available():
        raise MethodError("method 'loftq': PEFT's code for it runs on an accelerator only, and there is none here.")
    path = method.model_path or getattr(model.get_base_model().config, "_name_or_path", None)
    peft_loftq(model, model_path=str(path) if path and Path(path).exists() else None, adapter_name=layers[0].adapter)


def _eva(method: EVA, model: Any, layers: Sequence[TargetLayer], batches: Sequence[Batch]) -> Starts:
    """Let PEFT find the vectors, and give layers their new ranks where those change."""
    adapter = layers[0].adapter
    if not isinstance(model, PeftModel) or list(model.active_adapters) != [adapter]:
        raise MethodError("method 'eva' works on a PeftModel with one active adapter, the one to initialise.")
    config = copy.copy(model.peft_config[adapter])
    labels = batches[0].get("labels")
    by_label = method.tokens == "labels" and isinstance(labels, Tensor) and labels.dim() == 2
    config.eva_config = EvaConfig(
        rho=method.rho,
        tau=method.tau,
        use_label_mask=by_label,
        whiten=method.whiten,
        adjust_scaling_factors=method.adjust_scaling,
    )
    config.init_lora_weights = "eva"
    before, model.peft_config[adapter] = model.peft_config[adapter], config
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # PEFT prints a line for every batch that it skips
            found = _eva_vectors(model, adapter, batches)
        named = {f"{BASE_PREFIX}{layer.name}": layer for layer in layers}
        if any(len(found[name]) != layer.r for name, layer in named.items() if name in found):
            initialize_lora_eva_weights(model, eva_state_dict=dict(found), adapter_name=adapter)
            config.init_lora_weights = True
            before = config
    finally:
        model.peft_config[adapter] = before
    made: Starts = []
    for layer in lora_layers(model, adapter):
        A = found[f"{BASE_PREFIX}{layer.name}"].float()
        made.append((layer, Factors(A, torch.zeros(layer.d_out, layer.r, device=A.device), offset="keep")))
    return made


def _eva_vectors(model: Any, adapter: str, batches: Sequence[Batch]) -> dict[str, Tensor]:
    calls = 0

    def forward(model: Any, inputs: Batch) -> Any:
        nonlocal calls
        calls += 1
        if calls > _EVA_PASSES * len(batches):
            raise DataError(
                f"method 'eva': its vectors did not stand still in {_EVA_PASSES} readings of the data; give more "
                "samples in larger batches (a batch must hold more tokens than rho r), or a lower tau."
            )
        return model(**inputs)

    masked = "attention_mask" in batches[0]
    # A mask by tokens where the data have one; else every position of every input counts.
    rest: dict[str, Any] = {} if masked else {"prepare_layer_inputs_fn": _all_positions}
    return get_eva_state_dict(
        model,
        list(batches),
        adapter_name=adapter,
        forward_fn=forward,
        prepare_model_inputs_fn=prepare_model_inputs_fn_language_modeling if masked else None,
        show_progress_bar=False,
        **rest,
    )


def _all_positions(inputs: Any, model_inputs: Any, name: str) -> Tensor:
    first: Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
    return first.flatten(0, -2)


def _moved(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
