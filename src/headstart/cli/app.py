"""The application: its commands, and how errors and Ctrl-C leave it."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

import typer

from headstart.cli.console import console

_PATIENCE = 10.0

app = typer.Typer(
    name="headstart",
    help="Every serious way to initialise LoRA, for any Hugging Face model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the entry point of the program ``headstart``.

    Exit codes: 0 done, 1 an error (one sentence on standard error), 2 wrong usage or settings, 130 interrupted.
    """
    # It says of every process with a CPU that an optional kernel is missing, whatever is asked for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Imported here, so that the commands can import the application.
    from headstart.cli import adapters, advise, cache, compare, dynamics, evaluate, methods, report, start, train  # noqa: F401
    from headstart.errors import HeadstartError, HeadstartWarning, RunError

    # Commands print a report's warnings themselves.
    warnings.filterwarnings("ignore", category=HeadstartWarning)
    # Transformers announces its own coming changes to whoever calls it, which here is PEFT.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Tokenizers warn about this variable in every process that forks, which data loading does.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # Commands return nothing: a number is the exit code of --help, or of an interrupt that Typer caught.
        code = app(arguments, standalone_mode=False)
    except HeadstartError as error:
        _let_the_first_speak()
        _say(f"error: {error}")
        # Settings that are none are wrong usage.
        sys.exit(2 if isinstance(error, RunError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        usage = _usage_error(error)
        if usage is not None:
            _say(usage)
            sys.exit(2)
        if os.environ.get("HEADSTART_DEBUG"):
            raise
        _let_the_first_speak()
        _say(f"error: {type(error).__name__}: {error} (unexpected; HEADSTART_DEBUG=1 shows where)")
        sys.exit(1)
    if code == 130:
        console.print("interrupted: what was finished is kept, and nothing is half-written.", markup=False)
    if code:
        sys.exit(code)


def _let_the_first_speak() -> None:
    """Wait, in other processes than the first, for the launcher to end them: the first mostly failed for the same.

    Where it didn't, the failure is this process's own, and said a little later.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE)


def _say(message: str) -> None:
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _usage_error(error: Exception) -> str | None:
    """Return the message of an error of Typer's own, such as a missing option; None for any other."""
    show = getattr(error, "format_message", None)
    if show is None or not hasattr(error, "exit_code"):
        return None
    context = getattr(error, "ctx", None)
    return f"error: {show()}" + (f" See {context.command_path} --help." if context is not None else "")
