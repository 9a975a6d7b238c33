"""Programs that a model wrote, run apart: a process of its own in an empty folder, with limits, and killed with all it started.

Where the kernel lets it (Linux, user namespaces), the program also has no network and is the first process of its own
namespace, so that whatever it starts ends with it. Limits are no sandbox: it may read what its user may read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

MEMORY = 2**30
"""Bytes of address space of a process."""
WRITTEN = 2**20
"""Most bytes of a file."""

_CHILD = """
import ctypes, os, resource, signal, sys
token, seconds, memory, written = sys.argv[1], *map(int, sys.argv[2:])
source = sys.stdin.buffer.read()
def limit(what, value):
    resource.setrlimit(what, (value, value))
limit(resource.RLIMIT_CPU, seconds)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, written)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NOFILE, 64)
libc = ctypes.CDLL(None) if sys.platform == "linux" else None
USER, PID, NET = 0x10000000, 0x20000000, 0x40000000
if libc is not None and libc.unshare(USER | PID | NET) == 0:
    inner = os.fork()  # the first of its namespace: with it ends all that it started
    if inner:
        _, status = os.waitpid(inner, 0)
        os._exit(0 if status == 0 else 1)
    libc.prctl(1, signal.SIGKILL)  # and it ends with the process that waits for it
else:
    with open(os.devnull) as nothing:
        limit(resource.RLIMIT_NPROC, 0)  # does not bind root
report = os.dup(1)
os.dup2(2, 1)
sys.argv = ["program"]
exec(compile(source, "program", "exec"), {"__name__": "__main__"})
os.write(report, token.encode())
os._exit(0)
"""


def passes(program: str, seconds: int) -> bool:
    """Whether a program runs to its end without an error, and in time.

    Args:
        seconds: of processor time; by the clock twice as many, and one more.
    """
    token = secrets.token_hex(16)  # so that a program that leaves early does not pass
    limits = [str(seconds), str(MEMORY), str(WRITTEN)]
    with tempfile.TemporaryDirectory(prefix="isoflop-program-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, token, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(program.encode("utf-8", "replace"), timeout=2 * seconds + 1)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        return said == token.encode()
