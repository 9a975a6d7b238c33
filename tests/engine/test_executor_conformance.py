"""The suite for executors on those that run in this process, and on executors that break a promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isoflop.execute.base import Event, Lost, WorkItem
from isoflop.execute.local import LocalExecutor
from isoflop.execute.simulated import Rates, SimulatedExecutor
from isoflop.jobs import Job, MethodSpec, ResolvedJob
from isoflop.testing import ExecutorProbe, check_executor, executor_checks
from isoflop.testing import executors as suite

IDS = [check.__name__ for check in suite.CHECKS]


def toy_job(number: int, method: MethodSpec | None = None) -> Job:
    """A job of the toy world; each number is another one."""
    from isoflop.jobs.job import versions_of
    from isoflop.tasks.base import task_of

    spec = method or MethodSpec.of("toy-tokens", {"tokens": 1 + number % 12})
    versions = versions_of("toy/m", {}, (spec.name,), task_of("toy-task", {}))
    return Job("toy/m", (spec,), "toy-task", 0, 0, versions=tuple(sorted(versions.items())))


def failing_job() -> Job:
    return toy_job(0, MethodSpec.of("toy-bad", {"how": "raise"}))


def stage_of(job: Job) -> tuple[Job, str]:
    """The job with the stage of its weights."""
    weights = ResolvedJob.of(job).weights
    assert weights is not None
    return job, weights.key


def local_probe(tmp_path: Path, make: type[LocalExecutor] = LocalExecutor) -> ExecutorProbe:
    cache = tmp_path / "cache"
    cache.mkdir()  # the toy world writes its log there before there is a stage
    return ExecutorProbe(
        lambda: make(cache, "cpu"),
        toy_job,
        failing_job(),
        stage_of(toy_job(0)),
        kills=False,
        patience=60,
    )


def simulated_probe() -> ExecutorProbe:
    return ExecutorProbe(
        lambda: SimulatedExecutor(2, 2, Rates(), lambda job: 0.5), toy_job, stage=stage_of(toy_job(0)), patience=60
    )


@pytest.mark.parametrize("check", IDS)
def test_the_local_executor_keeps_the_contract(check: str, tmp_path: Path, toy_parts: ModuleType) -> None:
    probe = local_probe(tmp_path)
    dict(executor_checks(probe))[check]()
    probe.stop()


def test_the_local_executor_gives_torch_its_threads_back(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    executor = LocalExecutor(tmp_path, threads=before + 1)
    try:
        for _ in range(2):  # a second start must not take its own number for the one that was there before
            executor.start()
            assert torch.get_num_threads() == before + 1
        executor.close()
        assert torch.get_num_threads() == before
        torch.set_num_threads(before + 2)
        executor.close()  # a second close touches nothing
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_the_local_executor_drops_what_waits_when_it_closes(tmp_path: Path, toy_parts: ModuleType) -> None:
    executor = LocalExecutor(tmp_path)
    executor.start()
    executor.submit("local", WorkItem("last", "job", toy_job(0)))
    executor.close()
    assert executor.poll(0.0) == []


@pytest.mark.parametrize("check", IDS)
def test_the_simulated_executor_keeps_the_contract(check: str, toy_parts: ModuleType) -> None:
    dict(executor_checks(simulated_probe()))[check]()


class Broken(LocalExecutor):
    """The base of the broken ones below."""


class NoWorkers(Broken):
    """Has nobody who works."""

    def workers(self) -> list[Any]:
        return []


class Backwards(Broken):
    """Runs the last item first."""

    def poll(self, timeout: float) -> list[Event]:
        self._queue.rotate(1)
        return super().poll(timeout)


class Repeats(Broken):
    """Brings everything back twice."""

    def poll(self, timeout: float) -> list[Event]:
        return 2 * super().poll(timeout)


class Forgets(Broken):
    """Loses what comes behind a failure."""

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        if any(event.result.status == "failed" for event in events):  # type: ignore[union-attr]
            self._queue.clear()
        return events


class Dies(Broken):
    """Takes a failure for the end of its worker."""

    def poll(self, timeout: float) -> list[Event]:
        return [
            Lost("local", (event.item,), "it raised")  # type: ignore[union-attr]
            if event.result.status == "failed"  # type: ignore[union-attr]
            else event
            for event in super().poll(timeout)
        ]


class Imagines(Broken):
    """Brings back what nobody submitted."""

    def poll(self, timeout: float) -> list[Event]:
        return [*super().poll(timeout), Lost("local", (), "nothing")]


class SkipsStages(Broken):
    """Takes stages for jobs."""

    def submit(self, worker: str, item: WorkItem) -> None:
        super().submit(worker, WorkItem(item.id, "job", item.job))


class LeavesAProcess(Broken):
    """Starts a process that nobody ends."""

    def start(self) -> None:
        super().start()
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


class Kept(SimulatedExecutor):
    """Keeps what a killed worker had to itself."""

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        super().kill(worker, reason, blame)
        self._events.clear()


BREACHES = [
    (NoWorkers, suite.check_start, "before there is a worker"),
    (Imagines, suite.check_idle, "nothing was submitted, and"),
    (Backwards, suite.check_order, "submitted .*, came back"),
    (Repeats, suite.check_order, "items came back for 4"),
    (Forgets, suite.check_failures, r"\d of 5 items came back"),
    (Dies, suite.check_failures, "worker local was lost: it raised"),
    (SkipsStages, suite.check_stages, "comes back as|has no attribute 'get'"),
    (LeavesAProcess, suite.check_close, "it leaves behind"),
]


@pytest.mark.parametrize(("broken", "check", "finding"), BREACHES)
def test_broken_promises_are_found(
    broken: type[LocalExecutor], check: suite.Check, finding: str, tmp_path: Path, toy_parts: ModuleType
) -> None:
    probe, made = local_probe(tmp_path, broken), []

    def make() -> LocalExecutor:
        made.append(broken(tmp_path / "cache", "cpu"))
        return made[-1]

    waits = broken in (Forgets, LeavesAProcess)  # for what never comes
    probe.make, probe.patience = make, 5.0 if waits else 60.0
    with pytest.raises((AssertionError, AttributeError), match=finding):
        check(probe)
    for executor in made:
        executor.close(now=True)
        if isinstance(executor, LeavesAProcess):
            executor.child.kill()
            executor.child.wait()


def test_items_that_a_killed_worker_keeps_are_missed(toy_parts: ModuleType) -> None:
    probe = simulated_probe()
    probe.make = lambda: Kept(2, 2, Rates(), lambda job: 0.5)
    probe.patience = 3.0
    with pytest.raises(AssertionError, match=r"\d of 2 items came back"):
        suite.check_kill(probe)


def test_everything_that_is_broken_is_reported_at_once(tmp_path: Path, toy_parts: ModuleType) -> None:
    probe = local_probe(tmp_path, Repeats)
    with pytest.raises(AssertionError) as caught:
        check_executor(probe)
    assert "executor Repeats: check_order" in str(caught.value)
    assert "executor Repeats: check_results" in str(caught.value)


def test_what_a_process_leaves_is_ended(children: Callable[[], set[int]]) -> None:
    """The descendants that the suite counts are those that the system knows."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        assert child.pid in suite.descendants()
        child.kill()
    assert child.pid not in suite.descendants()
