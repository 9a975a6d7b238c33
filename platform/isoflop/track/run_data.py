"""What one ledger row looks like as an MLflow run: name, params, metrics, tags, within MLflow's limits."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from isoflop.core.hashing import content_hash
from isoflop.core.text import safe_line, safe_text
from isoflop.track.names import MOST, spelt_apart

_MAX_PARAM = 6000
_MAX_DIGEST = 36
_MAX_TAG = 8000  # longer ones are cut silently
STAMP_TAG = "isoflop.row"  # of a run: which row it shows; absent while it is half written
ERROR_TAGS = ("isoflop.error_type", "isoflop.error")
_STATUS = {"ok": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "infeasible": "FAILED"}
_COLUMNS = (
    "error", "error_se", "N", "V", "Q", "ratio", "bits", "flops", "flops_llm", "flops_vision", "flops_method",
    "seconds", "peak_bytes", "weight_bytes", "kv_bytes", "wall_seconds", "n_examples",
)  # fmt: skip
_STEPS, _TRACE = ("shard_error", "running_error"), "trace/"  # metrics with a value per step
_PARAMS = ("model", "method", "task", "repeat", "seed")


@dataclass(frozen=True)
class TaskData:
    """The examples of a task as an MLflow data set.

    Attributes:
        name: the task's.
        digest: the task's version, and a hash of its options where it has some: what names the examples.
        source: JSON in the form that MLflow gives to data made by code.
        profile: the options, as JSON.
    """

    SOURCE_TYPE: ClassVar[str] = "code"
    CONTEXT: ClassVar[tuple[str, str]] = ("mlflow.data.context", "eval")

    name: str
    digest: str
    source: str
    profile: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> TaskData | None:
        """From a ledger row; None for one that names no task or no version of it."""
        version = dict(row.get("versions") or ()).get("task")
        if not row["task"] or not version:
            return None
        options = json.loads(row.get("spec") or "{}").get("task_options") or {}
        tail = f"-{content_hash(options, 8)}" if options else ""
        digest = version[: _MAX_DIGEST - len(tail)] + tail
        source = {"tags": {"mlflow.source.name": f"isoflop task {row['task']}", "mlflow.source.type": "LOCAL"}}
        return cls(str(row["task"])[:500], digest, json.dumps(source), json.dumps(options, sort_keys=True))


@dataclass(frozen=True)
class RunData:
    """One MLflow run. Times are milliseconds since the epoch; ``stamp`` names the row (:func:`stamp_of`)."""

    job_id: str
    stamp: int
    name: str
    status: str
    start_ms: int
    end_ms: int
    params: dict[str, str]
    metrics: dict[str, float]
    steps: tuple[tuple[str, int, float], ...]
    tags: dict[str, str]
    dataset: TaskData | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RunData:
        """From a ledger row."""
        start = int(row["started"].timestamp() * 1000)
        end = int(row["finished"].timestamp() * 1000)
        return cls(
            job_id=row["job_id"],
            stamp=stamp_of(row["sequence"], row["finished"]),
            name=_run_name(row),
            status=_STATUS[row["status"]],
            start_ms=start,
            end_ms=max(end, start),
            params=_params(row),
            metrics=_metrics(row),
            steps=_steps(row),
            tags=_tags(row),
            dataset=TaskData.of(row),
        )


def stamp_of(sequence: int, finished: dt.datetime) -> int:
    """Names a row: later rows of a ledger have larger stamps, and rows of another ledger have others.

    The sequence number alone would not do: it begins anew when a store is emptied, and two stores may share a server.
    """
    return int(sequence) * 10**13 + int(finished.timestamp() * 1000)


def stamp_in(tag: str | None) -> int:
    """The stamp in a run's tag; 0, that of a half-written run, where there is none that isoflop wrote."""
    return int(tag) if tag is not None and tag.isdecimal() else 0


