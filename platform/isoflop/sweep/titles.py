"""What jobs and stages are called where people read of them."""

from __future__ import annotations

from collections.abc import Iterator

from isoflop.core.knobs import shown
from isoflop.core.stage import Stage, walk
from isoflop.jobs import Job, ResolvedJob


def job_title(job: Job) -> str:
    """Model, method, knobs and task of a job."""
    knobs = " ".join(f"{k.rsplit('.', 1)[-1]}={shown(v)}" for k, v in job.knobs().items())
    return " ".join(
        p for p in (job.model, job.method_label, knobs, job.task, f"r{job.repeat}" if job.repeat else "") if p
    )


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
    return f"{kind} of {owner}" if owner else key


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
