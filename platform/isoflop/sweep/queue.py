"""What to run next, and where: jobs, the stages they share, warm models, attempts. Pure bookkeeping, no clock, no Ray.

A stage is computed by exactly one worker, and the jobs that need it wait until it is there: single flight falls out of
there being one queue. A worker is given, in this order: a job that is to run alone, one whose model it holds warm, one whose
model no other worker holds, any job, the stage that most jobs wait for. Results therefore come as early as they can.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import count, islice

from isoflop.core.stage import Stage
from isoflop.execute import WorkItem
from isoflop.jobs import Job, ResolvedJob
from isoflop.jobs.warm import MOST_WARM

_STAGE_CHOICE = 64  # stages that are compared when a worker asks for one
_MISFORTUNES = 10  # losses of a worker that may count as no fault of what it ran; more are no accident


@dataclass
class Pending:
    """A job that has no result yet."""

    job: Job
    model_key: str
    stages: tuple[str, ...]
    attempt: int = 0
    avoid: str | None = None  # worker on which it failed last
    misfortunes: int = 0
    alone: bool = False  # it ran out of memory, or it or another of its worker killed that


@dataclass
class _StageState:
    key: str
    deps: frozenset[str]
    job: Job  # any job that needs it: workers rebuild the stage from it
    slots: int = 1
    waiting: dict[str, None] = field(default_factory=dict)  # job ids, oldest first: they start in that order
    attempt: int = 0
    running: bool = False
    misfortunes: int = 0


@dataclass
class StageFailure:
    """A stage that failed for good, with the jobs that can therefore not run."""

    key: str
    status: str
    error_type: str
    error_text: str
    jobs: list[Pending]


def kind_of(stage: Stage) -> str:
    """What people call a stage: ``tower``, ``features``, ``cell`` …"""
    return stage.kind or type(stage).__name__.lower()


class WorkQueue:
    """Args:
    retries: how often a failed job or stage is tried again.
    cached: keys of stages that exist already.
    """

    def __init__(self, retries: int, cached: set[str] | None = None) -> None:
        self._retries = retries
        self._available: set[str] = set(cached or ())
        self._stages: dict[str, _StageState] = {}
        self._deps: dict[str, frozenset[str]] = {}  # of every stage ever heard of
        self._slots: dict[str, int] = {}  # of those that fill more than one
        self._kinds: dict[str, str] = {}
        self._blocked: dict[str, Pending] = {}
        self._ready: OrderedDict[str, deque[Pending]] = OrderedDict()
        self._alone: deque[Pending] = deque()  # ready, and each for a worker that has nothing else
        self._running: dict[str, Pending] = {}
        self._dependents: dict[str, list[str]] = {}
        self._startable: dict[str, None] = {}  # stages whose dependencies are there, oldest first
        self._warm: dict[str, OrderedDict[str, None]] = {}
        self._holders: Counter[str] = Counter()  # model key -> workers that hold it warm
        self._ids = count()
        self.affinity_hits = 0
        self.dispatched = 0

    # filling

    def add(self, job: Job, resolved: ResolvedJob) -> tuple[str, ...]:
        """Queue a job; its stages are computed first unless they exist. Returns the kinds of those to be computed for it
        first of all jobs."""
        stages = resolved.stages()
        fresh = [s for s in stages if s.key not in self._available and s.key not in self._stages]
        for stage in stages:
            if stage.key not in self._deps:
                self._deps[stage.key] = frozenset(d.key for d in stage.deps())
                self._kinds[stage.key] = kind_of(stage)
                if stage.slots > 1:
                    self._slots[stage.key] = stage.slots
        self._admit(Pending(job, resolved.model_key, tuple(s.key for s in stages)))
        return tuple(self._kinds[s.key] for s in fresh)

    def kind(self, stage: str) -> str:
        """The kind of a stage that a job needs."""
        return self._kinds.get(stage, "stage")

    def stages_waiting(self) -> Counter[str]:
        """Kind -> work of the stages that nobody computes yet, in stages that fill one slot."""
        waiting: Counter[str] = Counter()
        for key, state in self._stages.items():
            if not state.running:
                waiting[self.kind(key)] += state.slots
        return waiting

    def _admit(self, pending: Pending) -> None:
        """Ready when its stages are there, else blocked until they are."""
        missing = [key for key in pending.stages if key not in self._available]
        if not missing:
            ready = self._alone if pending.alone else self._ready.setdefault(pending.model_key, deque())
            ready.append(pending)
            return
        self._blocked[pending.job.id] = pending
        for key in missing:
            state = self._stages.get(key)
            if state is None:
                state = self._stages[key] = _StageState(key, self._deps[key], pending.job, self._slots.get(key, 1))
                for dep in state.deps:
                    self._dependents.setdefault(dep, []).append(key)
            state.waiting[pending.job.id] = None
            self._note_startable(state)

    def __len__(self) -> int:
        """Jobs that are not running yet."""
        return len(self._blocked) + len(self._alone) + sum(len(q) for q in self._ready.values())

    @property
    def running(self) -> int:
        """Jobs that a worker has."""
        return len(self._running)

    @property
    def stages_running(self) -> int:
        """Stages that a worker computes."""
        return sum(state.running for state in list(self._stages.values()))  # a copy: other threads ask, too

    def in_hand(self) -> str:
        """What workers are busy with, in words; empty when it is nothing."""
        counts = ((self.running, "job"), (self.stages_running, "stage"))
        return " and ".join(f"{n} running {word}{'s' if n > 1 else ''}" for n, word in counts if n)

    @property
    def stages_left(self) -> int:
        """Stages that are not there yet."""
        return len(self._stages)

    # dispatch

    def next_for(self, worker: str, behind: bool = False, room: float = math.inf) -> WorkItem | None:
        """The best item for a worker, or None when there is nothing for it now.

        Args:
            behind: it is to stand behind another item: neither a stage nor a job that is to be alone does. Nothing else does
                while such a job waits, so that the worker comes to have nothing, which is when it is given that first of all.
            room: slots that a stage may ask for on the worker's host.
        """
        pending = self._next_job(worker, behind)
        if pending is not None:
            return self._start_job(pending, worker)
        stage = None if behind else self._next_stage(room)
        if stage is None:
            return None
        stage.running = True
        stage.attempt += 1
        return WorkItem(f"s{next(self._ids)}", "stage", stage.job, stage.key, tuple(sorted(stage.deps)), stage.slots)

    def _start_job(self, pending: Pending, worker: str) -> WorkItem:
        pending.attempt += 1
        self._running[pending.job.id] = pending
        self.dispatched += 1
        if pending.alone:
            self._cool(worker)
        self._touch(worker, pending.model_key)
        return WorkItem(f"j{next(self._ids)}", "job", pending.job, needs=pending.stages, alone=pending.alone)

    def _touch(self, worker: str, model_key: str) -> None:
        """The worker loads or reuses a model; what it will have dropped for that is forgotten."""
        warm = self._warm.setdefault(worker, OrderedDict())
        self.affinity_hits += model_key in warm
        if model_key not in warm:
            self._holders[model_key] += 1
        warm[model_key] = None
        warm.move_to_end(model_key)
        while len(warm) > MOST_WARM:
            self._holders[warm.popitem(last=False)[0]] -= 1

    def _cool(self, worker: str) -> None:
        """The worker has no warm models any more."""
        for key in self._warm.pop(worker, ()):
            self._holders[key] -= 1

    def _note_startable(self, state: _StageState) -> None:
        if not state.running and state.deps <= self._available:
            self._startable[state.key] = None

    def _next_stage(self, room: float) -> _StageState | None:
        """Of the oldest stages that can start and ask for at most ``room`` slots, the one that most jobs wait for."""
        while self._startable:  # leave out those that nobody waits for any more, because another stage failed
            first = self._stages.get(next(iter(self._startable)))
            if first is not None and first.waiting:
                break
            del self._startable[next(iter(self._startable))]
        found = (
            s for key in self._startable if (s := self._stages.get(key)) is not None and s.waiting and s.slots <= room
        )
        best = max(islice(found, _STAGE_CHOICE), key=lambda s: len(s.waiting), default=None)
        if best is not None:
            del self._startable[best.key]
        return best

    def _next_job(self, worker: str, behind: bool) -> Pending | None:
        if behind and any(not self._avoids(worker, pending) for pending in self._alone):
            return None
        if (pending := self._take(worker, self._alone)) is not None:
            return pending
        warm = self._warm.get(worker, OrderedDict())
        keys = [k for k in reversed(warm) if k in self._ready]
        keys += sorted((k for k in self._ready if k not in warm), key=lambda k: self._holders[k] > 0)
        for key in keys:
            bucket = self._ready[key]
            if (pending := self._take(worker, bucket)) is not None:
                if not bucket:
                    del self._ready[key]
                return pending
        return None

    def _avoids(self, worker: str, pending: Pending) -> bool:
        return pending.avoid == worker and len(self._warm) > 1

    def _take(self, worker: str, jobs: deque[Pending]) -> Pending | None:
        place = next((n for n, pending in enumerate(jobs) if not self._avoids(worker, pending)), None)
        if place is None:
            return None
        pending = jobs[place]
        del jobs[place]
        return pending

    def stages_exist(self, keys: set[str]) -> None:
        """Stages that some host has on disk already."""
        for key in keys:
            self.stage_done(key)

    # outcomes

    def stage_done(self, key: str) -> None:
        """A stage exists now."""
        self._available.add(key)
        state = self._stages.pop(key, None)
        self._startable.pop(key, None)
        for dependent in self._dependents.pop(key, ()):
            if dependent in self._stages:
                self._note_startable(self._stages[dependent])
        for job_id in state.waiting if state else ():
            pending = self._blocked.get(job_id)
            if pending is not None and all(s in self._available for s in pending.stages):
                self._admit(self._blocked.pop(job_id))

    def stage_failed(
        self, key: str, status: str, error_type: str, error_text: str, transient: bool = True
    ) -> StageFailure | None:
        """A stage failed; None when it will be tried again, which only what is transient is."""
        state = self._stages.get(key)
        if state is None:
            return None
        state.running = False
        if transient and status != "infeasible" and state.attempt <= self._retries:
            self._note_startable(state)
            return None
        del self._stages[key]
        self._startable.pop(key, None)
        jobs = [p for p in (self._blocked.pop(j, None) for j in state.waiting) if p is not None]
        for other in self._stages.values():
            other.waiting = {job_id: None for job_id in other.waiting if job_id not in state.waiting}
        self._stages = {k: s for k, s in self._stages.items() if s.waiting or s.running}
        return StageFailure(key, status, error_type, error_text, jobs)

    def job_done(self, job_id: str) -> Pending:
        """A job has its final result."""
        return self._running.pop(job_id)

    def job_failed(self, job_id: str, worker: str, transient: bool = True, crowded: bool = False) -> Pending | None:
        """A job failed; None when it is queued again, else the job to be recorded as failed: its attempts are used up, or
        another one would not help. One that was ``crowded`` runs alone from now on, which costs it no attempt."""
        pending = self._running.pop(job_id)
        if crowded and not pending.alone:
            pending.alone = True
            pending.attempt -= 1
            self._admit(pending)
            return None
        if not transient or pending.attempt > self._retries:
            return pending
        pending.avoid = worker
        self._admit(pending)
        return None

    def is_sound(self, item: WorkItem) -> bool:
        """Whether a stage that a worker has been given is still to be computed: jobs wait for it, all it needs is there."""
        state = self._stages.get(item.stage)
        return state is not None and state.running and bool(state.waiting) and state.deps <= self._available

    def give_back(self, item: WorkItem) -> None:
        """A worker did not begin what it had been given: as if it had never had it."""
        if item.kind == "job":
            pending = self._running.pop(item.job.id, None)
            if pending is not None:
                pending.attempt -= 1
                self._admit(pending)
            return
        state = self._stages.get(item.stage)
        if state is None or not state.running:
            return
        state.running = False
        state.attempt -= 1
        if state.waiting:
            self._note_startable(state)
        else:
            del self._stages[state.key]

    def worker_lost(
        self, worker: str, items: tuple[WorkItem, ...], blame_first: bool, certain: bool = True
    ) -> list[Pending]:
        """Requeue what a dead worker had; returns jobs that have used up their attempts.

        The first item was running. Where that may be what killed the worker it loses an attempt, as it does when it has
        been there too often to be innocent; the others only waited. Where it is not ``certain`` which of several was
        running, nobody loses one: each runs alone from now on, so that the next death tells.
        """
        self._cool(worker)
        if blame_first and not certain and len(items) > 1:
            self._suspect(items)
            return []
        exhausted: list[Pending] = []
        for index, item in enumerate(items):
            lost = self._stages.get(item.stage) if item.kind == "stage" else self._running.get(item.job.id)
            if lost is None:
                continue
            lost.misfortunes += index == 0
            if index > 0 or not (blame_first or lost.misfortunes > _MISFORTUNES):
                self.give_back(item)
            elif isinstance(lost, _StageState):
                lost.running = False
                self._note_startable(lost)
            else:
                del self._running[item.job.id]
                if lost.attempt > self._retries:
                    exhausted.append(lost)
                else:
                    self._admit(lost)
        return exhausted

    def _suspect(self, items: tuple[WorkItem, ...]) -> None:
        for item in items:
            pending = self._running.get(item.job.id) if item.kind == "job" else None
            if pending is not None:
                pending.alone = True
            self.give_back(item)

    def stages_lost(self, keys: Set[str]) -> None:
        """No worker can reach these stages any more: they are computed again before the jobs that need them."""
        lost = self._available & keys
        if not lost:
            return
        self._available -= lost
        for state in self._stages.values():
            for dep in state.deps & lost:
                self._startable.pop(state.key, None)
                self._dependents.setdefault(dep, []).append(state.key)
        ready = [*self._alone, *(p for bucket in self._ready.values() for p in bucket)]
        waiting = [*ready, *self._blocked.values()]
        self._alone.clear()
        self._ready.clear()
        for pending in waiting:
            self._admit(pending)

    def stage_attempts_left(self, key: str) -> bool:
        """Whether a stage may be tried again."""
        state = self._stages.get(key)
        return state is not None and state.attempt <= self._retries

    def drop_waiting(self) -> int:
        """Forget everything that is not running; returns how many jobs that were."""
        dropped = len(self)
        self._blocked.clear()
        self._alone.clear()
        self._ready.clear()
        self._startable.clear()
        self._stages = {k: s for k, s in self._stages.items() if s.running}
        for state in self._stages.values():
            state.waiting.clear()
        return dropped
