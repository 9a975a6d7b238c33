"""The contract of an executor as code: ``check_executor(ExecutorProbe(make, job))`` reports every promise that is broken.

For authors of executors, inside this project or outside. The jobs are the author's: cheap ones of parts that the workers can
import (``isoflop.bench.parts`` has some). Nothing here depends on how fast anything is; ``patience`` only ends what hangs.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isoflop.execute.base import Done, Event, Executor, Lost, WorkItem
from isoflop.jobs import Job, Outcome
from isoflop.testing.suites import Case, Shared, cases_of, run_all

POLL = 0.2
"""Seconds that a poll may wait."""


@dataclass
class ExecutorProbe:
    """An executor to try, and what to try it with.

    Attributes:
        make: gives an executor that is not started yet.
        job: a job of each number that succeeds, others for other numbers.
        failing: a job that raises; None where no job of this executor can.
        stage: a job and the key of one of its stages; None to leave stages out.
        kills: whether ``kill`` ends a worker; False where the worker is this process.
        left: what of an executor may stay behind (processes, actors); by default processes below this one.
        patience: seconds after which an item counts as lost.
    """

    make: Callable[[], Executor]
    job: Callable[[int], Job]
    failing: Job | None = None
    stage: tuple[Job, str] | None = None
    kills: bool = True
    left: Callable[[], Iterable[Any]] = field(default_factory=lambda: descendants)
    patience: float = 300.0
    _running: Executor | None = None
    _before: set[Any] = field(default_factory=set)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def running(self) -> Executor:
        """The executor that the checks share, started by the first of them."""
        if self._running is None:
            self._before = set(self.left())
            self._running = self.make()
            self._running.start()
        return self._running

    def stop(self, now: bool = False) -> set[Any]:
        """Close it; what is left behind that was not there before, once ``patience`` is over."""
        if self._running is None:
            return set()
        executor, self._running = self._running, None
        executor.close(now)
        executor.close(now)
        deadline = time.monotonic() + self.patience
        while (extra := set(self.left()) - self._before) and time.monotonic() < deadline:
            time.sleep(POLL)
        return extra

    def item(self, job: Job) -> WorkItem:
        """An item with an id of its own."""
        return WorkItem(f"suite-{next(self._numbers)}", "job", job)

    def collect(self, count: int) -> list[Event]:
        """Events until they hold ``count`` items. Raises AssertionError when they do not in time, or hold more."""
        events: list[Event] = []
        deadline = time.monotonic() + self.patience
        while len(items_of(events)) < count:
            events += self.running().poll(POLL)
            assert time.monotonic() < deadline, (
                f"{len(items_of(events))} of {count} items came back in {self.patience:g} s"
            )
        events += self.running().poll(0.0)
        assert len(items_of(events)) == count, f"{len(items_of(events))} items came back for {count}"
        return events


Check = Callable[[ExecutorProbe], None]


def check_executor(probe: ExecutorProbe, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check on an executor, which is closed behind them.

    Raises:
        AssertionError: promises are broken; a line for each names executor, check and finding.
        UserError: there is no such check.
    """
    try:
        run_all(f"executor {type(probe.running()).__name__}", executor_checks(probe, expected_failures))
    finally:
        probe.stop(now=True)


def executor_checks(
    probe: ExecutorProbe | Shared[ExecutorProbe], expected_failures: Mapping[str, str] | None = None
) -> list[Case]:
    """The checks, as pairs of an id and a call that raises; the last ones close the executor that all of them share."""
    shared = probe if isinstance(probe, Shared) else Shared.of(probe)
    return cases_of(CHECKS, lambda: (shared.get(),), expected_failures, lambda: _drop(shared))


def check_start(probe: ExecutorProbe) -> None:
    """Once started there are workers with an id, a node and a device each; starting again changes nothing."""
    executor = probe.running()
    workers = executor.workers()
    assert workers, "start() returns before there is a worker"
    ids = [worker.id for worker in workers]
    assert len(set(ids)) == len(ids), f"workers share an id: {ids}"
    for worker in workers:
        assert worker.node, f"worker {worker.id} has no node"
        assert worker.host, f"worker {worker.id} has no host"
        assert worker.device, f"worker {worker.id} has no device"
    executor.start()
    known = [worker.id for worker in executor.workers()]
    assert set(ids) <= set(known), f"a second start() loses workers: {ids}, then {known}"


def check_idle(probe: ExecutorProbe) -> None:
    """A poll without work gives nothing, however often it is asked."""
    for timeout in (0.0, POLL):
        events = probe.running().poll(timeout)
        assert events == [], f"nothing was submitted, and {events} came back"


def check_order(probe: ExecutorProbe) -> None:
    """The items of a worker come back in the order in which they were submitted, each once, from that worker."""
    worker = _worker(probe)
    items = [probe.item(probe.job(number)) for number in range(4)]
    for item in items:
        probe.running().submit(worker, item)
    events = probe.collect(len(items))
    _all_done(events)
    found = [event.item for event in events if isinstance(event, Done)]
    assert found == items, f"submitted {[i.id for i in items]}, came back {[i.id for i in found]}"
    assert {event.worker for event in events} == {worker}, "an item came back from another worker"


