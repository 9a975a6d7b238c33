"""What a sweep's budget still allows: jobs, trials, hours, FLOPs."""

from __future__ import annotations

from collections.abc import Callable

from isoflop.sweep.blocks import Budget
from isoflop.sweep.summary import Summary


class Spending:
    """A budget and what has been spent of it, earlier sessions included; hours count from :meth:`start`.

    Args:
        budget: limits as in the YAML.
        summary: counts the jobs that have a row.
        per_trial: jobs of a trial.
        clock: seconds.

    Attributes:
        dropped: queued jobs that were given up and that another session may take up.
    """

    def __init__(self, budget: Budget, summary: Summary, per_trial: int, clock: Callable[[], float]) -> None:
        self._budget = budget
        self._summary = summary
        self._per_trial = per_trial
        self._clock = clock
        self._started = clock()
        self._flops = 0.0
        self._before = 0.0
        self.dropped = 0

    def start(self) -> None:
        """The session begins; what is spent before it is of earlier ones (see :meth:`spent_before`)."""
        self._started = self._clock()

    def spent_before(self, flops: float) -> None:
        """Answers of an earlier session took so many FLOPs."""
        self._flops += flops
        self._before += flops

    @property
    def elapsed(self) -> float:
        """Seconds since the session began."""
        return self._clock() - self._started

    def spend(self, flops: float) -> None:
        """A job's answers took so many FLOPs."""
        self._flops += flops

    def ended(self, running: int) -> str | None:
        """Which limit has been reached, or None; ``running`` jobs will have a row, too."""
        budget = self._budget
        if budget.jobs is not None and self._summary.done + running >= budget.jobs:
            return f"{budget.jobs} jobs"
        if budget.hours is not None and self.elapsed >= budget.hours * 3600:
            return f"{budget.hours:g} hours"
        if budget.flops is not None and self._flops >= budget.flops:
            return f"{budget.flops:g} FLOPs"
        return None

    def seconds_left(self) -> float | None:
        """Seconds until the budget's hours or FLOPs end the session, at the rate so far; None where neither is limited."""
        ends = []
        if self._budget.hours is not None:
            ends.append(self._budget.hours * 3600 - self.elapsed)
        if self._budget.flops is not None and self._flops > self._before:
            rate = (self._flops - self._before) / max(self.elapsed, 1e-9)
            ends.append((self._budget.flops - self._flops) / rate)
        return max(0.0, min(ends)) if ends else None

    def drop(self, jobs: int) -> None:
        """So many queued jobs were given up. Hours are counted per session: another one may take these up."""
        self.dropped += jobs if self._budget.hours is not None else 0

    def allowed_trials(self, missing: int, open_jobs: int, trials: int) -> int:
        """How many more trials may begin.

        Args:
            missing: jobs that are wanted.
            open_jobs: that are queued or run.
            trials: that have begun, earlier sessions included.
        """
        if self._budget.jobs is not None:
            missing = min(missing, self._budget.jobs - self._summary.done - open_jobs)
        count = -(-missing // self._per_trial)
        return count if self._budget.trials is None else min(count, self._budget.trials - trials)

    def all_trials(self, trials: int) -> str | None:
        """The limit of trials, when so many are all that may begin."""
        limit = self._budget.trials
        return f"{limit} trials" if limit is not None and trials >= limit else None

    def expected_jobs(self, points: int | None) -> int | None:
        """Jobs in all, where a limit or the number of ``points`` of the space says."""
        sizes = [n for n in (points, self._budget.trials) if n is not None]
        jobs = [min(sizes) * self._per_trial] if sizes else []
        if self._budget.jobs is not None:
            jobs.append(self._budget.jobs)
        return min(jobs) if jobs else None

    def jobs_left(self, waiting: int, running: int, points: int | None) -> int:
        """Jobs that another session would still run: all that are known of, and where the session was stopped before its
        end and the search is finite, those that it would have come to."""
        known = waiting + running + self.dropped
        expected = self.expected_jobs(points)
        stopped = self._summary.interrupted or self.ended(running) is not None
        if expected is None or not stopped:
            return known
        return max(known, expected - self._summary.done)
