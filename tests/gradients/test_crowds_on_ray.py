"""Stages of several processes on Ray: they get their slots, and deadlines and kills leave no process behind.

How long processes take to start depends on what else the machine does. No test here guesses it: what must happen after a
start waits for what the processes wrote down, and a deadline that they must reach is a multiple of a measured start.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import isoflop

pytestmark = pytest.mark.usefixtures("crowd_parts", "cluster")
HERE, ENGINE = Path(__file__).parent, Path(__file__).parents[1] / "engine"
SECONDS = 120.0


@pytest.fixture(scope="module")
def crowd_parts(toy_parts: ModuleType, here: None) -> Iterator[None]:
    """The crowd family, registered for the tests of this module."""
    from isoflop.models.family import FAMILIES

    importlib.import_module("crowd_parts")
    yield
    FAMILIES._entries.pop("crowd")
    sys.modules.pop("crowd_parts")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A private Ray on loopback with two CPUs."""
    import ray

    from isoflop.execute.ray_node import start_private_ray

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(ENGINE), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    start_private_ray(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    patch.undo()


def run(tmp_path: Path, **changes: Any) -> Any:
    spec = {
        "name": "crowd",
        "import": ["toy_parts", "crowd_parts"],
        "methods": [{"toy-tokens": {"tokens": [4]}}],
        "tasks": ["toy-task"],
        "limits": {"retries": 0},
        **changes,
    }
    return isoflop.run(
        spec, executor="ray", tracking_uri="none", store=str(tmp_path / "store"), cache_dir=tmp_path / "cache"
    )


def members(parts: ModuleType, tmp_path: Path) -> list[tuple[int, int]]:
    """Processes of crowds and their parents, as far as they have begun."""
    lines = parts.log_lines(tmp_path / "cache", "member ")
    return [(int(line.split()[1]), int(line.split()[3])) for line in lines]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS:g} s"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_nothing_runs_beside_a_stage_that_needs_both_slots(tmp_path: Path, toy_parts: ModuleType) -> None:
    """Jobs of 0.3 s are at work when the crowd's turn comes; it waits for them, and they wait for it."""
    opened = run(
        tmp_path,
        models=["toy/s", {"crowd/s": {"seconds": 1.5}}],
        methods=[{"toy-tokens": {"tokens": [1, 2, 4, 8, 16]}}],
        tasks=[{"toy-task": {"seconds": 0.15}}],
    )
    assert opened.summary.ok == 10
    rows = opened.results().to_pylist()
    (begins,), (ends,) = (
        [float(line.split()[2]) for line in toy_parts.log_lines(tmp_path / "cache", f"crowd {what}")]
        for what in ("begins", "ends")
    )
    for row in (r for r in rows if r["model"] == "toy/s"):
        start = row["started"].timestamp()
        assert start >= ends or start + row["wall_seconds"] <= begins, (begins, ends, start)


def seconds_of_a_crowd(parts: ModuleType, tmp_path: Path) -> float:
    """What processes that have nothing to do take here and now."""
    assert run(tmp_path, models=[{"crowd/s": {"seconds": 0.0}}]).summary.ok == 1
    (begins,), (ends,) = (
        [float(line.split()[2]) for line in parts.log_lines(tmp_path / "cache", f"crowd {what}")]
        for what in ("begins", "ends")
    )
    return ends - begins


def test_a_deadline_ends_all_processes(tmp_path: Path, toy_parts: ModuleType) -> None:
    """With a later deadline again, should the machine have become so busy that not all had begun."""
    deadline = 4 * seconds_of_a_crowd(toy_parts, tmp_path / "measured")
    for attempt in range(4):
        place = tmp_path / str(attempt)
        opened = run(
            place,
            models=[{"crowd/s": {"seconds": 3600.0}}],
            limits={"stage_timeout": deadline * 4**attempt, "retries": 0},
        )
        assert (opened.summary.ok, opened.summary.failed) == (0, 1)
        assert "deadline" in opened.results().to_pylist()[0]["error_text"]
        found = members(toy_parts, place)
        wait_for(lambda found=found: all(gone(pid) for pid, _ in found), "the end of all processes")
        if len(found) == 2:
            return
    pytest.fail(f"not all processes had begun {deadline * 4**3:g} s after their stage")


def test_a_killed_worker_takes_its_processes_along_and_the_stage_is_computed_again(
    tmp_path: Path, toy_parts: ModuleType
) -> None:
    ended = threading.Event()

    def killer() -> None:
        """Kill the first crowd's worker once all have begun; let the second crowd end at once."""
        while not ended.wait(0.05):
            if len(begun := members(toy_parts, tmp_path)) >= 2:
                os.kill(begun[0][1], signal.SIGKILL)
                (tmp_path / "cache" / "enough").touch()
                return

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    try:
        opened = run(tmp_path, models=[{"crowd/s": {"seconds": 3600.0}}], limits={"retries": 1})
    finally:
        ended.set()
        thread.join()
    assert opened.summary.ok == 1
    found = members(toy_parts, tmp_path)
    assert len(found) == 4
    assert len({parent for _, parent in found}) == 2
    wait_for(lambda: all(gone(pid) for pid, _ in found), "the end of all processes")
