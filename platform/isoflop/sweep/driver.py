"""The driver: asks the search, hands jobs to workers, commits rows, tells the search and the tracker.

One loop, one thread. A result counts once its row is durable in the ledger; the search and MLflow hear of it after
that. Everything else (the queue, open trials, the study) is rebuilt from the ledger when a driver starts, so that it may
be killed at any line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from isoflop.core.errors import Infeasible
from isoflop.execute import Done, Executor, Lost, ShardReport, WorkerInfo, WorkItem
from isoflop.jobs import Job, Outcome, ResolvedJob
from isoflop.ledger import Ledger
from isoflop.search import Proposer
from isoflop.sweep.column_watch import ColumnWatch
from isoflop.sweep.display import Display, Slot
from isoflop.sweep.interrupts import Interrupts
from isoflop.sweep.note import opening
from isoflop.sweep.outbox import Outbox
from isoflop.sweep.pacing import Pacing
from isoflop.sweep.places import Places, room
from isoflop.sweep.progress import Progress
from isoflop.sweep.queue import Pending, WorkQueue
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.rows import row_of
from isoflop.sweep.spending import Spending
from isoflop.sweep.summary import Summary
from isoflop.sweep.timing import JOB
from isoflop.sweep.titles import ending_line, job_title
from isoflop.sweep.trials import Trial, TrialBook
from isoflop.track import Tracker

_POLL_SECONDS = 0.1
_RECENT_JOBS = 8  # of earlier sessions, which tell how long jobs take


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
        self._ledger = ledger
        self._executor = executor
        executor.tell(progress.line)
        self._tracker = tracker
        self._progress = progress
        # Without a pruner nothing is hopeless: what one stopped earlier is run to its end.
        unfinished = {"pruned"} if sweep.spec.search.pruner == "none" else set()
        self._again = unfinished | ({"failed"} if retry_failed else set())
        self._clock = clock
        self._proposer = proposer
        self._trials = TrialBook(sweep, proposer)
        self._queue = WorkQueue(sweep.spec.limits.retries)
        self._slots: dict[str, Slot] = {}
        self._places = Places()
        self._outbox = Outbox(ledger, self._on_spoilt, clock)
        self._columns = ColumnWatch(sweep.spec, sweep.source, sweep.tasks)
        self._interrupts = Interrupts()
        self._started_workers = False
        self._summary = Summary()
        per_trial = len(sweep.task_options) * sweep.spec.repeats
        self._spending = Spending(sweep.spec.budget, self._summary, per_trial, clock)
        self._pacing = Pacing(sweep.strategy.eager, per_trial)
        self._display = Display(
            progress, self._summary, self._spending, self._pacing, self._queue, self._trials, tracker, self._slots,
            self._places, clock,
        )  # fmt: skip

    def run(self) -> Summary:
        """Run until the search is exhausted, the budget ends, or somebody interrupts. Returns how it went."""
        self._spending.start()
        self._restore()
        if self._sweep.spec.search.pruner != "none":
            self._executor.watch(self._on_shard)
        summary = self._summary
        try:
            with self._interrupts.watched(self._queue.in_hand, self._progress.line):
                while self._step():
                    pass
        except KeyboardInterrupt:
            summary.interrupted = True
            dropped = "; what runs is dropped and will run again" if self._queue.in_hand() else ""
            self._progress.line(f"stopped at once{dropped}")
        finally:
            self._commit(force=True)
        summary.interrupted |= self._interrupts.draining
        running, points = self._queue.running, self._proposer.size()
        summary.left = self._spending.jobs_left(len(self._queue), running, points)
        summary.seconds = self._spending.elapsed
        summary.affinity = self._queue.affinity_hits / max(1, self._queue.dispatched)
        self._show(force=True)
        return summary

    # beginning

    def _restore(self) -> None:
        """Take over what earlier sessions left in the ledger."""
        everything = self._ledger.read()
        self._tracker.catch_up(everything)
        table = self._sweep.current(everything)
        self._count_rows(table)
        for trial, jobs in self._trials.restore(table, self._again):
            self._enqueue(trial, jobs)
        self._tell_missing(self._columns.see_table(table))
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
                self._display.time_left.took(JOB, seconds)
        for flops, answers in zip(table["flops"].to_pylist(), table["n_examples"].to_pylist(), strict=True):
            self._spending.spent_before((flops or 0.0) * (answers or 0))

    def _enqueue(self, trial: Trial, jobs: list[Job]) -> None:
        for job in jobs:
            try:
                self._display.time_left.queued(self._queue.add(job, ResolvedJob.of(job)))
            except Infeasible as error:
                outcome = Outcome("infeasible", started=time.time(), error_type="Infeasible", error_text=str(error))
                self._record(job, outcome, attempt=0)

    # the loop

    def _step(self) -> bool:
        """One round; False when nothing is left to do."""
        self._interrupts.keep()
        if not self._interrupts.draining:
            self._ask()
            self._dispatch()
        busy = self._busy()
        thinking = self._proposer.pending and not self._pacing.exhausted
        if not busy and not self._outbox and (self._interrupts.draining or not (len(self._queue) or thinking)):
            return False
        self._show(force=self._executor.here)  # what is shown stays until poll is over
        for event in self._executor.poll(_POLL_SECONDS if not self._outbox else 0.02):
            if isinstance(event, Done):
                self._on_done(event)
            else:
                self._on_lost(event)
        self._enforce_deadlines()
        self._commit(force=not busy)  # no more rows are about to come
        self._ledger.keep_lease()
        return True

    def _busy(self) -> bool:
        return any(slot.items for slot in self._slots.values())

    def _ask(self) -> None:
        """Ask the search for what the workers need next, within the budget."""
        if (reason := self._spending.ended(self._queue.running)) is not None:
            self._give_up_waiting(reason)
        if self._pacing.exhausted:
            return
        queue, trials = self._queue, self._trials
        missing = self._pacing.missing_jobs(
            len(self._executor.workers()), len(queue), trials.open_count, bool(self._summary.ran)
        )
        count = self._spending.allowed_trials(missing, queue.running + len(queue), trials.count)
        if count <= 0:
            if (reason := self._spending.all_trials(trials.count)) is not None:
                self._pacing.exhausted = True
                self._summary.reason = reason
            return
        if self._proposer.pending and not (len(queue) or self._outbox or self._busy()):
            self._proposer.wait(_POLL_SECONDS)
        proposals = self._proposer.ask(count)
        if not proposals and not self._proposer.pending and (self._pacing.eager or trials.open_count == 0):
            self._pacing.exhausted = True
            self._summary.reason = self._proposer.reason or self._summary.reason
        for proposal in proposals:
            trial = trials.open(proposal.number, proposal.config)
            self._enqueue(trial, list(trial.jobs.values()))

    def _give_up_waiting(self, reason: str) -> None:
        """The budget has ended: what waits is not begun."""
        dropped = self._queue.drop_waiting()  # also what was put back since: a failed job is not tried again
        self._spending.drop(dropped)
        if not self._pacing.exhausted or dropped:
            self._progress.line(f"budget: {reason}" + (f"; {dropped} queued jobs are left" if dropped else ""))
        self._pacing.exhausted = True
        self._summary.reason = reason

    def _start_workers(self) -> None:
        """Bring the executor up when there is the first thing to run: a finished sweep is opened again in a moment."""
        with self._interrupts.at_once():
            self._executor.start()
        self._interrupts.keep()
        self._started_workers = True
        if self._executor.dashboard:
            self._progress.line(f"Ray's dashboard: {self._executor.dashboard}")
            self._tracker.describe(opening(self._sweep.spec, self._executor.dashboard))

    def _dispatch(self) -> None:
        if not self._started_workers and (len(self._queue) or self._proposer.pending):
            self._start_workers()
        workers = self._executor.workers()
        newcomers = [w.id for w in workers if w.id not in self._slots]
        if newcomers:
            self._slots.update({worker: Slot([], self._clock()) for worker in newcomers})
            self._queue.stages_exist(self._executor.cached_stages())
        if self._spending.ended(self._queue.running) is None:
            self._settle(workers)
        rooms = room(workers)
        for level in range(
            1 if self._executor.here else self._pacing.depth
        ):  # in this process nothing is gained by more
            for worker in workers:
                slot = self._slots[worker.id]
                if len(slot.items) != level or (level and (slot.items[0].kind == "stage" or slot.items[0].alone)):
                    continue
                if self._places.taken(worker.id) or (level and self._places.wanted(worker.node)):
                    continue
                if self._spending.ended(self._queue.running) is not None:
                    return
                item = self._queue.next_for(worker.id, behind=bool(level), room=rooms[worker.node])
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
                self._summary.stage_seconds += result["seconds"] * event.item.slots
                self._display.time_left.took(self._queue.kind(event.item.stage), result["seconds"] * event.item.slots)
                self._progress.line(
                    f"stage {self._display.title(event.item)} computed by {event.worker} in {result['seconds']:.1f} s"
                )
            return
        failure = self._queue.stage_failed(
            event.item.stage,
            result["status"],
            result["error_type"],
            result["error_text"],
            result.get("transient", True),
        )
        if failure is None:
            self._progress.line(
                f"stage {self._display.title(event.item)} failed, will be tried again: {result['error_text']}"
            )
            return
        for pending in failure.jobs:
            text = f"stage {failure.key}: {failure.error_text}"
            outcome = Outcome("failed", started=time.time(), error_type=failure.error_type, error_text=text)
            if failure.status == "infeasible":
                outcome.status = "infeasible"
            self._record(pending.job, outcome, pending.attempt)

    def _on_job(self, event: Done) -> None:
        outcome: Outcome = event.result
        job = event.item.job
        self._display.time_left.took(JOB, outcome.seconds)
        self._pacing.took(outcome.seconds)
        if outcome.error_type == "MemoryError" or outcome.crowded:
            self._executor.kill(event.worker, "ran out of memory; another takes its place", blame=False)
        if outcome.status == "failed":
            exhausted = self._queue.job_failed(job.id, event.worker, outcome.transient, outcome.crowded)
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
        exhausted: list[Pending] = self._queue.worker_lost(event.worker, event.items, event.blame, event.certain)
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
        limits = self._sweep.spec.limits
        for worker, slot in list(self._slots.items()):
            if not slot.items:
                continue
            allowed = limits.stage_timeout if slot.items[0].kind == "stage" else limits.timeout
            if self._clock() - slot.since > allowed:
                self._executor.kill(worker, f"passed the deadline of {allowed:g} s")

    # rows

    def _record(self, job: Job, outcome: Outcome, attempt: int) -> None:
        number = self._trials.of(job.id).number
        row, outcome = row_of(self._sweep.spec.name, number, job, outcome, attempt)
        self._outbox.add({**row, "mlflow_run_id": self._tracker.run_id(job.id)})
        self._summary.count(outcome.status)
        self._summary.job_seconds += outcome.seconds
        self._spending.spend(outcome.footprint.get("flops", 0.0) * len(outcome.errors))
        self._progress.line(ending_line(job, outcome))

    def _on_spoilt(self, was: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        """The ledger cannot take a result: its job has failed after all."""
        self._summary.recount(was["status"], kept["status"])
        self._progress.line(f"job {kept.get('job_id')} failed: {kept['error_text']}")

    def _commit(self, force: bool = False) -> None:
        """Write finished rows when it is time, and tell whoever waits for them that they are durable."""
        if not self._outbox or not (force or self._outbox.due or self._starved()):
            return
        rows = self._outbox.commit()
        self._tell_missing(self._columns.see(rows))
        self._trials.record(rows)
        self._tracker.push(rows)

    def _tell_missing(self, lines: list[str]) -> None:
        """What no row has of what the spec asks: a search for it would learn nothing."""
        for line in lines:
            self._progress.line(line)
        if self._columns.aimless and not self._summary.aimless:
            self._summary.aimless = self._columns.aimless[0]
            self._give_up_waiting("no row has what the objectives name")

    def _starved(self) -> bool:
        """Whether a worker stands idle, or soon will, while the search waits for rows to be committed."""
        if len(self._queue) or self._pacing.exhausted or self._pacing.eager:
            return False
        if self._proposer.pending:  # it has something to think about; more so before it runs out of it
            return self._pacing.wants_rows(len(self._slots), len(self._outbox), bool(self._summary.ran))
        return not all(slot.items or self._places.taken(worker) for worker, slot in self._slots.items())

    # outside

    def _show(self, force: bool = False) -> None:
        self._display.show(self._proposer.size(), self._interrupts.draining, force)
