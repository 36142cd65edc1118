"""Running generated programs, each confined in a process of its own, and saying which of them ended well.

A program is source text that ends with its own checks; it passes if its last line is reached. On Linux (x86_64 and
aarch64, root or user, in a container or not) its process gives up, before the first line runs, all that calculating
doesn't need:

- every system call but a hundred (seccomp): no process or thread, no other program, no socket, no signal or limit
  for another process, nothing opened for writing, made, deleted, renamed or changed. As nothing can be started,
  there is nothing that could outlive the one process, and a kill ends all of it;
- what it may read (Landlock): Python's library, installed packages, its empty folder; neither files of the user nor
  the memory and environment of processes;
- root's capabilities, and address space, processor time and open files by the limits of POSIX;
- its environment, standard input and session; it is killed where its time is over, or where its starter dies.

Elsewhere there are the limits of POSIX (macOS) or that of time alone (Windows). What isn't contained where it runs,
:func:`containment` finds by trying, and says.

A program passes by a token, which is read from a file after its last line and handed to a pipe. Printing, exit codes,
``sys.exit`` and ``os._exit``, exceptions, and closing or replacing streams can't stand in for it. But checks and the
checked share an interpreter: a program written against this file can read the token early, or make its values compare
equal to anything. That forges its own result, and nothing else. Existence, size and date of files can be seen, and of
a fault in the kernel nothing here protects.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from headstart.errors import HeadstartError
from headstart.progress import Show, silent

Reason = Literal["passed", "failed", "timeout", "memory", "killed"]

_CONFINED = Path(__file__).with_name("confined.py")
_STARTING = 60.0  # seconds that an interpreter may take to come to a program's first line
_ENDING = 5.0
# What is read where Landlock allows only what is named: libraries, time zones, harmless devices.
_SYSTEM = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime"]
_SYSTEM += ["/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/dev/random"]
# A seed of hashes, so that a program that depends on the order of a set ends the same way each time; no threads.
_ENVIRONMENT = dict(PYTHONHASHSEED="0", PYTHONUTF8="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
_PASSED_ON = ("LD_LIBRARY_PATH", "SYSTEMROOT")  # without which some interpreters don't start
# By what a program could do: the least of it, which does no harm and is refused only where all of it is.
_TRIALS = {
    "start processes, which may outlive it": """
        import os, subprocess, sys
        if not hasattr(os, "fork"): subprocess.run([sys.executable, "-c", ""], check=True)
        elif os.fork() == 0: os._exit(0)""",
    "use the network": """
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))""",
    "make, change and delete files wherever this user can": """
        import os
        os.utime(os.getcwd())""",
    "kill or slow down other processes of this user": """
        import os
        parent = os.getppid()
        try: os.name == "nt" or os.kill(parent, 0)
        except OSError: os.setpriority(0, parent, os.getpriority(0, parent))""",
    "read files of this user and the environment of processes": """
        import os
        os.listdir(os.path.abspath(os.sep))""",
    "take more memory than it is allowed": """
        bytearray(2**28)""",
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        reason: ``"passed"``; ``"failed"`` by an exception or by leaving before its last line; ``"timeout"``;
            ``"memory"`` where it asked for more than it is allowed; ``"killed"`` by a signal of the system's, such as
            a segmentation fault's.
        detail: the end of the traceback, or a sentence; empty where it passed.
        printed: the beginning of what it printed, to either stream.
    """

    reason: Reason
    detail: str = ""
    printed: str = ""

    @property
    def passed(self) -> bool:
        """Whether the last line was reached."""
        return self.reason == "passed"


