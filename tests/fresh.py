"""Programs run in forks of an interpreter that has imported what takes long, and nothing of PEFT's or headstart's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys, traceback
for name in {names}:
    __import__(name)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate([os.devnull, asked["out"], asked["err"]]):
            os.dup2(os.open(path, os.O_RDWR), number)
        code = 1
        try:
            exec(asked["program"], dict(__name__="__main__"))
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # to take everything down would take longer than most programs
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Interpreter:
    """One that has imported ``names``; it starts with the first program."""

    def __init__(self, *names):
        self.names = names
        self.server = None

    def run(self, program):
        """Run a program's text to its end as ``python -c`` would, with one thread; return what it printed."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            out.touch()
            err.touch()
            try:
                code = self._asked({"program": program, "out": str(out), "err": str(err)})
            except BaseException:
                self.close()
                raise
            assert code == 0, err.read_text()
            return out.read_text(), err.read_text()

    def _asked(self, request):
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVER.format(names=self.names)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            assert self.server.stdout.readline() == "ready\n"
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self):
        """End it, and what it may still be running."""
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.communicate()
            self.server = None
