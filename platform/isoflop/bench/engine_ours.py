"""Our engine as ``isoflop bench engine`` measures it: a workload, growth over a long search, resuming."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOTS = 2
SHORT: dict[str, Any] = {"x": {}, "y": {}, "z": {}}


@dataclass
class Measurement:
    """One system on one workload.

    Attributes:
        cpu_ms_per_job: of the driver's process, with all of its threads.
        search_ms_per_job: of our search process, where there is one; the peers' samplers run in their drivers.
        sampler: peers are compared with the same one.
    """

    workload: str
    system: str
    jobs: int
    seconds: float
    cpu_ms_per_job: float | None = None
    search_ms_per_job: float | None = None
    sampler: str = ""

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds


def spec_of(
    name: str, trials: int, sampler: str = "tpe", model: str = "bench/noop", task: str = "bench-noop", knobs: Any = None
) -> dict[str, Any]:
    """A sweep over the bench's own parts (:mod:`isoflop.bench.parts`)."""
    return {
        "name": name,
        "import": ["isoflop.bench.parts"],
        "models": [model],
        "methods": [{"bench-knobs": knobs or SHORT}],
        "tasks": [task],
        "search": {"sampler": sampler},
        "budget": {"trials": trials},
    }


def ours(workload: str, label: str, spec: dict[str, Any], folder: Path, track: bool) -> Measurement:
    """Our engine, its driver loop with everything that a job costs, MLflow caught up."""
    from isoflop.sweep import api
    from isoflop.sweep.driver import Driver
    from isoflop.sweep.progress import Quiet
    from isoflop.sweep.resolve import resolve

    sweep = resolve(spec)
    store = api.Store.open(str(folder / "store"))
    ledger = api.Ledger(store, sweep.spec.name).lock()
    tracker = api.make_tracker(store, sweep.spec.name, None if track else "none")
    executor = api.make_executor(sweep, api.RunOptions(workers=SLOTS, cache_dir=folder / "cache"))
    proposer = api.make_proposer_for(sweep, apart=True)
    tracker.start("", {})
    proposer.start()
    executor.start()
    while len(executor.workers()) < SLOTS:
        executor.poll(0.1)
    try:
        _settle(tracker)
        begin, cpu, searched = time.monotonic(), time.process_time(), _cpu_of(proposer)
        summary = Driver(sweep, ledger, executor, proposer, tracker, Quiet()).run()
        tracker.finish([], {}, "", "FINISHED")
        while tracker.backlog():
            time.sleep(0.005)
        seconds, cpu, searched = time.monotonic() - begin, time.process_time() - cpu, _cpu_of(proposer) - searched
    finally:
        proposer.close()
        executor.close(now=True)
        tracker.close(30.0)
        ledger.unlock()
    if summary.ok != summary.ran:
        raise RuntimeError(f"{summary.failed} jobs failed")
    each = 1000 / summary.ran
    sampler = sweep.spec.search.sampler
    return Measurement(workload, label, summary.ran, seconds, cpu * each, searched * each or None, sampler)


def _cpu_of(proposer: Any) -> float:
    """CPU seconds that a search process has used so far; 0 where the search is part of the driver."""
    pid = getattr(proposer, "pid", None)
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _settle(tracker: Any) -> None:
    """Creating the database is paid once per store, by everybody, and is not what is measured."""
    if hasattr(tracker, "_projection"):
        while tracker._projection is None or not tracker._projection._parent_id:
            time.sleep(0.05)


def bench_growth(folder: Path, jobs: int) -> dict[str, float]:
    """Time per job at the end of a long random search against its beginning, memory, and resuming it finished."""
    from isoflop.sweep import driver as driver_module

    marks: list[tuple[int, float, int]] = []
    original = driver_module.Driver._commit

    def commit(self: Any, force: bool = False) -> None:
        original(self, force)
        marks.append((self._summary.ran, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    driver_module.Driver._commit = commit  # type: ignore[method-assign]
    try:
        ours("growth", "isoflop", spec_of("growth", jobs, "random"), folder / "l", track=False)
    finally:
        driver_module.Driver._commit = original  # type: ignore[method-assign]
    tenth = jobs // 10
    first = _cpu_between(marks, tenth // 2, tenth + tenth // 2)
    last = _cpu_between(marks, jobs - tenth, jobs)
    grown = (marks[-1][2] - next(m for n, _, m in marks if n >= tenth)) / 1024
    begin = time.monotonic()
    ours_again = _resume(spec_of("growth", jobs, "random"), folder / "l")
    return {
        "last_to_first_tenth": last / first,
        "memory_growth_mb": grown,
        "resume_seconds_without_ray": time.monotonic() - begin,
        "resumed_jobs": ours_again,
    }


def _cpu_between(marks: list[tuple[int, float, int]], low: int, high: int) -> float:
    inside = [(n, t) for n, t, _ in marks if low <= n <= high]
    return (inside[-1][1] - inside[0][1]) / max(1, inside[-1][0] - inside[0][0])


def _resume(spec: dict[str, Any], folder: Path) -> int:
    """What a finished sweep costs to open, check and close again, with the in-process executor (no Ray start)."""
    import isoflop

    found = isoflop.run(
        spec, store=str(folder / "store"), cache_dir=folder / "cache", executor="local", tracking_uri="none"
    )
    assert found.summary is not None
    return found.summary.ran
