"""One process of a crowd; imports nothing that takes time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def live(folder: Path, rank: int, count: int) -> None:
    """Write down who it is, and live for a while."""
    task = json.loads((folder / "task.json").read_text())
    with Path(task["log"]).open("a") as file:
        file.write(f"member {os.getpid()} of {os.getppid()}\n")
    time.sleep(task["seconds"])
