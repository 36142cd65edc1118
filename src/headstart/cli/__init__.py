"""The command line."""

from headstart.cli.app import main

__all__ = ["main"]
