"""A start by headstart inside ms-swift: ``--external_plugins headstart_plugin.py --callbacks headstart``.

The environment variable HEADSTART names the method, such as ``pissa`` or ``lora-one:samples=8``, which reads the
batches that the trainer trains on, by the model's own loss.
"""

from __future__ import annotations

import os
from typing import Any

from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback

import headstart as hs


class Headstart(TrainerCallback):
    """Start the adapter when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give every layer its start, unless the run goes on from a checkpoint."""
        if state.global_step == 0:
            print(hs.initialize_(self.trainer.model, os.environ["HEADSTART"], data=self.trainer.get_train_dataloader()))


callbacks_map["headstart"] = Headstart
