"""Whether an adapter needs the model's embeddings beside it, as PEFT decides it, without asking any hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import match_target_against_key
from torch import nn

from headstart.layers.files import downloaded
from headstart.layers.find import base_of
from headstart.layers.unwrap import plain_name

SaveEmbeddings = bool | Literal["auto"]


def needs_embeddings(model: nn.Module, config: LoraConfig) -> bool:
    """Return what PEFT's ``save_embedding_layers="auto"`` comes to.

    That is True where an embedding or the output layer is named in ``target_modules`` (and no tokens are trained by
    themselves), and where the vocabulary has another size than the base model's own config says. That config is looked
    up in the base model's folder, or in the hub's cache on this machine. Where it can't be found, as of a model made
    from a config, the vocabulary counts as unchanged.
    """
    if _is_targeted(model, config) and getattr(config, "trainable_token_indices", None) is None:
        return True
    size = _vocabulary(getattr(model, "config", None))
    name = config.base_model_name_or_path
    folder = _config_folder(name) if name else None
    if size is None or folder is None:
        return False
    try:
        original_size = _vocabulary(type(model.config).from_pretrained(str(folder), local_files_only=True))  # type: ignore[union-attr]
    except (OSError, ValueError):  # a damaged config; the model itself was loaded from elsewhere
        return False
    return original_size is not None and size != original_size


def _is_targeted(model: Any, config: LoraConfig) -> bool:
    targets = config.target_modules
    if isinstance(targets, str) and targets != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        names = map(plain_name, (name for name, _ in base_of(model).named_modules()))
        ends = re.compile(rf"(.*\.)?({'|'.join(EMBEDDING_LAYER_NAMES)})")
        return any(match_target_against_key(targets, name) for name in names if ends.fullmatch(name))
    return any(name in (targets or ()) for name in EMBEDDING_LAYER_NAMES)


def _vocabulary(config: Any) -> int | None:
    """Return the vocabulary's size; of a config with several parts, that of its text."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)


def _config_folder(name: str) -> Path | None:
    if (Path(name) / "config.json").is_file():
        return Path(name)
    return downloaded(name, "config.json")
