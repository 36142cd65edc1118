"""Tiny random models of every architecture that the tests speak of, and helpers to wrap and perturb them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Factors that a test before has left would hide what a test is about; the cache's own tests switch it on.
os.environ["HEADSTART_CACHE_LIMIT"] = "0"

from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import headstart as hs
from fresh import Interpreter
from headstart.layers.factors import both
from headstart.layers.find import lora_layers
from headstart.layers.weights import whole
from headstart.methods import method_class
from headstart.methods.base import ANY_LAYER

# Pytest shows values of failed assertions in files of tests alone, unless it is told of others.
pytest.register_assert_rewrite("cached", "fisher", "known_layers", "passes", "snapshots")


def pytest_configure(config):
    # Of its own for each process: two that compile the same at once read each other's unfinished files.
    folder = tempfile.TemporaryDirectory(prefix="headstart-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    config.add_cleanup(folder.cleanup)
    # What is imported stays; each training run would look through it several times for what can go.
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test before has set: sums over several threads differ in their last digit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """Of this process alone, as DistributedDataParallel wants one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'init'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


VOCABULARY = 97
# By the names that most architectures have for them.
WIDTHS = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
TEXT = dict(**WIDTHS, vocab_size=VOCABULARY, max_position_embeddings=64)
GROUPED = dict(**TEXT, num_key_value_heads=2)

# The models are tiny and the tests run in several processes: more threads would only get in each other's way.
torch.set_num_threads(1)


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(GROUPED | dict(num_hidden_layers=2, pad_token_id=0) | changes)))


def tiny_mixtral(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    settings = GROUPED | dict(
        num_hidden_layers=1,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        experts_implementation="eager",
    )
    return MixtralForCausalLM(MixtralConfig(**(settings | changes)))


def word_tokenizer(words, unknown="<unk>"):
    """A tokenizer with one token a word; <pad> and <eos>, which pad and end, are among the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token=unknown)


class LinearExperts(nn.Module):
    """A mixture of experts as Mixtral's, each expert three nn.Linear layers; the last one is never chosen."""

    def __init__(self, width, inner, experts=4, chosen=2):
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "w1": nn.Linear(width, inner, bias=False),
                    "w2": nn.Linear(inner, width, bias=False),
                    "w3": nn.Linear(width, inner, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat)
        blocked = torch.arange(scores.shape[1], device=scores.device) == scores.shape[1] - 1
        weights, picks = scores.masked_fill(blocked, float("-inf")).softmax(-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, rank = torch.where(picks == number)
            if len(tokens):
                inner = nn.functional.silu(expert["w1"](flat[tokens])) * expert["w3"](flat[tokens])
                out = out.index_add(0, tokens, expert["w2"](inner) * weights[tokens, rank, None])
        return out.reshape(x.shape)


def tiny_experts():
    """A Llama whose feed-forward parts are mixtures of linear experts."""
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = LinearExperts(32, 24)
    return model


def tiny_qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED, num_hidden_layers=2, tie_word_embeddings=False))


def tiny_tied():
    return tiny_llama(tie_word_embeddings=True)


def tiny_roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**TEXT, num_hidden_layers=2, pad_token_id=0, num_labels=3))


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.1,
        )
    )


def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TEXT, num_hidden_layers=2, num_labels=3))


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(**WIDTHS, num_hidden_layers=2, image_size=16, patch_size=8, num_labels=3)
    )


