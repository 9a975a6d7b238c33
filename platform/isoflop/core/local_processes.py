"""A function in several processes of this host, none of which outlives the process that started them.

Each child asks the kernel to be killed with its parent (Linux) and watches a pipe that only the parent holds open
(everywhere), so that neither a deadline, nor ``kill -9`` of a worker, nor an exception leaves one behind. They are fresh
interpreters, since a fork of a process with threads may hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 1.0  # after the first failure: the others' messages tell who began


def run_local_processes(entry: str, folder: Path, count: int) -> None:
    """Call ``entry(folder, rank, count)`` in ``count`` processes and wait for all of them.

    They share no memory: whatever they are told and whatever they answer lies as files in ``folder``, where their
    standard output and errors go, too (``rank-<n>.log``).

    Args:
        entry: ``package.module:function``.

    Raises:
        RuntimeError: one of them failed; the others are killed. Names the process and its last words.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            started.append(_start(entry, folder, rank, count))
        _wait(started)
        failed = {rank: p.poll() for rank, p in enumerate(started) if p.poll() not in (0, None)}
        if failed:
            raise RuntimeError("; ".join(f"process {r} of {count} {_ending(c, folder, r)}" for r, c in failed.items()))
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _start(entry: str, folder: Path, rank: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", __name__, entry, str(folder), str(rank), str(count), str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    with (folder / f"rank-{rank}.log").open("wb") as log:
        # A session of its own: Ctrl-C in a terminal is for the driver, which decides what happens to running work.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or a little while after one has failed."""
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if deadline == float("inf") and any(process.poll() not in (0, None) for process in processes):
            deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(_POLL_SECONDS)


def _ending(code: int | None, folder: Path, rank: int) -> str:
    lines = (folder / f"rank-{rank}.log").read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    return f"{how}: {said[-1][:300]}" if said else how


def _die_with(parent: int) -> None:
    """From now on this process ends when ``parent`` does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_end_with_input, daemon=True).start()
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os._exit(1)


def _end_with_input() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(1)


def _main(arguments: Sequence[str]) -> None:
    entry, folder, rank, count, parent = arguments
    _die_with(int(parent))
    code = 1
    try:
        module, _, name = entry.partition(":")
        getattr(importlib.import_module(module), name)(Path(folder), int(rank), int(count))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without an interpreter's shutdown, in which communication libraries are known to abort


if __name__ == "__main__":
    _main(sys.argv[1:])
