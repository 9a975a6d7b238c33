"""What processes that the tests start do, other than train; imports nothing that takes time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def live(folder: Path, rank: int, count: int) -> None:
    """Write down who it is, and live for a while, or until ``enough`` lies beside the log."""
    task = json.loads((folder / "task.json").read_text())
    log, end = Path(task["log"]), time.monotonic() + task["seconds"]
    with log.open("a") as file:
        file.write(f"member {os.getpid()} of {os.getppid()}\n")
    while time.monotonic() < end and not (log.parent / "enough").exists():
        time.sleep(min(0.05, task["seconds"]))


def sleep(folder: Path, rank: int, count: int) -> None:
    """Live on, having said so."""
    (folder / f"alive-{rank}").touch()
    time.sleep(600)


def fail(folder: Path, rank: int, count: int) -> None:
    """The second one fails while the first would live on."""
    if rank == 1:
        raise ValueError("the second one fails")
    time.sleep(600)


def launch_sleepers(folder: Path, rank: int, count: int) -> None:
    """Start sleepers of one's own, in the folder of the same name below."""
    from isoflop.core.local_processes import run_local_processes

    (folder / "below").mkdir()
    run_local_processes("crowd_member:sleep", folder / "below", 2)
