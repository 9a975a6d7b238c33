"""A script, and the first process of a program that a model wrote: it starts the program, watches it and ends all that it started.

``python -I keeper.py SECONDS MEMORY WRITTEN NAMESPACES < program`` ends with 0 if the program ran to its end, else with 1. It imports
nothing of isoflop. On Linux it adopts the orphans among its descendants, so that a process that detaches itself is found with or
without namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import resource
import secrets
import signal
import sys
import time
import types
from typing import Any

_PDEATHSIG, _CHILD_SUBREAPER = 1, 36
"""Numbers of prctl(2)."""
_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000
"""Of users, processes and the network, in the numbers of unshare(2)."""
POLL = 0.01
"""Seconds between looks at the program."""
PATIENCE = 10.0
"""Seconds for ending what the program left."""

_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> int:
    """Exit status: 0 if the program on standard input passes."""
    seconds, memory, written, namespaces = map(int, sys.argv[1:])
    source = sys.stdin.buffer.read()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if _libc is not None:
        if namespaces:
            _libc.unshare(_NAMESPACES)  # where it fails, the program runs without
        _libc.prctl(_CHILD_SUBREAPER, 1)
        _libc.prctl(_PDEATHSIG, signal.SIGTERM)  # after unshare, which clears it
    try:
        passed = _runs_through(source, seconds, memory, written)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_descendants()
    return 0 if passed else 1


def _runs_through(source: bytes, seconds: int, memory: int, written: int) -> bool:
    """Whether the program comes to its end in time and alone."""
    token = secrets.token_bytes(16)
    end, report = os.pipe()
    os.set_blocking(end, False)
    until = time.monotonic() + 2 * seconds + 1
    program = os.fork()
    if program == 0:
        os.close(end)
        _limit(seconds, memory, written)
        _run(source, report, token)
    os.close(report)
    while time.monotonic() < until:
        if _descendants(program):  # limits on processes do not bind root
            return False
        pid, status = os.waitpid(program, os.WNOHANG)
        if pid:
            with contextlib.suppress(BlockingIOError):  # somebody holds the other end and has written nothing
                # one byte more than is asked for: whoever writes more has not passed, and is not read
                return status == 0 and os.read(end, len(token) + 1) == token
            return False
        time.sleep(POLL)
    return False


def _limit(seconds: int, memory: int, written: int) -> None:
    """In the program's process: a session of its own, ended with the keeper, and limits that it cannot raise."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    if _libc is not None:
        _libc.prctl(_PDEATHSIG, signal.SIGKILL)
    for what, value in {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: written,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
    }.items():
        resource.setrlimit(what, (value, value))


def _run(source: bytes, report: int, token: bytes) -> None:
    """Run the program in a fresh ``__main__`` and say that it came to its end; no return.

    The token and the calls that are needed afterwards are locals: no module holds them, so that only frames lead there.
    """
    write, leave = os.write, os._exit
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        os.close(nothing)
        sys.argv = ["program"]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(source, "program", "exec"), module.__dict__)
        write(report, token)
        leave(0)
    finally:
        leave(1)


def _descendants(pid: int) -> list[int]:
    """Processes below one; none where /proc does not tell."""
    found = [pid]
    for one in found:  # grows
        for path in glob.glob(f"/proc/{one}/task/*/children"):
            with contextlib.suppress(OSError), open(path) as children:
                found += map(int, children.read().split())
    return found[1:]


def _end_descendants() -> None:
    """Kill until no child is left: orphans become children of this process, so that none is missed."""
    own, until = os.getpgrp(), time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                group = os.getpgid(pid)
                os.kill(pid, signal.SIGKILL)
                if group != own:
                    os.killpg(group, signal.SIGKILL)  # at once, while its members go on forking
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(POLL / 10)
            continue
        return


if __name__ == "__main__":
    sys.exit(main())
