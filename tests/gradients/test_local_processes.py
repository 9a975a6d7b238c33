"""Processes of one's own: they share a fate, and none outlives the process that started them, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from isoflop.core.local_processes import run_local_processes

pytestmark = pytest.mark.usefixtures("here")
SECONDS = 120.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS:g} s"
        time.sleep(0.05)


def living(folder: Path) -> list[int]:
    """Processes whose command names ``folder``, launchers included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if entry.name.isdigit() and str(folder).encode() in command and state != "Z":
            found.append(int(entry.name))
    return found


def alive(folder: Path, count: int) -> bool:
    return all((folder / f"alive-{rank}").exists() for rank in range(count))


def test_a_failure_ends_the_others_and_says_who_and_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"process 1 of 2 ended with code 1: ValueError: the second one fails"):
        run_local_processes("crowd_member:fail", tmp_path, 2)
    assert not living(tmp_path)


def test_a_killed_process_is_a_failure(tmp_path: Path) -> None:
    def killer() -> None:
        wait_for(lambda: alive(tmp_path, 2), "the start")
        os.kill(living(tmp_path)[0], signal.SIGKILL)

    threading.Thread(target=killer, daemon=True).start()
    with pytest.raises(RuntimeError, match="was ended by SIGKILL"):
        run_local_processes("crowd_member:sleep", tmp_path, 2)
    assert not living(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_none_is_left_when_the_one_that_started_them_is_killed(tmp_path: Path, way: signal.Signals) -> None:
    """Also with children of children, and while they work."""
    command = [sys.executable, "-m", "isoflop.core.local_processes", "crowd_member:launch_sleepers"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    launcher = subprocess.Popen(
        [*command, str(tmp_path), "0", "1", str(os.getpid())], stdin=subprocess.PIPE, env=environment
    )
    try:
        wait_for(lambda: alive(tmp_path / "below", 2), "the start")
        assert len(living(tmp_path / "below")) == 2
    finally:
        launcher.send_signal(way)
        launcher.wait()
    wait_for(lambda: not living(tmp_path), "the end of all processes")


def test_none_begins_to_work_for_a_parent_that_is_gone(tmp_path: Path) -> None:
    """A child that wakes up after its parent's end (here: told of another parent) leaves at once."""
    command = [sys.executable, "-m", "isoflop.core.local_processes", "crowd_member:sleep"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(
        [*command, str(tmp_path), "0", "1", "1"], stdin=subprocess.DEVNULL, env=environment, timeout=SECONDS
    )
    assert ended.returncode == 1
    assert not alive(tmp_path, 1)
