"""Generated programs: what hostile ones try comes to nothing, and who passed is judged right."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from headstart.errors import HeadstartError
from headstart.evaluation import sandbox
from headstart.evaluation.sandbox import containment, run_program, run_programs


def kernel_lacks():
    """What the kernel, or the container around it, doesn't offer of what contains programs; asked of it directly."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "Linux on a processor whose system calls are known"
    if not Path("/proc/sys/kernel/seccomp/actions_avail").is_file():
        return "seccomp"
    landlock_create_ruleset, its_version = 444, 1
    offers = ctypes.CDLL(None, use_errno=True).syscall(landlock_create_ruleset, None, ctypes.c_size_t(0), its_version)
    return "" if offers > 0 else "Landlock"


linux = pytest.mark.skipif(bool(kernel_lacks()), reason=f"this kernel doesn't offer {kernel_lacks()}")

# Prints DONE with whatever of a program's attempts the system let through; lines that aren't refused at once show too.
PREFACE = """
import ctypes, fcntl, mmap, os, resource, signal, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
def attempt(number, deed):
    try:
        result = deed()
    except (OSError, RuntimeError, ValueError, MemoryError):
        return
    if result != -1:
        print("DONE", number)
"""


def left_processes(parent=None):
    """The programs' processes that this process (or ``parent``) has started, and what they have started in turn."""
    marks = ("confined.py", f'"parent": {parent or os.getpid()},')
    found = []
    for process in psutil.process_iter():
        try:
            if all(mark in " ".join(process.cmdline()) for mark in marks) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """After every test: no process, no folder, and another process of this user still alive."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    sibling = subprocess.Popen(["sleep", "300"])
    yield folder
    assert sibling.poll() is None
    sibling.kill()
    sibling.wait()
    assert left_processes() == []
    assert list(folder.iterdir()) == []


def through(deeds, names="", **settings):
    """The deeds, given as lines of expressions, that a program got through with."""
    deeds = [deed.strip() for deed in re.split("[;\n]", deeds) if deed.strip()]
    lines = [f"attempt({number}, lambda: {deed})" for number, deed in enumerate(deeds)]
    outcome = run_program(PREFACE + names + "\n".join(lines), **settings)
    assert outcome.passed, outcome
    return [deeds[int(line.split()[1])] for line in outcome.printed.splitlines()]


def test_attempts_that_nothing_forbids_are_seen():
    deeds = "os.getpid(); os.getpid; libc.getpid(); os.open(os.devnull, os.O_RDONLY); os.pipe()"
    assert through(deeds) == deeds.split("; ")


def change(monkeypatch, folder, before, after):
    """Have programs run by a changed copy of what confines them."""
    text = Path(sandbox.__file__).with_name("confined.py").read_text(encoding="utf-8")
    assert before in text
    (folder / "confined.py").write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(sandbox, "_CONFINED", folder / "confined.py")


@pytest.fixture(params=["all guards", "the filter alone"])
def guards(request, monkeypatch, tmp_path_factory):
    """The filter of system calls has to do without Landlock, where the kernel has none."""
    if request.param == "the filter alone":
        change(monkeypatch, tmp_path_factory.mktemp("changed"), "    _keep_to(libc, readable)\n", "")


@linux
def test_no_process_or_thread_is_started(guards):
    x86 = os.uname().machine == "x86_64"
    clone, execve = (56, 59) if x86 else (220, 221)
    deeds = f"""
        os.fork(); os.forkpty(); threading.Thread(target=print).start(); libc.unshare(0x10000000)
        os.posix_spawn('/bin/sleep', ['sleep', '100'], dict()); os.execv('/bin/sleep', ['sleep', '100'])
        subprocess.Popen(['sleep', '100']); subprocess.Popen(['sleep', '100'], start_new_session=True)
        libc.syscall({clone}, 17, 0, 0, 0, 0); libc.syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0)
        libc.syscall({execve}, b'/bin/true', 0, 0); libc.syscall(435, (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88)
    """
    assert through(deeds) == []


@linux
def test_a_bomb_of_processes_has_no_fuse():
    bomb = "import os\nfor _ in range(300):\n    try: os.fork()\n    except OSError: pass\nprint('one')"
    assert run_program(bomb).printed == "one\n"
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)"
    assert run_program(daemon).reason == "failed"


@linux
def test_no_other_process_is_touched(guards):
    before = os.nice(0), os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CPU)
    own = os.getpid()
    # By F_SETOWN the kernel would send SIGIO to the parent.
    deeds = f"""
        os.kill(parent, 0); os.kill(parent, signal.SIGSTOP); os.kill(parent, signal.SIGKILL); libc.kill({own}, 0)
        os.kill(-1, 0); os.kill(0, 0); os.kill(1, 0); os.killpg(os.getpgid(0), 0); os.pidfd_open({own})
        libc.tgkill({own}, {own}, 9); libc.sigqueue({own}, 9, 0); libc.syscall(424, 0, 9, 0, 0)
        resource.prlimit(parent, resource.RLIMIT_CPU, (0, 0)); resource.prlimit(parent, resource.RLIMIT_CPU)
        os.setpriority(os.PRIO_PROCESS, parent, 19); os.sched_setaffinity(parent, [0])
        libc.ptrace(16, parent, 0, 0); libc.process_vm_readv(parent, 0, 0, 0, 0, 0)
        fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, parent)
        fcntl.ioctl(socket.socketpair()[0], 0x8901, parent.to_bytes(4, sys.byteorder))
        open('/proc/{own}/oom_score_adj', 'w')
    """
    assert through(deeds) == []
    assert before == (os.nice(0), os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CPU))


@linux
def test_not_even_root_has_rights(tmp_path, guards):
    locked = tmp_path / "locked"
    locked.touch(0)
    bpf = 321 if os.uname().machine == "x86_64" else 280
    # 425 is io_uring_setup: what is asked of its queue, a filter of calls doesn't see.
    deeds = f"""
        os.setuid(1); os.setgroups([]); os.chroot('.'); libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0)
        libc.sethostname(b'owned', 5); libc.settimeofday((ctypes.c_long * 2)(1, 1), 0); libc.reboot(0)
        libc.prctl(4, 1, 0, 0, 0); libc.syscall({bpf}, 0, 0, 0); libc.syscall(425, 8, 0)
        open({str(locked)!r})
    """
    assert through(deeds) == []


@linux
def test_no_socket_is_opened(guards):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        deeds = f"""
            socket.create_connection(('127.0.0.1', {port}), timeout=1); libc.socket(2, 1, 0)
            socket.socket(socket.AF_INET, socket.SOCK_STREAM); socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            socket.socket(socket.AF_INET6); socket.socket(socket.AF_UNIX); socket.getaddrinfo('a.invalid', 80)
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        """
        assert through(deeds) == []
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@linux
def test_no_file_is_written_made_or_changed(tmp_path, guards):
    target, folder = tmp_path / "target.txt", tmp_path / "folder"
    target.write_text("as it was")
    folder.mkdir()
    target.chmod(0o666)
    tmp_path.chmod(0o777)
    before = target.stat()
    opened = [f"open({path}, {mode!r})" for path in ("target", "new", "'own.txt'") for mode in ("w", "a", "r+", "x")]
    deeds = """
        os.open(new, os.O_RDONLY | os.O_CREAT); os.open(target, os.O_RDONLY | os.O_TRUNC)
        os.open('.', os.O_TMPFILE | os.O_RDWR); libc.creat(new.encode(), 0o600)
        libc.syscall(437, -100, new.encode(), (ctypes.c_uint64 * 3)(0o102, 0o600, 0), 24)
        os.mkdir(new); os.mkdir('sub'); os.mkfifo(new); os.symlink('x', new); os.link(target, new)
        os.rename(target, new); os.unlink(target); os.rmdir(folder); os.truncate(target, 0); os.chmod(target, 0)
        os.chown(target, 1, 1); os.utime(target, (0, 0)); os.setxattr(target, 'user.x', b'1')
        os.write(0, b'x'); os.write(3, b'x'); os.memfd_create('x'); __import__('tempfile').mkstemp()
    """
    names = f"target, new, folder = {str(target)!r}, {str(tmp_path / 'new')!r}, {str(folder)!r}\n"
    assert through(deeds + "\n".join(opened), names) == []
    assert target.stat() == before and target.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "target.txt", "temporary"]


@linux
def test_nothing_is_read_but_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "a secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    places = [secret, "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem"]
    deeds = [f"open({str(path)!r}, 'rb').read(10)" for path in [*places, "/dev/kmsg", __file__]]
    deeds += [f"os.listdir({str(path)!r})" for path in (tmp_path, tmp_path / "temporary", "/", "/proc")]
    assert through("\n".join(deeds)) == []
    seen = run_program("import os\nprint(dict(os.environ), os.listdir(), os.path.isdir(os.environ['HOME']))")
    assert seen.passed and "secret" not in seen.printed and seen.printed.endswith("} [] True\n")


@linux
def test_memory_is_bounded(guards):
    allowed = 256 * 2**20
    deeds = f"""
        bytearray({allowed}); mmap.mmap(-1, {allowed}); libc.shmget(0, 4096, 0o1600); os.memfd_create('x')
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))
        [os.pipe() for _ in range(40)]
    """
    assert through(deeds, memory=allowed) == []
    eater = "taken = []\ntry:\n    while True: taken.append(bytearray(10**6))\nexcept MemoryError:\n"
    eaten = run_program(eater + "    count = len(taken)\n    del taken\n    print(count)", memory=allowed)
    assert eaten.passed and allowed / 2 < int(eaten.printed) * 10**6 < allowed
    for greedy in ("[bytearray(10**6) for _ in range(10**6)]", "x = 'a' * 10**12", "x = [0]\nwhile True: x += x"):
        assert run_program(greedy, memory=allowed).reason == "memory"


ENDLESS = {
    "a loop": "while True: pass",
    "a sleep": "import time\ntime.sleep(1000)",
    "a loop in C": "x = 10**10**7\nx**x",
    "signals ignored": "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, lambda *_: None)\n"
    "    except (OSError, ValueError): pass\nwhile True:\n    try:\n        while True: pass\n    except: pass",
    "a stop": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "a flood": "while True: print('x' * 10000)",
    "channels closed": "import os, time\nos.closerange(0, 64)\ntime.sleep(1000)",
    "input": "import select\nselect.select([], [], [])",
    "a message that never ends": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_does_not_end_is_ended(source):
    began = time.monotonic()
    outcome = run_program(source, seconds=1, output=1000)
    assert outcome.reason == "timeout" and outcome.detail == "it ran longer than 1 s"
    assert 1 <= time.monotonic() - began < 6 and len(outcome.printed) <= 1000


CHECK = "\ndef check(candidate):\n    assert candidate(2) == 4\ncheck(double)\n"
JUDGED = {
    "right": ("def double(x):\n    return 2 * x" + CHECK, "passed", ""),
    "wrong": ("def double(x):\n    return x" + CHECK, "failed", "AssertionError"),
    "a name missing": ("def double(x):\n    return y" + CHECK, "failed", "NameError: name 'y' is not defined"),
    "unfinished": ("def double(x):\n    return (2 *" + CHECK, "failed", "SyntaxError"),
    "empty": ("", "passed", ""),
    "a recursion without end": ("def double(x): return double(x)" + CHECK, "failed", "RecursionError"),
    "left early": ("import sys\nsys.exit(0)" + CHECK, "failed", "SystemExit before its last line"),
    "left at the end": ("import sys\nsys.exit(0)", "failed", "SystemExit before its last line"),
    "left at once": ("import os\nos._exit(0)" + CHECK, "failed", "exit code 0 before its last line"),
    "left from within": ("def double(x): exit()" + CHECK, "failed", "NameError"),
    "exit replaced": ("import os, sys\nos._exit = sys.exit = os.write = os.read = print\nassert 0", "failed", "Assert"),
    "an interrupt": ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "killed", "signal 11"),
    "killed by itself": ("import os\nos.kill(os.getpid(), 9)", "killed", "signal 9"),
    "claims": ("print('passed', 'ready', flush=True)\nassert 0", "failed", "AssertionError"),
    "claims anywhere": ("import os\nfor n in (1, 2, 4): os.write(n, b'passed')\nos._exit(0)", "failed", "exit code 0"),
    "at exit": ("import atexit, time\natexit.register(time.sleep, 100)", "passed", ""),
    "streams closed": ("import sys\nsys.stdout.close()\nsys.stdout = None", "passed", ""),
    "input": ("input()", "failed", "EOFError"),
    "other alphabets": ("größe = '猫🐈'\nassert len(größe) == 2\nprint(größe)", "passed", ""),
    "half a character": ("x = '\ud800'", "failed", "surrogates not allowed"),
    "a null": ("x = 1\0", "failed", "null bytes"),
    "not the main module": ("assert __name__ == 'program'\nif __name__ == '__main__': 1 / 0", "passed", ""),
    "a data class": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1) == A(1)",
        "passed",
        "",
    ),
    "asyncio": ("import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3", "passed", ""),
    "an installed package": ("import numpy\nassert numpy.linalg.inv(numpy.eye(3)).sum() == 3", "passed", ""),
    "a long traceback": ("raise ValueError('x' * 10**6 + 'end')", "failed", "xxend"),
    "a message that fails": ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "failed", "E"),
}


@pytest.mark.parametrize("source, reason, detail", JUDGED.values(), ids=JUDGED)
def test_programs_are_judged(source, reason, detail):
    outcome = run_program(source)
    assert (outcome.reason, outcome.passed) == (reason, reason == "passed"), outcome
    assert detail in outcome.detail and len(outcome.detail) <= 4096 and bool(detail) == bool(outcome.detail)


def test_what_is_printed_is_kept_from_the_beginning():
    noisy = "import sys\nprint('first', flush=True)\nfor _ in range(1000): print('é' * 1000, file=sys.stderr)"
    outcome = run_program(noisy, output=999)
    assert outcome.passed and outcome.printed.startswith("first\né") and len(outcome.printed.encode()) <= 1002


def test_the_same_program_ends_the_same_way():
    order = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({outcome.printed for outcome in run_programs([order] * 4)}) == 1


def test_programs_run_side_by_side():
    shown = []
    sources = [f"import time\ntime.sleep(0.5)\nassert {number} % 3" for number in range(20)]
    began = time.monotonic()
    outcomes = run_programs(sources, workers=10, show=lambda *step: shown.append(step))
    assert time.monotonic() - began < 8
    assert [outcome.passed for outcome in outcomes] == [number % 3 > 0 for number in range(20)]
    assert shown == [("programs", count, 20) for count in range(1, 21)]
    assert run_programs([]) == []


def test_an_interrupt_ends_what_runs():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_program("while True: pass", seconds=60)
        assert time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGUSR1, before)


@linux
def test_a_program_does_not_begin_without_its_starter(monkeypatch, tmp_path):
    change(monkeypatch, tmp_path, 'settings["parent"])', 'settings["parent"] + 1)')
    with pytest.raises(HeadstartError, match="ended with code 1 before it could begin: it said nothing"):
        run_program("pass")


@linux
def test_a_program_dies_with_its_starter(nothing_left):
    starter = os.fork()
    if starter == 0:
        run_program("import time\ntime.sleep(60)", seconds=60)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not (programs := left_processes(starter)) and time.monotonic() < deadline:
        time.sleep(0.05)
    # Some 50 ms after its process there is the program.
    time.sleep(2)
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    psutil.wait_procs(programs, timeout=5)
    assert programs and left_processes(starter) == []
    # A killed starter can't tidy up; what it leaves is one empty folder.
    (folder,) = nothing_left.iterdir()
    folder.rmdir()


@linux
def test_all_is_contained_here():
    assert containment() == []


def test_what_is_not_contained_is_said(monkeypatch, tmp_path):
    change(monkeypatch, tmp_path, 'limit(settings["memory"], settings["seconds"])\n    give_up(', "print(")
    said = containment()
    assert len(said) == len(sandbox._TRIALS) == 6
    assert all(line.startswith("On this platform a generated program can ") for line in said)


@linux
def test_without_landlock_reading_is_said(monkeypatch, tmp_path):
    change(monkeypatch, tmp_path, "_keep_to(libc, readable)\n", "pass\n")
    (said,) = containment()
    assert "read files of this user" in said


def test_a_process_that_does_not_begin_is_no_failed_program(monkeypatch, tmp_path):
    change(monkeypatch, tmp_path, "def main() -> None:", "raise RuntimeError('out of order')\ndef main() -> None:")
    with pytest.raises(HeadstartError, match="ended with code 1 before it could begin: RuntimeError: out of order"):
        run_programs(["pass"] * 3)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(HeadstartError, match=r"'/nowhere/python' can't be started"):
        run_program("pass")


PLACES = [Path(__file__).parents[up] / "shared/data/humaneval/HumanEval.jsonl.gz" for up in (1, 2)]
HUMAN_EVAL = next((path for path in PLACES if path.exists()), None)


@pytest.mark.skipif(HUMAN_EVAL is None, reason="HumanEval's file isn't in shared/data")
def test_humaneval_is_judged_right():
    with gzip.open(HUMAN_EVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def passed(completions):
        parts = zip(rows, completions, strict=True)
        sources = [f"{row['prompt']}{text}\n{row['test']}\ncheck({row['entry_point']})\n" for row, text in parts]
        return sum(outcome.passed for outcome in run_programs(sources, workers=2))

    assert len(rows) == passed([row["canonical_solution"] for row in rows]) == 164
    assert passed(["    return None\n"] * 164) == 0
