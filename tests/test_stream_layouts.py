"""Experts that other layouts on disk hold: what Transformers can put together is read, or refused in a sentence."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import test_stream_experts
from headstart.errors import CheckpointError
from headstart.names import in_base
from headstart.stream import FOLDER
from headstart.stream.source import Source
from headstart.stream.tensors import TensorFile
from mixtures import COMMON
from streamed import top_files
from test_stream_experts import in_memory

IN, OUT = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class Reverse(MergeModulelist):
    """Stacks the experts from the last to the first."""

    def convert(self, input_dict, *arguments, **options):
        backwards = {pattern: tensors[::-1] for pattern, tensors in input_dict.items()}
        return super().convert(backwards, *arguments, **options)


class OneWay(Transpose):
    """A conversion that saving doesn't undo."""

    @property
    def reverse_op(self):
        return MergeModulelist(0)


@pytest.fixture
def mapped(monkeypatch):
    """Let Transformers store Mixtral's experts in another way."""
    conversion_mapping.get_checkpoint_conversion_mapping("mixtral")  # which fills what is replaced
    known = copy.copy(conversion_mapping._checkpoint_conversion_mapping_cache)
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known)

    def use(*transforms):
        conversion_mapping.register_checkpoint_conversion_mapping("MixtralForCausalLM", list(transforms))

    return use


@pytest.fixture
def folder(tmp_path):
    """A square mixture: a matrix and its transpose have one shape."""
    torch.manual_seed(0)
    config = MixtralConfig(**COMMON | {"intermediate_size": 32}, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    return tmp_path / "model"


def rewritten(folder, change):
    """Change the file's tensors: ``change`` is given a name and its tensor, and returns those in its place."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        tensors |= {key: value.contiguous() for key, value in change(name, tensor).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def compared(folder, tmp_path, form="anchored"):
    model, _ = in_memory(folder, "pissa", tmp_path / "memory", form, target_modules=[])
    streamed(folder, tmp_path, form)
    assert top_files(tmp_path / "stream") == top_files(tmp_path / "memory")
    if form == "residual":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "stream" / FOLDER, dtype="auto").state_dict()
        in_place = {name: value for name, value in model.base_model.model.state_dict().items() if ".lora_" not in name}
        assert {in_base(name) for name in in_place} == set(base)
        assert all(torch.equal(base[in_base(name)], value) for name, value in in_place.items())


def streamed(folder, tmp_path, form="anchored"):
    return test_stream_experts.streamed(folder, "pissa", tmp_path / "stream", form, target_modules=[])


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_as_the_model_holds_them(folder, tmp_path, form):
    """Saved with ``save_original_format=False``, what Mixtral has separately elsewhere."""
    assert any(name.endswith(IN) for name in load_file(folder / "model.safetensors"))
    compared(folder, tmp_path, form)


@pytest.mark.parametrize("checks", [False, True], ids=["always", "where shapes differ"])
@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_stacked_and_transposed(folder, tmp_path, mapped, form, checks):
    """A conversion that looks at the parameter's shape is shown one of as many experts as it is given."""
    mapped(*(WeightConverter(name, name, [Transpose(1, 2, check_dims=checks)]) for name in (IN, OUT)))
    turned = IN if checks else "experts"
    rewritten(folder, lambda name, tensor: {name: tensor.mT if turned in name else tensor})
    if checks and form == "residual":
        # Transformers itself leaves what it saves in the model's order then.
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.gate_up_proj'.*doesn't turn it back"):
            streamed(folder, tmp_path, form)
        return
    compared(folder, tmp_path, form)


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_gate_and_up_apart_each_a_stack(folder, tmp_path, mapped, form):
    def apart(name, tensor):
        if not name.endswith(IN):
            return {name: tensor}
        gate, up = tensor.chunk(2, dim=1)
        return {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}

    parts = ["mlp.experts.gate_proj", "mlp.experts.up_proj"]
    mapped(WeightConverter(parts, IN, [Concatenate(dim=1)]))
    rewritten(folder, apart)
    compared(folder, tmp_path, form)


def separately(name, tensor):
    if "experts" not in name:
        return {name: tensor}
    before, _, projection = name.rpartition(".")
    return {f"{before}.{place}.{projection}.weight": matrix for place, matrix in enumerate(tensor)}


def test_more_than_ten_experts_are_taken_in_the_order_of_their_numbers(tmp_path, mapped):
    torch.manual_seed(0)
    config = MixtralConfig(**COMMON, num_local_experts=12)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    compared(tmp_path / "model", tmp_path, "residual")


MERGE = [WeightConverter(f"mlp.experts.*.{name}.weight", f"mlp.experts.{name}", [MergeModulelist(0)])
         for name in ("gate_up_proj", "down_proj")]  # fmt: skip


@pytest.mark.parametrize("form", ["anchored", "residual"])
def test_one_tensor_for_each_expert(folder, tmp_path, mapped, form):
    mapped(*MERGE)
    rewritten(folder, separately)
    compared(folder, tmp_path, form)


def refused(folder, tmp_path, match, monkeypatch, form="anchored"):
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=match):
        streamed(folder, tmp_path, form)
    assert not (tmp_path / "stream").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("operation", [Reverse(0), MergeModulelist(1)], ids=["backwards", "along another side"])