def tiny_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def token_batch(size=4, length=12, seed=0, padded=True):
    """Random token ids with right padding and prompts whose labels don't count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(size):
        prompt = 1 + row % 3
        labels[row, :prompt] = -100
        if padded and row % 2:
            cut = length - 2 * row
            mask[row, cut:] = 0
            ids[row, cut:] = 0
            labels[row, cut:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def class_batch(size=4, length=12, seed=0):
    batch = token_batch(size, length, seed)
    batch["labels"] = torch.arange(size) % 3
    return batch


def image_batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
        "labels": torch.arange(size) % 3,
    }


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict], list[str] | str]] = {
    "llama": (tiny_llama, token_batch, "all-linear"),
    "gpt2": (tiny_gpt2, token_batch, ["c_attn", "c_fc", "c_proj"]),
    "t5": (tiny_t5, token_batch, ["q", "v", "wi", "wo"]),
    "bert": (tiny_bert, class_batch, ["query", "value", "dense"]),
    "vit": (tiny_vit, image_batch, ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]),
}

# Those that give back what quantisation took need a quantised base.
ANY_BASE = [name for name in hs.method_names() if not method_class(name)().wants(ANY_LAYER).original]


def _kinds():
    """One of all methods that want the same and give the same: what happens around a method follows from these."""
    kinds = {}
    for name in ANY_BASE:
        method = method_class(name)()
        kinds.setdefault((str(method.wants(ANY_LAYER)), method.form, method.freezes, method.shares_ranks), name)
    return list(kinds.values())


KINDS = _kinds()
QUICK = {"inilora": "solver=adam,steps=20", "lora-sb": "samples=4,lr=1e-3"}


def quick(name):
    """A method with settings that are quick; of a new one, too."""
    settings = QUICK.get(name, "samples=4" if method_class(name)().wants(ANY_LAYER).data else "")
    return f"{name}:{settings}" if settings else name


def wrap(base: nn.Module, **changes):
    settings = dict(r=4, lora_alpha=8, target_modules="all-linear")
    if base.config.model_type == "gpt2":
        settings["fan_in_fan_out"] = True
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**(settings | changes)))


def injected(base, config):
    """A model with PEFT's layers in it and no PeftModel around it, as transformers' ``add_adapter`` makes it."""
    inject_adapter_in_model(config, base, "default")
    base._hf_peft_config_loaded = True
    return base


def added(base, config):
    """The same, made by transformers itself, which asks for a release of PEFT of its own choice."""
    try:
        base.add_adapter(config, "default")
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(
            f"transformers {version('transformers')} does not add adapters with PEFT {version('peft')}: {error}"
        )
    return base


WRAPPERS = pytest.mark.parametrize("wrapped", [injected, added])


def started(base: nn.Module, method="init-ab", *, seed=0, data=None, form="anchored", **changes):
    """Wrap and initialise."""
    model = wrap(base, **changes)
    hs.initialize_(model, method, seed=seed, data=data, preserve=data, form=form)
    return model


@torch.no_grad()
def factors_of(module: nn.Module, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of a layer: what it holds, or where it holds differences to a start, start and difference together."""
    A, B = (whole(part.detach()).clone() for part in both(module, adapter))
    if adapter in getattr(module, "lora_start_A", ()):
        A = module.lora_start_A[adapter].weight.detach() + A
        B = module.lora_start_B[adapter].weight.detach() + B
    return A, B


def all_factors(model: nn.Module, adapter: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {target.name: factors_of(target.module, adapter) for target in lora_layers(model, adapter)}


def listed_factors(model: nn.Module) -> list[torch.Tensor]:
    """The factors of all layers, not all of which are zero."""
    factors = [factor for pair in all_factors(model).values() for factor in pair]
    assert any(factor.count_nonzero() for factor in factors)
    return factors


@torch.no_grad()
def perturb(model: nn.Module, scale: float = 0.02, seed: int = 5, adapter: str = "default") -> None:
    """Move every factor a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for target in lora_layers(model, adapter):
        for weight in both(target.module, adapter):
            weight.add_(scale * torch.randn(weight.shape, generator=generator).to(weight.dtype))


@torch.no_grad()
def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    training = model.training
    model.eval()
    out = model(**batch).logits
    model.train(training)
    return out


def assert_refused_without_headstart(fresh, folder, sentence):
    """That a program with PEFT alone fails with the sentence where it loads the checkpoint in ``folder / "c"``."""
    tiny_llama().save_pretrained(folder / "base")
    script = f"""
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(folder / "base")!r})
try:
    PeftModel.from_pretrained(base, {str(folder / "c")!r})
except ValueError as error:
    assert {sentence!r} in str(error), error
else:
    raise SystemExit("loaded silently")
assert "headstart" not in sys.modules
"""
    fresh.run(script)


@pytest.fixture(scope="session")
def fresh():
    """Runs programs that find neither PEFT nor headstart imported, and all that PEFT imports."""
    interpreter = Interpreter("accelerate", "bitsandbytes", "transformers.models.llama.modeling_llama")
    yield interpreter
    interpreter.close()


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def batch():
    return token_batch()


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many KiB."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place]
        if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems can't be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)
