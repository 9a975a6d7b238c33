"""What stays on a terminal of the lines about a running sweep: all trouble, and nothing else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from isoflop.cli.live import LiveProgress

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
