"""Programs that a model wrote, run apart: a process of its own in an empty folder, with limits, and killed with all it started.

Where the kernel lets it (Linux, user namespaces), the program also has no network and is the first process of its own
namespace. A program may start no process: for root, whom that limit does not bind, it fails when one is seen.

This is a guard against accidents of generated code, as in HumanEval's own harness, and no sandbox. A program may read and write what
its user may, in as many files as it likes. One that means harm can find the word for success through frames or the memory of its
parent, and without namespaces it can send signals to its user's processes, its keeper among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY = 2**30
"""Bytes of address space of a process."""
WRITTEN = 2**20
"""Most bytes of a file."""
NAMESPACES = True
"""Whether to ask the kernel for namespaces."""
GRACE = 30.0
"""Seconds that the keeper may take beside the program's own."""

_KEEPER = Path(__file__).with_name("keeper.py")


def passes(program: str, seconds: int) -> bool:
    """Whether a program runs to its end without an error, alone and in time.

    Args:
        seconds: of processor time; by the clock twice as many, and one more.
    """
    limits = [str(int(limit)) for limit in (seconds, MEMORY, WRITTEN, NAMESPACES)]
    with (
        tempfile.TemporaryDirectory(prefix="isoflop-program-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-I", str(_KEEPER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        ) as keeper,
    ):
        try:
            keeper.communicate(program.encode("utf-8", "replace"), timeout=2 * seconds + 1 + GRACE)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(keeper)
        return keeper.returncode == 0


def _end(keeper: subprocess.Popen[bytes]) -> None:
    """Ask a keeper that still runs to end its program and itself."""
    keeper.terminate()
    try:
        keeper.wait(GRACE)
    except subprocess.TimeoutExpired:
        keeper.kill()
