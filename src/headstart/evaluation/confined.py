"""What a generated program's process does: give up all it can, run the program, tell how it went.

:mod:`headstart.evaluation.sandbox` starts this file in an interpreter of its own, with the limits as JSON in the only
argument and, as standard input, the program followed by a token. Standard output is the channel to tell how it went:
``ready``, then the token where the program came to its end, or else a reason and the traceback. What the program prints
goes to standard error. It imports the standard library alone, and little of it, as it starts once a program.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from types import ModuleType
from typing import Any

# The system calls that calculating needs, with their numbers on x86_64 and aarch64 ("-" where there is none). All else
# is refused, so that what nobody thought of is too: processes and threads, programs, sockets, other processes' memory,
# limits and signals, and whatever makes, changes or deletes a file.
_CALLS = """
read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 mmap:9:222 mprotect:10:226
munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 ioctl:16:29 pread64:17:67
readv:19:65 writev:20:66 access:21:- pipe:22:- select:23:- sched_yield:24:124 mremap:25:216 madvise:28:233 dup:32:23
dup2:33:- pause:34:- nanosleep:35:101 getitimer:36:102 alarm:37:- setitimer:38:103 getpid:39:172 socketpair:53:199
exit:60:93 wait4:61:260 kill:62:129 uname:63:160 fcntl:72:25 getcwd:79:17 chdir:80:49 fchdir:81:50 readlink:89:-
gettimeofday:96:169 getrlimit:97:163 getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176
geteuid:107:175 getegid:108:177 getppid:110:173 getpgrp:111:- getgroups:115:158 getresuid:118:148 getresgid:120:150
getpgid:121:155 getsid:124:156 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132
statfs:137:43 fstatfs:138:44 getpriority:140:141 gettid:186:178 time:201:- futex:202:98 sched_getaffinity:204:123
getdents64:217:61 fadvise64:221:223 clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 exit_group:231:94
epoll_wait:232:- epoll_ctl:233:21 tgkill:234:131 waitid:247:95 openat:257:56 newfstatat:262:79 readlinkat:267:78
faccessat:269:48 pselect6:270:72 ppoll:271:73 set_robust_list:273:99 epoll_pwait:281:22 eventfd2:290:19
epoll_create1:291:20 dup3:292:24 pipe2:293:59 prlimit64:302:261 getcpu:309:168 getrandom:318:278 membarrier:324:283
statx:332:291 rseq:334:293 faccessat2:439:439
"""
# Of these, the place of the argument that tells whether they are allowed, and the values that do;
# signals and limits are for the process itself.
_BY_VALUE: dict[str, tuple[int, list[int]]] = {
    "ioctl": (1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),  # TCGETS, TIOCGWINSZ, FION*, FIO*CLEX
    "fcntl": (1, [0, 1, 2, 3, 4, 1030, 1032]),  # not F_SETOWN, which has signals sent
    "socketpair": (0, [1]),  # Unix's, which asyncio wants and which leads nowhere
}
# Of these, the place of the flags; to write or to make is refused.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_BY_FLAGS = {"open": 1, "openat": 2}
# By machine: its place in the lists above, and its number in the kernel's audit, which a filter has to ask for.
_MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16
_SET_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 22, 38
_LONGEST_REPORT = 4096


def limit(memory: int, seconds: float) -> None:
    """Set the limits that POSIX has: address space, time, files, processes; what a platform lacks is passed over."""
    try:
        import resource
    except ImportError:
        return
    time = math.ceil(seconds) + 1
    wanted = dict(AS=memory, DATA=memory, CPU=time, FSIZE=0, NPROC=0, NOFILE=64, CORE=0, MEMLOCK=0, MSGQUEUE=0)
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            # A second more before the time limit kills, for the signal that says so.
            resource.setrlimit(kind, (value, value + 1 if name == "CPU" and value == time else value))
        except (ValueError, OSError):
            continue


def give_up(readable: list[str], parent: int) -> None:
    """Give up, on Linux, whatever calculating doesn't need: for good, and whoever the user is.

    Args:
        readable: files and folders that may be read, where the kernel has Landlock.
        parent: process that this one dies with.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.prctl(_SET_DEATH_SIGNAL, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _keep_to(libc, readable)
    # Root's capabilities, of which the system calls that are left still know one: to pass over who may read what.
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _filter_calls(libc)


def _keep_to(libc: Any, readable: list[str]) -> None:
    """Let nothing be read but these, nothing be written, no port be used, and no process outside be reached."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    version = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    handled = (ctypes.c_uint64 * 3)(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(create_ruleset, handled, ctypes.c_size_t(size), 0)
    for path in readable:
        if not os.path.exists(path):  # noqa: PTH110 - pathlib would double the time to start
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = (4 | 8) if os.path.isdir(path) else 4  # noqa: PTH112
        rule = rights.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        libc.syscall(add_rule, rules, 1, ctypes.c_char_p(rule), 0)
        os.close(place)
    libc.syscall(restrict_self, rules, 0)
    os.close(rules)


def _filter_calls(libc: Any) -> None:
    """Have the kernel refuse every system call that isn't listed (seccomp), with "Operation not permitted"."""
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 2**32:
        return
    column, audit = _MACHINES[machine]
    own = os.getpid()
    values = _BY_VALUE | {"kill": (0, [own]), "tgkill": (0, [own]), "prlimit64": (0, [0, own])}
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    steps = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    for row in _CALLS.split():
        name, number = row.split(":")[0], row.split(":")[column]
        if number == "-":
            continue
        block = [allow]
        if name in values:
            place, allowed = values[name]
            tests = [step for value in allowed for step in ((_EQUAL, 0, 1, value), allow)]
            block = [(_LOAD, 0, 0, _ARGUMENTS + 8 * place), *tests, refuse]
        elif name in _BY_FLAGS:
            block = [(_LOAD, 0, 0, _ARGUMENTS + 8 * _BY_FLAGS[name]), (_ANY_BIT, 1, 0, _WRITING), allow, refuse]
        steps += [(_EQUAL, 0, len(block), int(number)), *block]
    steps += [refuse]

    class Step(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step)))

    array = (Step * len(steps))(*(Step(*step) for step in steps))
    libc.prctl(_SET_SECCOMP, 2, ctypes.addressof(Filter(len(steps), array)), 0, 0)


def main() -> None:
    """Run the program of standard input; the process ends here."""
    read, write, close, leave = os.read, os.write, os.close, os._exit
    settings = json.loads(sys.argv[1])
    # The token stays in the file till the program has come to its end.
    token, report = os.dup(0), os.dup(1)
    source = b""
    while len(source) < settings["length"]:
        source += read(token, settings["length"] - len(source))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.argv = ["program.py"]
    sys.path += settings["path"]
    module = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    limit(settings["memory"], settings["seconds"])
    give_up(settings["readable"], settings["parent"])
    write(report, b"ready\n")
    try:
        exec(compile(source.decode("utf-8", "surrogatepass"), "program.py", "exec", dont_inherit=True), module.__dict__)
        told = read(token, 64)
    except MemoryError:
        told = b"memory\n"
    except SystemExit:
        told = b"failed\nit left by SystemExit before its last line"
    except BaseException as error:
        told = b"failed\n" + _described(error)
    write(report, told)
    close(report)
    try:
        sys.stdout.flush()
    finally:
        leave(0)


def _described(error: BaseException) -> bytes:
    """Return the end of the traceback, from the program's own lines on."""
    try:
        import traceback

        below = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, below))
    except BaseException:
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace")[-_LONGEST_REPORT:]


if __name__ == "__main__":
    main()
