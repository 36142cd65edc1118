"""``headstart train`` several times in one launch, and cut off on demand.

    launched.py ARGUMENTS [RANK STEP HOW]

ARGUMENTS is a JSON list of command lines. At a step of the first one a process is killed, or its training fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from accelerate import state
from accelerate.utils import DistributedType

from headstart.cli import main
from headstart.runs.watch import Watch


def shard_on_cpu():
    """Let Accelerate shard over the CPU's processes, which PyTorch can and Accelerate passes over in silence."""
    plain = state.AcceleratorState.__init__

    def sharding(self, *arguments, fsdp_plugin=None, **settings):
        plain(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = sharding


def cut_off(rank, step, how):
    def end(self, args, state, control, **_):
        if os.environ["RANK"] == rank and state.global_step == int(step):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the disk of this process is gone")

    Watch.on_step_end = end


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    if sys.argv[2:]:
        cut_off(*sys.argv[2:])
    for words in json.loads(sys.argv[1]):
        main(words)
