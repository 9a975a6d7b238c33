"""The driver: asks the search, hands jobs to workers, commits rows, tells the search and the tracker.

One loop, one thread. A result counts once its row is durable in the ledger; the search and MLflow hear of it after
that. Everything else (the queue, open trials, the study) is rebuilt from the ledger when a driver starts, so that it may
be killed at any line.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from isoflop.core.errors import Infeasible
from isoflop.execute import Done, Executor, Lost, ShardReport, WorkerInfo, WorkItem
from isoflop.jobs import Job, Outcome, ResolvedJob
from isoflop.ledger import Ledger
from isoflop.search import Proposer
from isoflop.sweep.columns import ColumnWatch
from isoflop.sweep.note import opening
from isoflop.sweep.places import Places, room
from isoflop.sweep.progress import Progress, Snapshot
from isoflop.sweep.queue import Pending, WorkQueue
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.rows import make_row
from isoflop.sweep.timing import JOB, TimeLeft
from isoflop.sweep.titles import job_title, stage_title
from isoflop.sweep.trials import Trial, TrialBook
from isoflop.track import Tracker

_COMMIT_SECONDS = 0.25
_SHOW_SECONDS = 0.1
_COMMIT_ROWS = 200
_FOLD_FILES = 512  # of a long session; fewer wait for the next one
_POLL_SECONDS = 0.1
_SHORT_JOB = 2.0  # seconds; only short jobs are queued behind another on the same worker
_TINY_JOB = 0.05  # seconds; of such jobs more are asked for at a time, or committing each few would hold them up
_RECENT_JOBS = 8  # of earlier sessions, which tell how long jobs take


@dataclass
class Summary:
    """How a session ended."""

    cached: int = 0
    ok: int = 0
    failed: int = 0
    infeasible: int = 0
    pruned: int = 0
    left: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stages: int = 0
    affinity: float = 0.0
    reason: str = ""

    @property
    def ran(self) -> int:
        """Jobs that got a row in this session."""
        return self.ok + self.failed + self.infeasible + self.pruned


@dataclass
class _Slot:
    """What a worker has been given, the running item first."""

    items: list[WorkItem]
    since: float


class Driver:
    """Runs one sweep in one session.

    Args:
        sweep: resolved spec.
        ledger: locked for writing.
        executor: is started when there is something to run.
        retry_failed: run jobs with status failed again.
        clock: monotonic seconds; another one in simulated time.
    """

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        executor: Executor,
        proposer: Proposer,
        tracker: Tracker,
        progress: Progress,
        retry_failed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep = sweep
        self._spec = sweep.spec
        self._ledger = ledger
        self._executor = executor
        self._tracker = tracker
        self._progress = progress
        # Without a pruner nothing is hopeless: what one stopped earlier is run to its end.
        unfinished = {"pruned"} if self._spec.search.pruner == "none" else set()
        self._again = unfinished | ({"failed"} if retry_failed else set())
        self._clock = clock
        self._proposer = proposer
        self._trials = TrialBook(sweep, proposer)
        self._queue = WorkQueue(self._spec.limits.retries)
        self._slots: dict[str, _Slot] = {}
        self._places = Places()
        self._rows: list[dict[str, Any]] = []
        self._summary = Summary()
        self._state = Snapshot()
        self._job_seconds = 0.0
        self._flops = 0.0
        self._exhausted = False
        self._dropped = 0
        self._interrupts = 0
        self._notice = ""
        self._last_commit = 0.0
        self._last_show = 0.0
        self._started_workers = False
        self._stage_titles: dict[str, str] = {}
        self._columns = ColumnWatch(sweep.spec, sweep.source)
        self._time_left = TimeLeft()

    def run(self) -> Summary:
        """Run until the search is exhausted, the budget ends, or somebody interrupts. Returns how it went."""
        self._started = self._clock()
        self._restore()
        if self._spec.search.pruner != "none":
            self._executor.watch(self._on_shard)
        try:
            with self._signals():
                while self._step():
                    pass
        except KeyboardInterrupt:
            self._summary.interrupted = True
            self._progress.line("stopped at once; running jobs are dropped and will run again")
        finally:
            self._commit(force=True)
        self._summary.left = self._left()
        self._summary.seconds = self._clock() - self._started
        self._summary.affinity = self._queue.affinity_hits / max(1, self._queue.dispatched)
        self._show(force=True)
        return self._summary

    # beginning

    def _restore(self) -> None:
        """Take over what earlier sessions left in the ledger."""
        everything = self._ledger.read()
        self._tracker.catch_up(everything)
        table = self._sweep.current(everything)
        self._count_rows(table)
        for trial, jobs in self._trials.restore(table, self._again):
            self._enqueue(trial, jobs)
        if self._ledger.set_aside:
            self._progress.line(
                f"{len(self._ledger.set_aside)} unreadable ledger files were set aside; their jobs run again"
            )
        if self._summary.cached:
            self._progress.line(f"{self._summary.cached} jobs have results already")

    def _count_rows(self, table: pa.Table) -> None:
        statuses = table["status"].to_pylist()
        self._summary.cached = sum(1 for s in statuses if s not in self._again)
        for seconds in table["wall_seconds"].to_pylist()[-_RECENT_JOBS:]:
            if seconds:
                self._time_left.took(JOB, seconds)
        for flops, answers in zip(table["flops"].to_pylist(), table["n_examples"].to_pylist(), strict=True):
            self._flops += (flops or 0.0) * (answers or 0)

    def _enqueue(self, trial: Trial, jobs: list[Job]) -> None:
        for job in jobs:
            try:
                self._time_left.queued(self._queue.add(job, ResolvedJob.of(job)))
            except Infeasible as error:
                outcome = Outcome("infeasible", started=time.time(), error_type="Infeasible", error_text=str(error))
                self._record(job, outcome, attempt=0)

    # the loop

    def _step(self) -> bool:
        """One round; False when nothing is left to do."""
        if not self._interrupts:
            self._ask()
            self._dispatch()
        if self._notice:
            self._progress.line(self._notice)
            self._notice = ""
        busy = bool(self._slots) and any(slot.items for slot in self._slots.values())
        thinking = self._proposer.pending and not self._exhausted
        if not busy and not self._rows and (self._interrupts or not (len(self._queue) or thinking)):
            return False
        for event in self._executor.poll(_POLL_SECONDS if not self._rows else 0.02):
            if isinstance(event, Done):
                self._on_done(event)
            else:
                self._on_lost(event)
        self._enforce_deadlines()
        self._commit(force=not busy)  # no more rows are about to come
        self._ledger.keep_lease()
        self._show()
        return True

    def _ask(self) -> None:
        """Keep the queue a little fuller than the workers need."""
        if (reason := self._budget_ended()) is not None:
            dropped = self._queue.drop_waiting()  # also what was put back since: a failed job is not tried again
            self._dropped += dropped if self._spec.budget.hours is not None else 0  # another run may take these up
            if not self._exhausted or dropped:
                self._progress.line(f"budget: {reason}" + (f"; {dropped} queued jobs are left" if dropped else ""))
            self._exhausted = True
            self._summary.reason = reason
        if self._exhausted:
            return
        slots = max(1, len(self._executor.workers()))
        eager = self._sweep.strategy.eager
        per_trial = len(self._sweep.task_options) * self._spec.repeats
        # A search that learns is asked as late as possible; of short jobs a few at once, or asking would hold them up.
        wanted = max(4 * slots, 16) if eager else slots * self._asked_per_slot()
        missing = wanted - (len(self._queue) if eager else self._trials.open_count * per_trial)
        if self._spec.budget.jobs is not None:
            have = self._summary.cached + self._summary.ran + self._queue.running + len(self._queue)
            missing = min(missing, self._spec.budget.jobs - have)
        count = -(-missing // per_trial)
        if self._spec.budget.trials is not None:
            count = min(count, self._spec.budget.trials - self._trials.count)
        if count <= 0:
            if self._spec.budget.trials is not None and self._trials.count >= self._spec.budget.trials:
                self._exhausted = True
                self._summary.reason = f"{self._spec.budget.trials} trials"
            return
        busy = len(self._queue) or self._rows or any(slot.items for slot in self._slots.values())
        if not busy and self._proposer.pending:
            self._proposer.wait(_POLL_SECONDS)
        proposals = self._proposer.ask(count)
        if not proposals and not self._proposer.pending and (eager or self._trials.open_count == 0):
            self._exhausted = True
            self._summary.reason = self._proposer.reason or self._summary.reason
        for proposal in proposals:
            trial = self._trials.open(proposal.number, proposal.config)
            self._enqueue(trial, list(trial.jobs.values()))

    def _asked_per_slot(self) -> int:
        """Jobs of a search that learns which are open at a time, per slot."""
        if self._job_seconds < _TINY_JOB and self._summary.ran:
            return 8
        return 4 if self._job_seconds < _SHORT_JOB else 1

    def _budget_ended(self) -> str | None:
        budget = self._spec.budget
        have = self._summary.cached + self._summary.ran
        if budget.jobs is not None and have + self._queue.running >= budget.jobs:
            return f"{budget.jobs} jobs"
        if budget.hours is not None and self._clock() - self._started >= budget.hours * 3600:
            return f"{budget.hours:g} hours"
        if budget.flops is not None and self._flops >= budget.flops:
            return f"{budget.flops:g} FLOPs"
        return None

    def _start_workers(self) -> None:
        """Bring the executor up when there is the first thing to run: a finished sweep is opened again in a moment."""
        self._executor.start()
        self._started_workers = True
        if self._executor.dashboard:
            self._progress.line(f"Ray's dashboard: {self._executor.dashboard}")
            self._tracker.describe(opening(self._spec, self._executor.dashboard))

    def _dispatch(self) -> None:
        if not self._started_workers and (len(self._queue) or self._proposer.pending):
            self._start_workers()
        workers = self._executor.workers()
        newcomers = [w.id for w in workers if w.id not in self._slots]
        if newcomers:
            self._slots.update({worker: _Slot([], self._clock()) for worker in newcomers})
            self._queue.stages_exist(self._executor.cached_stages())
        if self._budget_ended() is None:
            self._settle(workers)
        rooms = room(workers)
        depth = 2 if self._job_seconds < _SHORT_JOB else 1
        for level in range(depth):
            for worker in workers:
                slot = self._slots[worker.id]
                if len(slot.items) != level or (level and slot.items[0].kind == "stage"):
                    continue
                if self._places.taken(worker.id) or (level and self._places.wanted(worker.node)):
                    continue
                if self._budget_ended() is not None:
                    return
                item = self._queue.next_for(worker.id, jobs_only=bool(level), room=rooms[worker.node])
                if item is None:
                    continue
                if item.slots == 1:
                    self._hand_out(worker.id, item)
                    continue
                self._places.claim(worker, item)
                self._settle(workers)

    def _settle(self, workers: list[WorkerInfo]) -> None:
        """Hand out stages of several processes for which enough workers stand aside by now.

        What has happened since they were claimed may have made some of them pointless or impossible: these go back.
        """
        for item in self._places.withdraw(workers, self._queue.is_sound):
            self._queue.give_back(item)
        for worker, item in self._places.settle(workers, lambda name: not self._slots[name].items):
            self._hand_out(worker, item)

    def _hand_out(self, worker: str, item: WorkItem) -> None:
        slot = self._slots[worker]
        if not slot.items:
            slot.since = self._clock()
        slot.items.append(item)
        self._executor.submit(worker, item)

    # events

    def _on_done(self, event: Done) -> None:
        slot = self._slots.get(event.worker)
        if slot is not None:
            slot.items = [i for i in slot.items if i.id != event.item.id]
            slot.since = self._clock()
        self._places.ended(event.worker, event.item.id)
        if event.item.kind == "stage":
            self._on_stage(event)
        else:
            self._on_job(event)

    def _on_stage(self, event: Done) -> None:
        result: Mapping[str, Any] = event.result
        if result["ok"]:
            self._queue.stage_done(event.item.stage)
            self._summary.stages += 1
            if result["seconds"]:
                self._time_left.took(self._queue.kind(event.item.stage), result["seconds"] * event.item.slots)
            if result["seconds"]:
                self._progress.line(
                    f"stage {self._title(event.item)} computed by {event.worker} in {result['seconds']:.1f} s"
                )
            return
        failure = self._queue.stage_failed(
            event.item.stage, result["status"], result["error_type"], result["error_text"]
        )
        if failure is None:
            self._progress.line(f"stage {self._title(event.item)} failed, will be tried again: {result['error_text']}")
            return
        for pending in failure.jobs:
            text = f"stage {failure.key}: {failure.error_text}"
            outcome = Outcome(
                "infeasible" if failure.status == "infeasible" else "failed",
                started=time.time(),
                error_type=failure.error_type,
                error_text=text,
            )
            self._record(pending.job, outcome, pending.attempt)

    def _on_job(self, event: Done) -> None:
        outcome: Outcome = event.result
        job = event.item.job
        self._time_left.took(JOB, outcome.seconds)
        self._job_seconds = (
            outcome.seconds if not self._job_seconds else 0.8 * self._job_seconds + 0.2 * outcome.seconds
        )
        if outcome.error_type == "MemoryError":
            self._executor.kill(event.worker, "ran out of memory; another takes its place", blame=False)
        if outcome.status == "failed":
            exhausted = self._queue.job_failed(job.id, event.worker)
            if exhausted is None:
                self._progress.line(
                    f"{job_title(job)} failed, will be tried again: {outcome.error_type}: {outcome.error_text}"
                )
                return
            self._record(job, outcome, exhausted.attempt)
        else:
            self._record(job, outcome, self._queue.job_done(job.id).attempt)

    def _on_lost(self, event: Lost) -> None:
        self._slots.pop(event.worker, None)
        self._progress.line(f"worker {event.worker} lost: {event.reason}")
        waiting = self._places.lost(event.worker)
        if waiting is not None:
            self._queue.give_back(waiting)
        exhausted: list[Pending] = self._queue.worker_lost(event.worker, event.items, event.blame)
        for item in event.items[:1]:
            if item.kind == "stage" and not self._queue.stage_attempts_left(item.stage):
                failure = self._queue.stage_failed(item.stage, "failed", "WorkerLost", event.reason)
                exhausted += failure.jobs if failure else []
        self._queue.stages_lost(event.gone)
        for pending in exhausted:
            outcome = Outcome(
                "failed", started=time.time(), worker=event.worker, error_type="WorkerLost", error_text=event.reason
            )
            self._record(pending.job, outcome, pending.attempt)

    def _on_shard(self, report: ShardReport) -> bool:
        return self._trials.report(report.item.job.id, report.shard, report.mean_error, report.examples)

    def _enforce_deadlines(self) -> None:
        limits = self._spec.limits
        for worker, slot in list(self._slots.items()):
            if not slot.items:
                continue
            allowed = limits.stage_timeout if slot.items[0].kind == "stage" else limits.timeout
            if self._clock() - slot.since > allowed:
                self._executor.kill(worker, f"passed the deadline of {allowed:g} s")

    # rows

    def _record(self, job: Job, outcome: Outcome, attempt: int) -> None:
        number = self._trials.of(job.id).number
        row = make_row(self._spec.name, number, job, outcome, attempt)
        self._rows.append({**row, "mlflow_run_id": self._tracker.run_id(job.id)})
        setattr(self._summary, outcome.status, getattr(self._summary, outcome.status) + 1)
        self._flops += outcome.footprint.get("flops", 0.0) * len(outcome.errors)
        result = (
            f"error {sum(outcome.errors) / len(outcome.errors):.4f}"
            if outcome.errors
            else f"{outcome.error_type}: {outcome.error_text}"
        )
        self._progress.line(
            f"{job_title(job)} {outcome.status} on {outcome.worker or '-'} in {outcome.seconds:.1f} s: {result}"
        )

    def _commit(self, force: bool = False) -> None:
        if not self._rows:
            return
        # real seconds, also in simulated time: this paces writes to a disk
        due = time.monotonic() - self._last_commit >= _COMMIT_SECONDS or len(self._rows) >= _COMMIT_ROWS
        if not (force or due or self._starved()):
            return
        # Kept until the ledger has them: whatever interrupts this, they are written (again) at the end.
        rows = self._rows
        self._ledger.append(rows)
        self._rows = []
        self._ledger.fold(_FOLD_FILES)
        self._last_commit = time.monotonic()
        first = self._ledger.sequence - len(rows) + 1
        for offset, row in enumerate(rows):
            row["sequence"] = first + offset
        for line in self._columns.see(rows):
            self._progress.line(line)
        self._trials.record(rows)
        self._tracker.push(rows)

    def _starved(self) -> bool:
        """Whether a worker stands idle, or soon will, while the search waits for rows to be committed."""
        if len(self._queue) or self._exhausted or self._sweep.strategy.eager:
            return False
        if self._proposer.pending:  # it has something to think about; more so before it runs out of it
            return len(self._rows) >= len(self._slots) * self._asked_per_slot() // 2
        return not all(slot.items or self._places.taken(worker) for worker, slot in self._slots.items())

    # outside

    def _show(self, force: bool = False) -> None:
        if not force and time.monotonic() - self._last_show < _SHOW_SECONDS:
            return
        self._last_show = time.monotonic()
        state, done = self._state, self._summary
        state.done, state.cached = done.cached + done.ran, done.cached
        state.ok, state.failed, state.infeasible, state.pruned = done.ok, done.failed, done.infeasible, done.pruned
        state.running, state.waiting = self._queue.running, len(self._queue)
        state.total = self._expected()
        state.elapsed = self._clock() - self._started
        state.eta = self._eta(state)
        state.best = self._trials.best
        state.stages_done, state.stages_left = done.stages, self._queue.stages_left
        state.stages_running = self._queue.stages_running
        state.warm, state.job_seconds = self._queue.affinity_hits, self._job_seconds
        state.backlog, state.problem = self._tracker.backlog(), self._tracker.problem
        state.draining = bool(self._interrupts)
        now = self._clock()
        state.doing = {
            worker: f"{self._title(slot.items[0])} ({now - slot.since:.0f} s)" if slot.items else self._idle(worker)
            for worker, slot in self._slots.items()
        }
        self._progress.update(state)

    def _eta(self, state: Snapshot) -> float | None:
        """Seconds left, where it is known how many jobs there will be."""
        if state.total is None:
            return None
        now, busy = self._clock(), [slot for slot in self._slots.values() if slot.items]
        first = [(slot.items[0], now - slot.since) for slot in busy]
        running = [(self._queue.kind(i.stage) if i.kind == "stage" else JOB, since) for i, since in first]
        behind = sum(len(slot.items) - 1 for slot in busy)  # jobs handed out that wait for the one before them
        unseen = state.total - state.done - state.running - state.waiting
        waiting = self._queue.stages_waiting()
        return self._time_left.left(running, waiting, state.waiting + behind, max(0, unseen), len(self._slots))

    def _idle(self, worker: str) -> str:
        """What a worker without work does: nothing, or it leaves its place to a stage of several processes."""
        other = self._places.beside(worker)
        return "idle" if other is None else f"leaves its place to {other}"

    def _title(self, item: WorkItem) -> str:
        if item.kind == "job":
            return job_title(item.job)
        if item.stage not in self._stage_titles:
            self._stage_titles[item.stage] = stage_title(item.job, item.stage)
        return self._stage_titles[item.stage]

    def _left(self) -> int:
        """Jobs that another session would still run: all that are known of, where the search is finite."""
        known = len(self._queue) + self._queue.running + self._dropped
        expected = self._expected()
        stopped = self._summary.interrupted or self._budget_ended() is not None
        if expected is None or not stopped:
            return known
        return max(known, expected - self._summary.cached - self._summary.ran)

    def _expected(self) -> int | None:
        per_trial = len(self._sweep.task_options) * self._spec.repeats
        sizes = [n for n in (self._proposer.size(), self._spec.budget.trials) if n is not None]
        jobs = [min(sizes) * per_trial] if sizes else []
        if self._spec.budget.jobs is not None:
            jobs.append(self._spec.budget.jobs)
        return min(jobs) if jobs else None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C (or SIGTERM, which schedulers send before they kill): drain. Second: stop now."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            self._interrupts += 1
            self._summary.interrupted = True
            if self._interrupts > 1:
                raise KeyboardInterrupt
            # No output from here: the signal may have interrupted a write to the same file.
            self._notice = (
                f"{signal.Signals(number).name}: waiting for {self._queue.running} running jobs; once more to stop now"
            )

        old = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
