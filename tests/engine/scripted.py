"""An executor whose workers do what a test says, on a clock that the test moves; and a session of the driver on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import Lines

from isoflop.execute import Done, Executor, Lost, WorkerInfo, WorkItem
from isoflop.execute.base import Event
from isoflop.jobs import Outcome
from isoflop.ledger import Ledger, Store
from isoflop.search import Proposer
from isoflop.sweep.driver import Driver
from isoflop.sweep.resolve import resolve
from isoflop.sweep.searching import make_proposer_for
from isoflop.sweep.summary import Summary
from isoflop.track import NullTracker

Script = Callable[["Scripted"], Iterator[list[Event]]]
MOST_POLLS = 500


def jobs_without_stages(count: int, **changes: Any) -> dict[str, Any]:
    """A sweep of so many jobs that need nothing but a worker."""
    return {
        "name": "scripted",
        "import": ["isoflop.bench.parts"],
        "models": ["bench/noop"],
        "methods": [{"bench-knobs": {"x": [round(0.1 + 0.01 * n, 2) for n in range(count)]}}],
        "tasks": ["bench-noop"],
        "limits": {"timeout": 100, "stage_timeout": 1000, "retries": 1},
        **changes,
    }


def jobs_with_one_stage(count: int, **changes: Any) -> dict[str, Any]:
    """A sweep of so many jobs that all wait for the same stage."""
    return jobs_without_stages(count, models=["bench/big"], **changes)


class Scripted(Executor):
    """Its script is a generator: each poll goes on with it and gives the events that it yields.

    When it ends, everything ends well in turn.

    Attributes:
        now: the clock; only the script moves it.
        held: what each live worker has, the running item first.
        given: everything that was handed out, with when and to whom.
        kills: worker, reason and blame of each.
    """

    def __init__(self, script: Script, workers: str = "a") -> None:
        self.now = 0.0
        self.held: dict[str, list[WorkItem]] = {name: [] for name in workers}
        self.given: list[tuple[float, str, WorkItem]] = []
        self.kills: list[tuple[str, str, bool]] = []
        self.starts = 0
        self._lost: list[Event] = []
        self.script = script(self)
        self._polls = itertools.count()

    def start(self) -> None:
        self.starts += 1

    def workers(self) -> list[WorkerInfo]:
        return [WorkerInfo(name, "n0", "host", "cpu") for name in self.held] if self.starts else []

    def submit(self, worker: str, item: WorkItem) -> None:
        self.held[worker].append(item)
        self.given.append((self.now, worker, item))

    def poll(self, timeout: float) -> list[Event]:
        assert next(self._polls) < MOST_POLLS, "the session does not end"
        lost, self._lost = self._lost, []
        events = next(self.script, None)
        if events is None:
            events = [self.done(name) for name, items in self.held.items() if items]
        return [*lost, *events]

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        self.kills.append((worker, reason, blame))
        self._lost.append(self.lose(worker, reason, blame))

    def close(self, now: bool = False) -> None:
        pass

    def done(self, worker: str, status: str = "ok", seconds: float = 1.0, **more: Any) -> Done:
        """What a worker runs has ended."""
        item = self.held[worker].pop(0)
        result: Any
        if item.kind == "stage":
            result = {"ok": status == "ok", "status": status, "seconds": seconds, "bytes": 0, **more}
        else:
            measured = {"errors": [0.5], "shard_sizes": [1], "axes": {"N": 1.0}} if status == "ok" else {}
            result = Outcome(status, worker=worker, seconds=seconds, **{**measured, **more})  # type: ignore[arg-type]
        return Done(worker, item, result)

    def lose(self, worker: str, reason: str = "gone", blame: bool = True, gone: frozenset[str] = frozenset()) -> Lost:
        """A worker has died, and another of another name takes its place."""
        items = tuple(self.held.pop(worker))
        self.held[worker + "'"] = []
        return Lost(worker, items, reason, blame, gone=gone)


@dataclass
class Session:
    """What a session left."""

    summary: Summary
    executor: Scripted
    lines: list[str]
    snapshots: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def play(
    spec: dict[str, Any],
    folder: Path,
    script: Script,
    workers: str = "a",
    proposer: Proposer | None = None,
    tracker: Any = None,
    **options: Any,
) -> Session:
    """Run the driver on scripted workers; the ledger is kept in ``folder``."""
    sweep = resolve(spec)
    executor, progress = Scripted(script, workers), Lines()
    ledger = Ledger(Store.open(str(folder)), spec["name"]).lock()
    try:
        chosen = proposer or make_proposer_for(sweep)
        summary = Driver(
            sweep, ledger, executor, chosen, tracker or NullTracker(), progress, clock=lambda: executor.now, **options
        ).run()
    finally:
        ledger.unlock()
    assert not list(executor.script), "the session ended before its script"
    return Session(summary, executor, progress.lines, progress.snapshots, ledger.read().to_pylist())


def nothing(executor: Scripted) -> Iterator[list[Event]]:
    """The script by which everything ends well at once."""
    yield from ()


def rows_of(folder: Path) -> int:
    """Rows that are durable now."""
    return Ledger(Store.open(str(folder)), "scripted").read(["job_id"]).num_rows
