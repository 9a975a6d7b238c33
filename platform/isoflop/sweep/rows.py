"""Result rows: from a job and what a worker reported to the columns of the ledger, and back to trial outcomes."""

from __future__ import annotations

import datetime as dt
import json
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.text import safe_line, safe_name, safe_text
from isoflop.core.version import __version__
from isoflop.jobs import Job, Outcome
from isoflop.jobs.traces import Trace
from isoflop.ledger.schema import FOOTPRINT_COLUMNS, SCHEMA
from isoflop.methods.base import METHODS
from isoflop.sweep.blocks import Objective

FINAL_OK = ("ok", "pruned")


def make_row(sweep: str, trial_number: int, job: Job, outcome: Outcome, attempt: int) -> dict[str, Any]:
    """A ledger row (``sequence`` and ``mlflow_run_id`` are set by those who know them), its texts made safe."""
    scores = np.asarray(outcome.errors, dtype=np.float64)
    started = dt.datetime.fromtimestamp(outcome.started or dt.datetime.now().timestamp(), dt.UTC)
    footprint = {safe_name(k): float(v) for k, v in outcome.footprint.items()}
    return {
        "job_id": job.id,
        "trial_id": job.trial_id,
        "trial_number": trial_number,
        "sweep": sweep,
        "model": safe_text(job.model, None),
        "method": job.method_label,
        "family": "+".join(dict.fromkeys(METHODS.get(m.name).family for m in job.methods)),
        "knobs": json.dumps(job.knobs(), sort_keys=True),
        "task": job.task,
        "repeat": job.repeat,
        "seed": job.seed,
        "status": outcome.status,
        "N": int(outcome.axes["N"]) if "N" in outcome.axes else None,
        **{axis: outcome.axes.get(axis) for axis in ("V", "Q", "ratio", "bits")},
        "error": float(scores.mean()) if len(scores) else None,
        "error_se": float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None,
        "n_examples": len(scores) or None,
        "metrics": sorted((safe_name(k), float(v)) for k, v in outcome.metrics.items()),
        "scores": outcome.errors or None,
        "shard_sizes": outcome.shard_sizes or None,
        **{name: footprint.get(name) for name in FOOTPRINT_COLUMNS},
        "footprint": sorted(footprint.items()),
        "traces": [(safe_name(name), _points(trace)) for name, trace in sorted(outcome.traces.items())] or None,
        "spec": json.dumps(job.to_dict(), sort_keys=True),
        "versions": sorted({**software(), **dict(job.versions)}.items()),
        "host": safe_line(outcome.host),
        "device": safe_line(outcome.device),
        "worker": safe_line(outcome.worker),
        "attempt": attempt,
        "started": started,
        "finished": started + dt.timedelta(seconds=outcome.seconds),
        "wall_seconds": outcome.seconds,
        "model_was_warm": outcome.model_was_warm,
        "error_type": safe_name(outcome.error_type) or None,
        "error_text": safe_text(outcome.error_text) or None,
    }


def row_of(sweep: str, trial_number: int, job: Job, outcome: Outcome, attempt: int) -> tuple[dict[str, Any], Outcome]:
    """:func:`make_row`, and the outcome that it is of: a failed one where the report is such as no worker of ours gives."""
    try:
        return make_row(sweep, trial_number, job, outcome, attempt), outcome
    except (ValueError, TypeError, OverflowError) as error:
        failed = Outcome("failed", started=time.time(), error_type="SpoiltResult", error_text=safe_text(error))
        return make_row(sweep, trial_number, job, failed, attempt), failed


def spoilt_row(row: Mapping[str, Any], error: Exception) -> dict[str, Any]:
    """A failed row in the place of one that the ledger cannot take: what fits its columns, and what was wrong."""
    kept = {name: value for name, value in row.items() if name in SCHEMA.names and _fits(name, value)}
    lost = sorted(set(row) - set(kept)) or ["the row"]
    result = dict.fromkeys(
        ("error", "error_se", "n_examples", "scores", "shard_sizes", "metrics", "footprint", "traces")
    )
    text = f"its result cannot be kept ({', '.join(lost)}): {safe_text(error)}"
    return {**kept, **result, "status": "failed", "error_type": "SpoiltResult", "error_text": text}


def _fits(name: str, value: Any) -> bool:
    try:
        pa.array([value], SCHEMA.field(name).type)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _points(trace: Trace) -> list[dict[str, float]]:
    return [{"step": step, "value": value} for step, value in trace]


@cache
def software() -> dict[str, str]:
    """Versions that a result may depend on."""
    out = {"isoflop": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "ray", "optuna"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def objective_values(objectives: Sequence[Objective], rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
    """The objective values of a trial: means over its rows; None when one cannot be had (a failed job, a missing metric)."""
    values = []
    for objective in objectives:
        found = [row_value(r, objective.metric) for r in rows_of(objective, rows)]
        if not found or any(v is None or not np.isfinite(v) for v in found):
            return None
        values.append(float(np.mean([v for v in found if v is not None])))
    return tuple(values)


def rows_of(objective: Objective, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that an objective looks at."""
    return [r for r in rows if objective.task is None or r["task"] == objective.task]


def row_value(row: Mapping[str, Any], metric: str) -> float | None:
    """A number of a row by name: a column, else a metric, else a footprint key."""
    value = row.get(metric)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    for column in ("metrics", "footprint"):
        entries = dict(row.get(column) or ())
        if metric in entries:
            return float(entries[metric])
    return None
