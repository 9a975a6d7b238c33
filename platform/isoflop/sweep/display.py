"""What a running session shows: the snapshot, several times a second, and what each worker is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isoflop.execute import WorkItem
from isoflop.sweep.pacing import Pacing
from isoflop.sweep.places import Places
from isoflop.sweep.progress import Progress, Snapshot
from isoflop.sweep.queue import WorkQueue
from isoflop.sweep.spending import Spending
from isoflop.sweep.summary import Summary
from isoflop.sweep.timing import JOB, TimeLeft
from isoflop.sweep.titles import job_title, stage_title
from isoflop.sweep.trials import TrialBook
from isoflop.track import Tracker

_SHOW_SECONDS = 0.1


@dataclass
class Slot:
    """What a worker has been given, the running item first, and when that began."""

    items: list[WorkItem]
    since: float


@dataclass
class Display:
    """Reads the parts of a session, which it does not change, and fills the snapshot.

    Attributes:
        time_left: is told how long things took.
    """

    progress: Progress
    summary: Summary
    spending: Spending
    pacing: Pacing
    queue: WorkQueue
    trials: TrialBook
    tracker: Tracker
    slots: Mapping[str, Slot]
    places: Places
    clock: Callable[[], float]
    time_left: TimeLeft = field(default_factory=TimeLeft)
    _state: Snapshot = field(default_factory=Snapshot)
    _last: float = 0.0
    _stage_titles: dict[str, str] = field(default_factory=dict)

    def show(self, points: int | None, draining: bool, force: bool = False) -> None:
        """Update what is shown, when the last time is long enough ago.

        Args:
            points: of the search's space, where it is finite.
        """
        if not force and time.monotonic() - self._last < _SHOW_SECONDS:
            return
        self._last = time.monotonic()
        state, done = self._state, self.summary
        state.done, state.cached = done.done, done.cached
        state.ok, state.failed, state.infeasible, state.pruned = done.ok, done.failed, done.infeasible, done.pruned
        state.running, behind = self._running()
        state.waiting = len(self.queue) + behind
        state.total = self.spending.expected_jobs(points)
        state.elapsed = self.spending.elapsed
        state.eta = None if draining else self._eta(state)  # what is left is not begun
        state.best = self.trials.best
        state.stages_done, state.stages_left = done.stages, self.queue.stages_left
        state.stages_running = self.queue.stages_running
        state.warm, state.job_seconds = self.queue.affinity_hits, self.pacing.job_seconds
        state.backlog, state.problem = self.tracker.backlog(), self.tracker.problem
        state.draining = draining
        now = self.clock()
        state.doing = {
            worker: f"{self.title(slot.items[0])} ({now - slot.since:.0f} s)" if slot.items else self._idle(worker)
            for worker, slot in self.slots.items()
        }
        self.progress.update(state)

    def _running(self) -> tuple[int, int]:
        """Jobs that workers run, and those that they were handed besides, which wait for the one before them."""
        busy = [slot.items for slot in self.slots.values() if slot.items]
        return sum(items[0].kind == "job" for items in busy), sum(len(items) - 1 for items in busy)

    def title(self, item: WorkItem) -> str:
        """A job or a stage for people."""
        if item.kind == "job":
            return job_title(item.job)
        if item.stage not in self._stage_titles:
            self._stage_titles[item.stage] = stage_title(item.job, item.stage)
        return self._stage_titles[item.stage]

    def _eta(self, state: Snapshot) -> float | None:
        """Seconds left: until all jobs are done, where it is known how many there will be, or until the budget ends."""
        ends = [s for s in (self._until_done(state), self.spending.seconds_left()) if s is not None]
        return min(ends) if ends else None

    def _until_done(self, state: Snapshot) -> float | None:
        if state.total is None:
            return None
        now, busy = self.clock(), [slot for slot in self.slots.values() if slot.items]
        first = [(slot.items[0], now - slot.since) for slot in busy]
        running = [(self.queue.kind(i.stage) if i.kind == "stage" else JOB, since) for i, since in first]
        unseen = state.total - state.done - state.running - state.waiting
        waiting = self.queue.stages_waiting()
        return self.time_left.left(running, waiting, state.waiting, max(0, unseen), len(self.slots))

    def _idle(self, worker: str) -> str:
        """What a worker without work does: nothing, or it leaves its place to a stage of several processes."""
        other = self.places.beside(worker)
        return "idle" if other is None else f"leaves its place to {other}"
