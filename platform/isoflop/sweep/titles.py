"""What jobs and stages are called where people read of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from isoflop.core.knobs import shown
from isoflop.core.stage import Stage, walk
from isoflop.core.text import safe_line
from isoflop.jobs import Job, Outcome, ResolvedJob


def job_title(job: Job) -> str:
    """Model, method, knobs and task of a job."""
    knobs = knob_text(job.knobs())
    parts = (job.model, job.method_label, knobs, job.task, f"r{job.repeat}" if job.repeat else "")
    return safe_line(" ".join(p for p in parts if p))


def ending_line(job: Job, outcome: Outcome) -> str:
    """How a job ended, for the log."""
    result = (
        f"error {sum(outcome.errors) / len(outcome.errors):.4f}"
        if outcome.errors
        else f"{outcome.error_type}: {outcome.error_text}"
    )
    return f"{job_title(job)} {outcome.status} on {outcome.worker or '-'} in {outcome.seconds:.1f} s: {result}"


def knobs_title(text: str | None) -> str:
    """``k=2 lr=0.001`` of a row's knobs, which are JSON."""
    try:
        knobs = dict(json.loads(text or "{}"))
    except ValueError:  # of a ledger that somebody else wrote
        return safe_line(text)
    return safe_line(" ".join(f"{name}={value}" for name, value in knobs.items()))


def knob_text(knobs: Mapping[str, Any]) -> str:
    """``k=2 lr=0.001``: knobs by their own names, with their method's where several methods have one of that name."""
    last = Counter(name.rpartition(".")[2] for name in knobs)
    parts = []
    for name, value in knobs.items():
        path, _, own = name.rpartition(".")
        shared = f"{path.rpartition('/')[2]}.{own}"  # a combination's label before it says nothing new
        parts.append(f"{own if last[own] == 1 else shared}={shown(value)}")
    return " ".join(parts)


def stage_title(job: Job, key: str) -> str:
    """The kind of a stage and what it belongs to: ``weights of tiny-llava/d24``.

    Args:
        job: any job that needs it.
        key: of the stage.
    """
    kind = key.rpartition("-")[0] or key
    owner = next(
        (owner for stage, owner in _roots(ResolvedJob.of(job)) if any(s.key == key for s in walk((stage,)))), ""
    )
    return safe_line(f"{kind} of {owner}" if owner else key)


def _roots(resolved: ResolvedJob) -> Iterator[tuple[Stage, str]]:
    """The stages that a job asks for by itself, each with what asks for it."""
    job = resolved.job
    if resolved.weights is not None:
        yield resolved.weights, job.model
    for stage in resolved.task.stages(resolved.info):
        yield stage, f"{job.task} on {job.model}"
    for method, prepared in zip(job.methods, resolved.prepared, strict=True):
        if prepared is not None:
            yield prepared, f"{method.name} on {job.model}"
