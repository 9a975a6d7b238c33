"""The estimate of the time left: right where everything is known, and falling while a stage runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isoflop.cli.live import counts, times
from isoflop.sweep.api import RunOptions, run_resolved
from isoflop.sweep.blocks import Budget
from isoflop.sweep.progress import Quiet, Snapshot
from isoflop.sweep.resolve import resolve
from isoflop.sweep.spending import Spending
from isoflop.sweep.summary import Summary
from isoflop.sweep.timing import JOB, TimeLeft


def measured(job: float = 1.0, **stages: float) -> TimeLeft:
    left = TimeLeft()
    left.took(JOB, job)
    for kind, seconds in stages.items():
        left.took(kind, seconds)
    return left


def test_nothing_is_said_before_a_job_has_ended() -> None:
    left = TimeLeft()
    left.took("cell", 10.0)
    assert left.left([], {"cell": 3}, 3, 0, 1) is None


def test_known_work_is_counted_and_shared_among_the_workers() -> None:
    left = measured(job=2.0, cell=10.0, tower=30.0)
    assert left.left([], {"cell": 3, "tower": 1}, 5, 0, 1) == pytest.approx(3 * 10 + 30 + 5 * 2)
    assert left.left([], {"cell": 3, "tower": 1}, 5, 0, 2) == pytest.approx(35)


def test_it_falls_second_by_second_while_a_stage_runs_and_never_rises_when_that_takes_longer() -> None:
    left = measured(job=1.0, cell=10.0)
    seen = [left.left([("cell", float(since))], {}, 4, 0, 1) for since in range(30)]
    assert all(later is not None and earlier is not None and later <= earlier for earlier, later in pairwise(seen))
    assert seen[0] == pytest.approx(14)
    assert seen[5] == pytest.approx(9)
    assert seen[29] == pytest.approx(4 + 1)


def test_the_last_stage_takes_its_time_however_many_workers_there_are() -> None:
    left = measured(job=1.0, cell=10.0)
    assert left.left([], {"cell": 1}, 1, 0, 100) == pytest.approx(10)
    assert left.left([("cell", 4.0)], {}, 1, 0, 100) == pytest.approx(6)


def test_jobs_that_are_not_proposed_yet_bring_stages_as_the_last_ones_did() -> None:
    left = measured(job=1.0, tower=100.0, cell=10.0)
    left.queued(["tower", "cell"])  # a shared stage that only the first job brings
    for index in range(63):
        left.queued(["cell"] if index % 2 else [])
    assert left.left([], {}, 0, 20, 1) == pytest.approx(20 * (1 + 10 / 2))


def test_recent_durations_count_because_models_grow() -> None:
    left = measured(job=1.0)
    for seconds in [1.0] * 50 + [20.0] * 8:
        left.took("cell", seconds)
    assert left.left([], {"cell": 1}, 0, 0, 1) == pytest.approx(20)


def test_a_kind_that_has_not_run_is_taken_for_a_mean_one() -> None:
    assert measured(job=1.0, cell=10.0, tower=30.0).left([], {"features": 2}, 0, 0, 1) == pytest.approx(40)
    assert measured(job=3.0).left([], {"features": 2}, 0, 0, 1) == pytest.approx(6)


def test_workers_that_compute_stages_are_not_called_idle() -> None:
    assert counts(Snapshot(total=32, stages_left=8, stages_running=2)) == "0/32 jobs · 2 stages running · 6 more to go"
    assert counts(Snapshot(total=32, done=4, running=1, stages_left=2, stages_running=1)) == (
        "4/32 jobs · 1 running · 1 stage running · 1 more to go"
    )
    assert counts(Snapshot(total=32, stages_left=1)) == "0/32 jobs · 0 running · 1 stage to go"


@pytest.mark.parametrize(
    ("budget", "elapsed", "flops", "left"),
    [
        ({}, 100.0, 1e6, None),
        ({"trials": 9}, 100.0, 1e6, None),
        ({"hours": 2}, 1800.0, 0.0, 5400.0),
        ({"hours": 2}, 9000.0, 0.0, 0.0),
        ({"flops": 4e6}, 100.0, 1e6, 200.0),  # 1e6 of earlier sessions, 1e6 in 100 s: 2e6 more at that rate
        ({"flops": 4e6}, 100.0, 0.0, None),
        ({"hours": 2, "flops": 4e6}, 100.0, 1e6, 200.0),
    ],
)
def test_the_time_left_ends_with_the_budget(
    budget: dict[str, Any], elapsed: float, flops: float, left: float | None
) -> None:
    now = [0.0]
    spending = Spending(Budget(**budget), Summary(), 1, lambda: now[0])
    spending.start()
    spending.spent_before(1e6)
    now[0] = elapsed
    spending.spend(flops)
    assert spending.seconds_left() == (None if left is None else pytest.approx(left))


def test_a_sweep_without_end_counts_down_to_its_budget() -> None:
    """A search over real numbers has no number of jobs; its hours are known all the same."""
    assert "about 1:30:00 left" in times(Snapshot(total=None, done=4, eta=5400.0))
    assert "left" not in times(Snapshot(total=4, done=4, eta=5400.0))
    assert "left" not in times(Snapshot(total=None, done=4, eta=None))


def test_the_seconds_of_stages_are_counted_beside_those_of_jobs(tmp_path: Path, toy_parts: ModuleType) -> None:
    """Jobs of a millisecond behind a training of a third of a second: the jobs' time alone would be a hundredth of it."""
    spec: dict[str, Any] = {"name": "s", "methods": ["toy-full"], "tasks": ["toy-task"]}
    spec |= {"import": ["toy_parts"], "models": [{"toy/s": {"seconds": 0.3}}]}
    options = RunOptions(
        executor="local", tracking_uri="none", store=str(tmp_path / "store"), cache_dir=tmp_path / "cache"
    )
    found = run_resolved(resolve(spec), options, Quiet()).summary
    assert found is not None
    assert (found.stages, found.ran) == (2, 1)
    assert found.stage_seconds >= 0.3
    assert found.job_seconds > 0
