"""When the search is asked, and how much is in flight at a time."""

from __future__ import annotations

_SHORT_JOB = 2.0  # seconds; only short jobs are queued behind another on the same worker
_TINY_JOB = 0.05  # seconds; of such jobs more are asked for at a time, or committing each few would hold them up
_NEWEST = 0.2  # weight of the last job in the mean


class Pacing:
    """Keeps the queue a little fuller than the workers need.

    A search that learns is asked as late as possible, so that it knows most; of short jobs a few at once, or asking would
    hold them up. An eager one is asked ahead.

    Args:
        eager: the search does not learn from outcomes.
        per_trial: jobs of a trial.

    Attributes:
        job_seconds: mean of the last jobs; 0 before the first.
        exhausted: nothing more will be asked for in this session.
    """

    def __init__(self, eager: bool, per_trial: int) -> None:
        self.eager = eager
        self._per_trial = per_trial
        self.job_seconds = 0.0
        self.exhausted = False

    def took(self, seconds: float) -> None:
        """A job ended."""
        mean = self.job_seconds
        self.job_seconds = seconds if not mean else (1 - _NEWEST) * mean + _NEWEST * seconds

    @property
    def depth(self) -> int:
        """Jobs that a worker has at a time, the running one included."""
        return 2 if self.job_seconds < _SHORT_JOB else 1

    def per_slot(self, any_ran: bool) -> int:
        """Jobs of a search that learns which are open at a time, per slot."""
        if self.job_seconds < _TINY_JOB and any_ran:
            return 8
        return 4 if self.job_seconds < _SHORT_JOB else 1

    def missing_jobs(self, slots: int, queued: int, open_trials: int, any_ran: bool) -> int:
        """Jobs that the search is to be asked for; none when this is not positive.

        Args:
            slots: workers.
            queued: jobs that wait.
            open_trials: that have a job without a row.
            any_ran: a job got its row in this session.
        """
        slots = max(1, slots)
        if self.eager:
            return max(4 * slots, 16) - queued
        return slots * self.per_slot(any_ran) - open_trials * self._per_trial

    def wants_rows(self, slots: int, rows: int, any_ran: bool) -> bool:
        """Whether a search that is thinking should hear of so many finished rows before it runs out of things to think of."""
        return rows >= slots * self.per_slot(any_ran) // 2
