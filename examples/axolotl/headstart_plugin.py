"""A start by headstart inside Axolotl: ``plugins: [headstart_plugin.Headstart]`` and ``headstart: METHOD``."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import headstart as hs
from headstart.methods import parse_method


class HeadstartArgs(BaseModel):
    """What the plug-in reads of the YAML file."""

    headstart: str = "pissa"
    headstart_seed: int = 0


class Headstart(BasePlugin):
    """Start the adapter: from the weights as soon as it is there, or from the trainer's data before it trains."""

    def get_input_args(self) -> str:
        """Return where the settings are described."""
        return "headstart_plugin.HeadstartArgs"

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Start by a method that reads no data, before anything is sharded."""
        if not parse_method(cfg.headstart).reads_task:
            print(hs.initialize_(model, cfg.headstart, seed=cfg.headstart_seed))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Start by a method that reads data: the trainer's samples, through its collator and loss."""
        if parse_method(cfg.headstart).reads_task:
            print(hs.initialize_(trainer.model, cfg.headstart, data=trainer, seed=cfg.headstart_seed))
