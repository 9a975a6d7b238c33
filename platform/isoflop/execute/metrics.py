"""Figures of a running sweep as Ray metrics: every node of a cluster serves them, with Ray's own, to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.metrics import Counter, Gauge

_GAUGES = {
    "isoflop_jobs_expected": "Jobs of the sweep in all, when that is known.",
    "isoflop_jobs_running": "Jobs that workers have.",
    "isoflop_jobs_waiting": "Jobs in the driver's queue.",
    "isoflop_stages_waiting": "Stages that queued jobs wait for.",
    "isoflop_workers": "Workers that take jobs.",
    "isoflop_tracking_backlog": "Rows that MLflow does not show yet.",
    "isoflop_job_seconds": "Seconds per job, of the last jobs (exponential mean).",
}
_COUNTERS = {
    "isoflop_jobs": "Jobs that got a result in this session, by status.",
    "isoflop_warm_model_hits": "Jobs that went to a worker which held their model.",
    "isoflop_stages_computed": "Stages that were computed in this session.",
}
_TAGS = {"isoflop_jobs": ("sweep", "status")}


class SweepMetrics:
    """The metrics of one session of one sweep. Ray prefixes names with ``ray_`` and counters get ``_total``.

    Args:
        sweep: its name, the tag ``sweep`` of every metric.
    """

    def __init__(self, sweep: str) -> None:
        self._tags = {"sweep": sweep}
        self._gauges = {name: Gauge(name, text, ("sweep",)) for name, text in _GAUGES.items()}
        self._counters = {name: Counter(name, text, _TAGS.get(name, ("sweep",))) for name, text in _COUNTERS.items()}
        self._totals: dict[tuple[str, str], float] = {}

    @staticmethod
    def ready() -> bool:
        """Whether there is a cluster to tell; metrics made before would be lost."""
        return bool(ray.is_initialized())

    def gauge(self, name: str, value: float) -> None:
        """Set a figure that goes up and down."""
        self._gauges[name].set(value, self._tags)

    def total(self, name: str, value: float, status: str = "") -> None:
        """Raise a counter to ``value``."""
        known = self._totals.get((name, status), 0.0)
        if value > known:
            self._counters[name].inc(value - known, self._tags | ({"status": status} if status else {}))
            self._totals[name, status] = value


def describe() -> Mapping[str, str]:
    """Every metric as Prometheus names it, and what it says."""
    return {f"ray_{n}": t for n, t in _GAUGES.items()} | {f"ray_{n}_total": t for n, t in _COUNTERS.items()}
