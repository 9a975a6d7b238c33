"""Passes a sweep's snapshots on to Ray's metrics, about once a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from isoflop.sweep.progress import Progress, Snapshot

if TYPE_CHECKING:
    from isoflop.execute.metrics import SweepMetrics

_SECONDS = 1.0


class MetricsProgress:
    """A progress that also feeds Prometheus through Ray.

    Args:
        inner: is told everything, too.
        sweep: name of the sweep.
        enabled: whether jobs run on Ray; if not, nothing is imported and nothing happens.
    """

    def __init__(self, inner: Progress, sweep: str, enabled: bool) -> None:
        self._inner = inner
        self._sweep = sweep
        self._enabled = enabled
        self._metrics: SweepMetrics | None = None
        self._last = 0.0

    def update(self, snapshot: Snapshot) -> None:
        """Show the state; the last one of a session always gets through."""
        self._inner.update(snapshot)
        if not self._enabled:
            return
        idle = not snapshot.running and not snapshot.waiting
        if idle or time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            self._send(snapshot)

    def line(self, text: str) -> None:
        """Pass an event on."""
        self._inner.line(text)

    def _send(self, s: Snapshot) -> None:
        from isoflop.execute.metrics import SweepMetrics

        if not SweepMetrics.ready():  # workers start with the first job
            return
        if self._metrics is None:
            self._metrics = SweepMetrics(self._sweep)
        metrics = self._metrics
        for status in ("ok", "failed", "infeasible", "pruned"):
            metrics.total("isoflop_jobs", getattr(s, status), status)
        metrics.total("isoflop_warm_model_hits", s.warm)
        metrics.total("isoflop_stages_computed", s.stages_done)
        if s.total is not None:
            metrics.gauge("isoflop_jobs_expected", s.total)
        metrics.gauge("isoflop_jobs_running", s.running)
        metrics.gauge("isoflop_jobs_waiting", s.waiting)
        metrics.gauge("isoflop_stages_waiting", s.stages_left)
        metrics.gauge("isoflop_workers", len(s.doing))
        metrics.gauge("isoflop_tracking_backlog", s.backlog)
        metrics.gauge("isoflop_job_seconds", s.job_seconds)