def check_results(probe: ExecutorProbe) -> None:
    """Every item of every worker comes back once, as an outcome with scores, times and the worker's name."""
    workers = [worker.id for worker in probe.running().workers()]
    items = {}
    for number, worker in enumerate(workers * 2):
        item = probe.item(probe.job(number))
        items[item.id] = worker
        probe.running().submit(worker, item)
    events = probe.collect(len(items))
    _all_done(events)
    assert {item.id for item in items_of(events)} == set(items), "other items came back than were submitted"
    for event in events:
        assert isinstance(event, Done)
        outcome = event.result
        assert isinstance(outcome, Outcome), f"a job gives a {type(outcome).__name__}"
        assert outcome.status == "ok", f"a good job is {outcome.status}: {outcome.error_text}"
        assert outcome.errors, "a good job has no scores"
        assert len(outcome.errors) == sum(outcome.shard_sizes), (
            f"{len(outcome.errors)} scores in shards {outcome.shard_sizes}"
        )
        assert outcome.worker == items[event.item.id], f"submitted to {items[event.item.id]}, run by {outcome.worker!r}"
        assert outcome.seconds >= 0, f"it took {outcome.seconds} s"


def check_failures(probe: ExecutorProbe) -> None:
    """A job that raises comes back as failed, with what it raised, and loses no other job, before it or behind it."""
    if probe.failing is None:
        return
    worker = _worker(probe)
    jobs = [probe.job(0), probe.failing, probe.job(1), probe.failing, probe.job(2)]
    items = [probe.item(job) for job in jobs]
    for item in items:
        probe.running().submit(worker, item)
    events = probe.collect(len(items))
    _all_done(events)
    outcomes = {event.item.id: event.result for event in events if isinstance(event, Done)}
    statuses = [outcomes[item.id].status for item in items]
    assert statuses == ["ok", "failed", "ok", "failed", "ok"], f"good and raising jobs in turn end as {statuses}"
    failed = outcomes[items[1].id]
    assert failed.error_type, "a failed job does not tell the type of its error"
    assert failed.error_text, "a failed job does not tell its error"
    assert worker in [w.id for w in probe.running().workers()], "a job that raises takes its worker with it"


def check_stages(probe: ExecutorProbe) -> None:
    """A stage is computed on request and comes back as ok, also the second time; jobs that need it follow in order."""
    if probe.stage is None:
        return
    worker = _worker(probe)
    job, key = probe.stage
    stages = [WorkItem(probe.item(job).id, "stage", job, key) for _ in range(2)]
    last = WorkItem(probe.item(job).id, "job", job, needs=(key,))
    for item in (*stages, last):
        probe.running().submit(worker, item)
    events = probe.collect(3)
    _all_done(events)
    results = {event.item.id: event.result for event in events if isinstance(event, Done)}
    for item in stages:
        assert results[item.id].get("ok"), f"stage {key} comes back as {results[item.id]}"
        assert results[item.id]["seconds"] >= 0, f"stage {key} took {results[item.id]['seconds']} s"
    assert results[last.id].status == "ok", f"a job behind its stage is {results[last.id].status}"


def check_kill(probe: ExecutorProbe) -> None:
    """A killed worker's items come back as lost, with the reason, each once; a worker takes its place and takes work."""
    if not probe.kills:
        return
    worker = _worker(probe)
    items = [probe.item(probe.job(number)) for number in range(2)]
    for item in items:
        probe.running().submit(worker, item)
    probe.running().kill(worker, "the suite says so", blame=False)
    events = probe.collect(len(items))
    back = items_of(events)  # those that were finished before it was killed are done
    assert sorted(i.id for i in back) == sorted(i.id for i in items), "other items came back than the worker had"
    for event in events:
        if isinstance(event, Lost):
            assert event.worker == worker, f"worker {event.worker} is lost, {worker} was killed"
            assert "the suite says so" in event.reason, f"the reason is not told: {event.reason}"
            assert not event.blame, "the running item is blamed all the same"
    deadline = time.monotonic() + probe.patience
    while not probe.running().workers():
        assert probe.running().poll(POLL) == [], "something came back though nothing was submitted"
        assert time.monotonic() < deadline, "no worker takes the killed one's place"
    check_order(probe)


def check_close(probe: ExecutorProbe) -> None:
    """Closed twice, an executor leaves nothing behind; and nothing when it is closed at once with work in its queues."""
    for busy in (False, True):
        executor = probe.running()
        if busy:
            for number in range(3):
                executor.submit(_worker(probe), probe.item(probe.job(number)))
        extra = probe.stop(now=busy)
        assert not extra, f"closed{' with work' if busy else ''}, it leaves behind: {sorted(map(str, extra))}"


CHECKS: tuple[Check, ...] = (
    check_start,
    check_idle,
    check_order,
    check_results,
    check_failures,
    check_stages,
    check_kill,
    check_close,
)


def items_of(events: Iterable[Event]) -> list[WorkItem]:
    """The items that events bring back."""
    return [item for event in events for item in ((event.item,) if isinstance(event, Done) else event.items)]


def descendants() -> set[int]:
    """Ids of all processes below this one that are not zombies; empty where the system does not tell."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found: set[int] = set()
    grown = {os.getpid()}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown} - found
        found |= grown
    return found


def _worker(probe: ExecutorProbe) -> str:
    return probe.running().workers()[0].id


def _all_done(events: Iterable[Event]) -> None:
    lost = [event for event in events if isinstance(event, Lost)]
    assert not lost, f"worker {lost[0].worker} was lost: {lost[0].reason}" if lost else ""


def _drop(shared: Shared[ExecutorProbe]) -> None:
    shared.get().stop(now=True)
    shared.renew()
