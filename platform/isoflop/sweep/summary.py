"""How a session ended, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Summary:
    """How a session ended.

    Attributes:
        cached: jobs that had a row before; left: jobs that another session would still run.
        seconds: of the session.
        stage_seconds: of workers, that shared stages took in this session; job_seconds: that jobs took.
        affinity: share of handed-out jobs that found their model warm.
        reason: why it ended, where there is more to say than that everything is done.
        untracked: what MLflow does not show of the sweep, why, and what helps; empty when it shows everything.
        aimless: which objective names what no row has, why the session ended; empty when all is well.
    """

    cached: int = 0
    ok: int = 0
    failed: int = 0
    infeasible: int = 0
    pruned: int = 0
    left: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stages: int = 0
    stage_seconds: float = 0.0
    job_seconds: float = 0.0
    affinity: float = 0.0
    reason: str = ""
    untracked: str = ""
    aimless: str = ""

    @property
    def ran(self) -> int:
        """Jobs that got a row in this session."""
        return self.ok + self.failed + self.infeasible + self.pruned

    @property
    def done(self) -> int:
        """Jobs that have a row."""
        return self.cached + self.ran

    def recount(self, was: str, now: str) -> None:
        """A job's status turned out to be another."""
        setattr(self, was, getattr(self, was) - 1)
        self.count(now)

    def count(self, status: str) -> None:
        """A job got a row with this status."""
        setattr(self, status, getattr(self, status) + 1)