def _run_name(row: Mapping[str, Any]) -> str:
    knobs = json.loads(row["knobs"] or "{}")
    shown = " ".join(f"{k.rsplit('.', 1)[-1]} {v}" for k, v in list(knobs.items())[:3])
    repeat = f" r{row['repeat']}" if row["repeat"] else ""
    return safe_line(f"{row['model']} {row['method']}{' ' + shown if shown else ''} {row['task']}{repeat}", 250)


def _params(row: Mapping[str, Any]) -> dict[str, str]:
    """What names the job, its knobs, and the text that it calibrated on where a sweep chose that; a knob that is called like one of the former is ``knobs.NAME``."""
    own = {name: row[name] for name in _PARAMS}
    knobs = {f"knobs.{k}" if k in own else k: v for k, v in json.loads(row["knobs"] or "{}").items()}
    names = spelt_apart(knobs, own)
    params = own | {names[k]: v for k, v in knobs.items()}
    calibration = json.loads(row.get("spec") or "{}").get("calibration")
    if calibration:
        params.setdefault("calibration", json.dumps(calibration, sort_keys=True))
    texts = {k: json.dumps(v) if isinstance(v, list) else str(v) for k, v in params.items() if v is not None}
    return {k: safe_text(text, _MAX_PARAM) for k, text in texts.items()}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The row's columns by their names, whatever a task calls its metrics; then those metrics, then other costs.

    One that is called like a column, whether the row has a value there or not, is ``metrics.NAME`` or ``footprint.NAME``, as
    laws call it; so is a cost that is called like a metric.
    """
    columns = {name: row.get(name) for name in _COLUMNS}
    metrics = {_apart("metrics", k): v for k, v in dict(row.get("metrics") or ()).items()}
    costs = {
        f"footprint.{k}" if k in metrics else _apart("footprint", k): v
        for k, v in dict(row.get("footprint") or ()).items()
        if k not in _COLUMNS or v != columns[k]  # a cost that has a column stands there
    }
    names = spelt_apart([*metrics, *costs], columns)
    values = columns | {names[k]: v for k, v in (metrics | costs).items()}
    # MLflow turns infinities into the largest float; leave them out
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


def _apart(record: str, name: str) -> str:
    taken = name in _COLUMNS or name in _STEPS or name.startswith(_TRACE)
    return f"{record}.{name}" if taken else name


def _steps(row: Mapping[str, Any]) -> tuple[tuple[str, int, float], ...]:
    """Mean error of each shard (step = shard), and the running mean; then the traces, whose prefix keeps them apart."""
    scores, sizes = row.get("scores") or [], row.get("shard_sizes") or []
    out, begin = [], 0
    for step, size in enumerate(sizes):
        end = begin + size
        if not size:
            continue
        out.append((_STEPS[0], step, sum(scores[begin:end]) / size))
        out.append((_STEPS[1], step, sum(scores[:end]) / end))
        begin = end
    traces = dict(row.get("traces") or ())
    names = spelt_apart(traces)
    for name, points in traces.items():
        known = [(p["step"], p["value"]) for p in points if p["value"] is not None and math.isfinite(p["value"])]
        out += [(f"{_TRACE}{names[name]}"[:MOST], step, value) for step, value in known]
    return tuple(out)


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    tags = {
        "isoflop.job_id": row["job_id"],
        "isoflop.trial_id": row["trial_id"],
        "isoflop.trial": row["trial_number"],
        "isoflop.sweep": row["sweep"],
        "isoflop.family": row["family"],
        "isoflop.status": row["status"],
        "isoflop.attempt": row["attempt"],
        "isoflop.host": row["host"],
        "isoflop.device": row["device"],
        "isoflop.worker": row["worker"],
        "isoflop.error_type": row["error_type"],
        "isoflop.error": row["error_text"],
        "isoflop.versions": json.dumps(dict(row["versions"] or ()), sort_keys=True),
        "model": row["model"],
        "method": row["method"],
        "task": row["task"],
    }
    return {k: safe_text(v, _MAX_TAG) for k, v in tags.items() if v is not None}