def run_program(source: str, *, seconds: float = 10.0, memory: int = 2 * 2**30, output: int = 2**16) -> Outcome:
    """Run a program, confined as this platform allows (see :func:`containment`), and say how it ended.

    It runs as a module named ``program``, with installed packages but for those that are links to source (editable
    ones). A program that needs a thread, a process, a socket or a file of its own fails, as these are refused.

    Args:
        source: the program, with its checks.
        seconds: of wall clock, from its first line on.
        memory: bytes of address space, of which the interpreter takes some 20 MB.
        output: bytes that are kept of what it prints.

    Raises:
        HeadstartError: no interpreter can be started.
    """
    token, text = secrets.token_hex(32).encode(), source.encode("utf-8", "surrogatepass")
    with (
        tempfile.TemporaryDirectory(prefix="headstart-program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as file,
    ):
        file.write(text + token)
        file.seek(0)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | _ENVIRONMENT
        packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        readable = [*_SYSTEM, *packages, folder, *environment.get("LD_LIBRARY_PATH", "").split(os.pathsep)]
        readable += [str(Path(sysconfig.get_path(name)).parent) for name in ("stdlib", "platstdlib")]
        settings = dict(length=len(text), memory=memory, seconds=seconds, parent=os.getpid(), path=packages)
        argument = json.dumps(settings | {"readable": readable})
        try:
            process = subprocess.Popen(
                [sys.executable, "-PSsB", str(_CONFINED), argument],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment | dict(HOME=folder, TMPDIR=folder),
                start_new_session=True,
            )
        except OSError as error:
            raise HeadstartError(f"{sys.executable!r} can't be started to run a program: {error}") from error
        over = True
        try:
            report, printed = _Reader(process.stdout, 2**13), _Reader(process.stderr, output)
            report.begun.wait(_STARTING)
            deadline = time.monotonic() + seconds
            # The channel is closed at the end: to wait for that takes no polling.
            report.join(seconds)
            process.wait(max(0.1, deadline - time.monotonic()))
            over = False
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
        report.join(_ENDING)
        printed.join(_ENDING)
    return _judged(bytes(report.kept), token, process.returncode, over, seconds, bytes(printed.kept))


def run_programs(
    sources: Sequence[str],
    *,
    workers: int | None = None,
    seconds: float = 10.0,
    memory: int = 2 * 2**30,
    output: int = 2**16,
    show: Show = silent,
) -> list[Outcome]:
    """Run programs as :func:`run_program` does, several at a time.

    Args:
        sources: the programs.
        workers: how many run at a time, each with ``memory``; by default as many as there are processors.
        seconds, memory, output: of each program.
        show: told how many have ended.

    Returns:
        Their outcomes, in the order of ``sources``.

    Raises:
        HeadstartError: no interpreter can be started.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        runs = [pool.submit(run_program, text, seconds=seconds, memory=memory, output=output) for text in sources]
        for count, run in enumerate(as_completed(runs), start=1):
            run.result()
            show("programs", count, len(runs))
        return [run.result() for run in runs]
    finally:
        pool.shutdown(cancel_futures=True)


def containment() -> list[str]:
    """Return, as sentences, what a program could do here that it shouldn't; none where all is contained.

    It is found by a program that tries each, once and without harm.

    Raises:
        HeadstartError: not even that program runs.
    """
    lines = []
    for number, trial in enumerate(_TRIALS.values()):
        lines += [
            "try:",
            *trial.splitlines()[1:],
            "except BaseException: pass",
            f"else: print('got through', {number})",
        ]
    outcome = run_program("\n".join(lines), memory=2**28)
    if not outcome.passed:
        raise HeadstartError(
            f"programs can't be run here: a harmless one ended with {outcome.detail or outcome.reason}"
        )
    through = outcome.printed.splitlines()
    return [
        f"On this platform a generated program can {deed}."
        for number, deed in enumerate(_TRIALS)
        if f"got through {number}" in through
    ]


class _Reader(threading.Thread):
    """Reads a pipe to its end and keeps its beginning."""

    def __init__(self, pipe: IO[bytes] | None, limit: int) -> None:
        super().__init__(daemon=True)
        assert pipe is not None
        self.pipe, self.limit, self.kept, self.begun = pipe, limit, bytearray(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.pipe:
            while chunk := os.read(self.pipe.fileno(), 2**16):
                self.kept += chunk[: self.limit - len(self.kept)]
                self.begun.set()
        self.begun.set()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and whatever it could start in its group."""
    if process.returncode is None:
        if os.name == "posix":
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait(_ENDING)


def _judged(report: bytes, token: bytes, code: int, over: bool, seconds: float, printed: bytes) -> Outcome:
    """Return the outcome from what was reported and how the process ended."""
    ready, _, rest = report.partition(b"\n")
    shown = printed.decode("utf-8", "replace")
    reason, _, told = rest.decode("utf-8", "replace").partition("\n")
    if ready != b"ready" and not over:
        last = "".join(shown.strip().splitlines()[-1:]) or "it said nothing"
        raise HeadstartError(f"a generated program's process ended with code {code} before it could begin: {last}")
    if secrets.compare_digest(rest, token):
        return Outcome("passed", "", shown)
    if over or (code < 0 and code == -signal.SIGXCPU):
        return Outcome("timeout", f"it ran longer than {seconds:g} s", shown)
    if reason == "memory":
        return Outcome("memory", "it asked for more memory than it is allowed", shown)
    if reason == "failed":
        return Outcome("failed", told, shown)
    if code < 0:
        return Outcome("killed", f"it was ended by signal {-code}", shown)
    return Outcome("failed", f"it left with exit code {code} before its last line", shown)
