"""What stays on a terminal of the lines about a running sweep: all trouble, and nothing else."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Lines, run_local, toy
from rich.console import Console

from isoflop.cli.live import LiveProgress
from isoflop.execute import WorkItem
from isoflop.sweep.display import Display, Slot
from isoflop.sweep.progress import Snapshot
from isoflop.sweep.queue import WorkQueue
from isoflop.sweep.resolve import resolve
from isoflop.sweep.summary import Summary

TROUBLE = [
    "toy/s toy-task failed, will be tried again: ValueError: no",
    "worker w0 lost: ActorDiedError",
    "worker w3 died while starting: WorkerCrashedError",
    "Ray has died: its raylet was killed by SIGKILL; starting it again",
    "Ray is not up after 30 s; waiting for at most 300 s (--ray-start-timeout)",
    "Ray's start failed (its gcs_server ended with exit code 1); once more",
    "no node of the cluster can run a job now; waiting for one (Ctrl-C ends the sweep)",
    "SIGINT: waiting for 1 running stage; once more to stop now",
    "stopped at once; what runs is dropped and will run again",
    "budget: 2 hours; 3 queued jobs are left",
    "waiting for MLflow: 20 rows to go (Ctrl-C: do not wait)",
]
PASSES = [
    "toy/s toy-task ok on w0 in 0.1 s: error 0.2500",
    "fitting laws",
    "writing the report",
    "stage tower computed by w1 in 2.0 s",
]


@pytest.mark.parametrize(("line", "stays"), [*((t, True) for t in TROUBLE), *((t, False) for t in PASSES)])
def test_trouble_stays_on_the_screen(line: str, stays: bool) -> None:
    shown = io.StringIO()
    with LiveProgress(Console(file=shown, force_terminal=True, width=100), "sweep") as progress:
        progress.line(line)
    assert (line[:60] in shown.getvalue()) == stays


@pytest.mark.usefixtures("toy_parts")
def test_a_job_in_this_process_is_shown_while_it_runs(tmp_path: Path) -> None:
    progress = Lines()
    slow = [{"toy-task": {"seconds": 0.11}}]  # longer than snapshots are apart
    run_local(toy(tasks=slow, methods=[{"toy-tokens": {"tokens": [1, 4]}}]), tmp_path, progress)
    seen = [(s["done"], s["running"]) for s in progress.snapshots]
    assert {(0, 1), (1, 1), (2, 1), (3, 1)} <= set(seen)
    assert seen[-1] == (4, 0)


@pytest.mark.usefixtures("toy_parts")
def test_what_a_worker_was_handed_besides_does_not_run() -> None:
    """Two workers run two jobs, however many they were handed; the others wait."""
    sweep = resolve(toy())
    jobs = [job for config in sweep.space.grid() for job in sweep.jobs_of(config)]
    items = [WorkItem(f"j{i}", "job", job) for i, job in enumerate(jobs)]
    queue = WorkQueue(0)
    slots = {"a": Slot(items[:2], 0.0), "b": Slot(items[2:4], 0.0), "c": Slot([], 0.0)}
    progress = Lines()
    quiet: Any = SimpleNamespace(
        best=None, job_seconds=None, backlog=lambda: 0, problem="", elapsed=0.0, seconds_left=lambda: None,
        expected_jobs=lambda points: 12, beside=lambda worker: None,
    )  # fmt: skip
    display = Display(progress, Summary(), quiet, quiet, queue, quiet, quiet, slots, quiet, lambda: 0.0)
    display.show(12, False, force=True)
    assert (progress.snapshots[-1]["running"], progress.snapshots[-1]["waiting"]) == (2, 2)
    slots["a"].items.pop(0)
    display.show(12, False, force=True)
    assert (progress.snapshots[-1]["running"], progress.snapshots[-1]["waiting"]) == (2, 1)
    slots["b"].items.insert(0, WorkItem("s", "stage", jobs[0], "key"))
    display.show(12, False, force=True)
    assert (progress.snapshots[-1]["running"], progress.snapshots[-1]["waiting"]) == (1, 2)


def test_the_terminal_is_drawn_while_this_thread_is_busy() -> None:
    shown = io.StringIO()
    with LiveProgress(Console(file=shown, force_terminal=True, width=100), "sweep") as progress:
        progress.update(Snapshot(done=3, total=8, running=1))
        deadline = time.monotonic() + 20
        while "3/8 jobs" not in shown.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "1 running" in shown.getvalue()
