"""What the engine's tests share: toy sweeps as dicts, a recorder, and a comparison of results."""

from __future__ import annotations

import copy
import datetime as dt
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa

TOY: dict[str, Any] = {
    "name": "toy",
    "seed": 0,
    "import": ["toy_parts"],
    "models": ["toy/s", "toy/m"],
    "methods": [{"toy-tokens": {"tokens": [1, 4, 16]}}],
    "tasks": ["toy-task", "toy-other"],
    "limits": {"timeout": 60, "retries": 1},
}


def toy(**changes: Any) -> dict[str, Any]:
    """The toy sweep (6 trials, 12 jobs) with some keys replaced."""
    return {**copy.deepcopy(TOY), **changes}


def one_bad(how: str, **changes: Any) -> dict[str, Any]:
    """A sweep whose first method is fine and whose second misbehaves: 2 models x 2 methods x 1 task."""
    methods = [{"toy-tokens": {"tokens": [4]}}, {"toy-bad": {"how": how}}]
    return toy(methods=methods, tasks=["toy-task"], **changes)


def ledger_row(job: str, error: float = 0.5, **more: Any) -> dict[str, Any]:
    """A row of a job that went well, as a ledger takes it."""
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return {
        "job_id": job,
        "trial_id": "t",
        "model": "m",
        "method": "none",
        "task": "t",
        "status": "ok",
        "error": error,
        "metrics": [("loss", 1.0)],
        "scores": [error],
        "started": now,
        "finished": now,
        **more,
    }


class Lines:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.snapshots: list[dict[str, Any]] = []

    def update(self, snapshot: Any) -> None:
        self.snapshots.append(dict(vars(snapshot)))

    def line(self, text: str) -> None:
        self.lines.append(text)


def scores(table: pa.Table) -> dict[str, Any]:
    """What must not depend on how a sweep was run: job id -> status, score and axes."""
    columns = ["job_id", "trial_id", "status", "error", "error_se", "N", "V", "scores", "spec"]
    return {r["job_id"]: r for r in table.select(columns).to_pylist()}


def run_local(given: Any, tmp_path: Path, progress: Any = None, **options: Any) -> Any:
    """Run a sweep in this process, without MLflow, in folders below ``tmp_path``."""
    import isoflop

    chosen = {
        "executor": "local",
        "tracking_uri": "none",
        "store": str(tmp_path / "store"),
        "cache_dir": tmp_path / "cache",
        **options,
    }
    return isoflop.run(given, progress=progress, **chosen)


def within(seconds: float, action: Any) -> Any:
    """What an action gives, in a thread of its own; fails where it does not end in time."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"did not end within {seconds} s"
    return found[0]
