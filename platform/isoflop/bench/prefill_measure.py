"""What both sides of ``isoflop bench prefill`` measure, with nothing but the standard library: a peer may live in another environment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A call's result, its CPU seconds, and by how many bytes it raised the process' resident memory at most."""
    before = _memory("VmRSS")
    _forget_peak()
    start = time.process_time()
    result = call()
    seconds = time.process_time() - start
    return result, {"seconds": seconds, "peak_bytes": float(max(0, _memory("VmHWM") - before))}


def asked() -> dict[str, Any]:
    """What the bench wants of this side: the file that the command line names."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return found


def answer(rows: list[dict[str, Any]]) -> None:
    """Hand the rows to the bench, in the file that the command line names second."""
    Path(sys.argv[2]).write_text(json.dumps(rows))


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is of what follows
