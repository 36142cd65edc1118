"""What leaves in diffusers' layout is read by diffusers' own loaders and does what the model did."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

import headstart as hs
from conftest import perturb, tiny_unet
from headstart.cli import main
from headstart.layers.find import lora_layers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

FILE = "pytorch_lora_weights.safetensors"


def unet():
    return tiny_unet().eval()


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def unet_inputs():
    draw = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw),
    }


def flux_inputs():
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 6, 4, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw),
        "pooled_projections": torch.randn(2, 8, generator=draw),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randn(6, 3, generator=draw),
        "txt_ids": torch.zeros(5, 3),
    }


# proj_out is at the root of FLUX, and in its single blocks.
MODELS = {
    "unet": (unet, unet_inputs, ["to_q", "to_v"], "unet"),
    "flux": (flux, flux_inputs, ["to_q", "to_v", "proj_out"], "transformer"),
}


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs()).sample


def train(model, inputs, steps=3):
    target = torch.randn(output(model, inputs).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    for _ in range(steps):
        (model(**inputs()).sample - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 3}}]
)
@pytest.mark.parametrize("method", ["pissa", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_start_train_save_load(kind, method, settings, tmp_path):
    make, inputs, targets, prefix = MODELS[kind]
    model = make()
    before = output(model, inputs)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    hs.initialize_(model, method, progress=False)
    assert torch.equal(output(model, inputs), before)
    train(model, inputs)
    wanted = output(model, inputs)
    assert (wanted - before).norm() > 1e-3 * before.norm()
    for name, options in (("exact", {}), ("cut", {"rank": 100}), ("uniform", {"uniform": True})):
        hs.save_lora(model, tmp_path / name, layout="diffusers", **options)
        assert [path.name for path in (tmp_path / name).iterdir()] == [FILE]
        loaded = make()
        loaded.load_lora_adapter(tmp_path / name, prefix=prefix, weight_name=FILE)
        assert (output(loaded, inputs) - wanted).norm() <= 1e-6 * wanted.norm(), name
        assert not (output(loaded, inputs) == before).all()


def test_a_model_that_peft_wrapped_leaves_alike(tmp_path):
    own, wrapped = unet(), get_peft_model(unet(), LoraConfig(r=4, target_modules=["to_q"]))
    own.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    for name, model in (("own", own), ("wrapped", wrapped)):
        hs.initialize_(model, "pissa", progress=False)
        perturb(model)
        hs.save_lora(model, tmp_path / name, layout="diffusers")
    tensors = []
    for name in ("own", "wrapped"):
        with safe_open(tmp_path / name / FILE, "pt") as file:
            tensors.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 8
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_checkpoints_of_a_model_with_adapters_of_its_own(tmp_path):
    """Whether PEFT's model is around it or not, here or there."""
    model = unet()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    wanted = output(model, unet_inputs)
    hs.save_checkpoint(model, tmp_path / "c")
    fresh, own, other = unet(), unet(), unet()
    own.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    other.add_adapter(LoraConfig(r=2, target_modules=["to_v"]), "other")
    for loaded in (
        hs.load_checkpoint(fresh, tmp_path / "c"),
        hs.load_checkpoint(own, tmp_path / "c"),
        hs.load_checkpoint(get_peft_model(unet(), LoraConfig(r=4, target_modules=["to_q"])), tmp_path / "c"),
    ):
        assert (output(loaded, unet_inputs) - wanted).norm() <= 1e-6 * wanted.norm()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(hs.CheckpointError, match="adapt the same layers"):
        hs.save_checkpoint(other, tmp_path / "other")
        hs.load_checkpoint(own, tmp_path / "other")
    hs.load_checkpoint(other, tmp_path / "c")
    assert set(other.peft_config) == {"other", "default"}
    after = other.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "other" in name)
    assert len(list(lora_layers(other, "default"))) == len(list(lora_layers(own, "default")))


def test_a_pipelines_loader_reads_it(tmp_path):
    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]))
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    hs.save_lora(model, tmp_path / "a", layout="diffusers")
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    tensors, alphas, metadata = mixin.lora_state_dict(tmp_path / "a", return_lora_metadata=True)
    loaded = unet()
    mixin.load_lora_into_unet(tensors, alphas, loaded, metadata=metadata)
    wanted = output(model, unet_inputs)
    assert (output(loaded, unet_inputs) - wanted).norm() <= 1e-6 * wanted.norm()


def test_the_command_line_writes_it_from_a_checkpoint(tmp_path):
    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]))
    hs.initialize_(model, "pissa", progress=False)
    perturb(model)
    hs.save_checkpoint(model, tmp_path / "c")
    main(["export", str(tmp_path / "c"), "--to", "diffusers", "--out", str(tmp_path / "a")])
    loaded = unet()
    loaded.load_lora_adapter(tmp_path / "a", prefix="unet", weight_name=FILE)
    wanted = output(model, unet_inputs)
    assert (output(loaded, unet_inputs) - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_diffusers_would_not_read_is_refused(tmp_path):
    model = get_peft_model(unet(), LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["conv_out"]))
    with pytest.raises(hs.CheckpointError, match=r"'conv_out.weight' is trained beside the layers"):
        hs.save_lora(model, tmp_path / "a", layout="diffusers")
    with pytest.raises(hs.CheckpointError, match="layout='kohya' is not one of"):
        hs.save_lora(model, tmp_path / "a", layout="kohya")
    assert not (tmp_path / "a").exists()