def test_experts_that_are_not_taken_alone_are_refused(folder, tmp_path, mapped, monkeypatch, operation):
    mapped(MERGE[0], WeightConverter("mlp.experts.*.down_proj.weight", OUT, [operation]))
    rewritten(folder, separately)
    refused(folder, tmp_path, r"'model\.layers\.0\.mlp\.experts\.down_proj': .*can't be read one by one", monkeypatch)


def test_experts_that_two_parameters_share_are_refused(folder, tmp_path, mapped, monkeypatch):
    mapped(
        MERGE[1],
        WeightConverter(
            "mlp.experts.*.gate_up_proj.weight", [IN, "mlp.more.gate_up_proj"], [ErnieFuseAndSplitTextVisionExperts()]
        ),
    )
    rewritten(folder, separately)
    refused(folder, tmp_path, r"'model\.layers\.0\.mlp\.experts\.gate_up_proj'", monkeypatch)


@pytest.mark.parametrize("change", ["missing", "none", "type", "shape", "codes"])
def test_tensors_that_are_not_as_expected_are_refused(folder, tmp_path, mapped, monkeypatch, change):
    mapped(*MERGE)

    def changed(name, tensor):
        tensors = separately(name, tensor)
        for key in [key for key in tensors if "layers.1." in key and key.endswith("down_proj.weight")]:
            if change == "none" or (change == "missing" and ".2." in key):
                del tensors[key]
            elif ".2." in key:
                other = {"type": tensors[key].half(), "shape": tensors[key][:, :8], "codes": tensors[key].char()}
                tensors[key] = other.get(change, tensors[key])
        return tensors

    rewritten(folder, changed)
    words = {
        "missing": "holds 4 matrices, and .* has 3 tensors such as 'model.layers.1.mlp.experts.0.down_proj.weight'",
        "none": "has no tensor of its own",
        "type": "have types F32 and F16",
        "shape": "holds 4 matrices",
        "codes": "has type I8",
    }
    refused(folder, tmp_path, rf"'model\.layers\.1\.mlp\.experts\.down_proj'.*{words[change]}", monkeypatch)


def test_a_conversion_that_saving_does_not_undo_is_refused_for_residual_weights(folder, tmp_path, mapped, monkeypatch):
    mapped(WeightConverter(OUT, OUT, [OneWay(1, 2)]))
    rewritten(folder, lambda name, tensor: {name: tensor.mT if name.endswith(OUT) else tensor})
    compared(folder, tmp_path)
    shutil.rmtree(tmp_path / "stream")
    match = r"'model\.layers\.0\.mlp\.experts\.down_proj'.*form=\"anchored\""
    refused(folder, tmp_path, match, monkeypatch, "residual")


def test_a_tensor_named_as_the_model_does_is_found_beside_a_mapping_that_renames_it(folder, tmp_path, mapped):
    mapped(WeightRenaming("mlp.experts", "block.experts"))
    compared(folder, tmp_path)


def test_one_place_of_a_tensor_is_read(folder):
    source = Source.open(folder)
    name = f"model.layers.0.{OUT}"
    for place in range(4):
        assert torch.equal(source.read(name, place), source.read(name)[place : place + 1])
