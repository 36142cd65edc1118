"""Starts for models larger than memory: from the shards on disk, two layers at a time, to an adapter on disk."""

from headstart.stream.residual import FOLDER, load_residual
from headstart.stream.run import stream_start
from headstart.stream.skeleton import task_type

__all__ = ["FOLDER", "load_residual", "stream_start", "task_type"]
