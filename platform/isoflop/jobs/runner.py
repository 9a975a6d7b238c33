"""Runs jobs and computes stages inside one worker process, holding models warm between jobs."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from isoflop.core.errors import Infeasible
from isoflop.core.stage import Stage
from isoflop.core.text import safe_name, safe_text
from isoflop.jobs.devices import devices_here, name_of
from isoflop.jobs.faults import describe, is_interrupt, is_out_of_memory, is_transient, status_of
from isoflop.jobs.job import Job, ResolvedJob, versions_of
from isoflop.jobs.traces import Trace, traces_of
from isoflop.jobs.warm import WarmModels
from isoflop.methods.base import ADDITIVE_COSTS, Method
from isoflop.models.base import Model
from isoflop.models.spread import NoRoom
from isoflop.stages import StageCache
from isoflop.tasks.base import task_of

Status = Literal["ok", "failed", "infeasible", "pruned"]
OnShard = Callable[[int, float, int], bool]


@dataclass
class Outcome:
    """What a worker reports of one job: plain values only, whatever happened.

    Attributes:
        errors: one error per example, in the task's order (of the shards that were run).
        shard_sizes: examples per shard.
        metrics: means of the task's secondary metrics.
        footprint: measured costs.
        axes: N, V, Q, ratio, bits.
        traces: of the methods' inner steps, by name, thinned.
        error_type, error_text: of a job that failed or was infeasible.
        transient: whether another attempt may help, where it failed.
        crowded: it ran out of memory that others in its process may have taken: it is to be tried alone, in a fresh one.
    """

    status: Status
    errors: list[float] = field(default_factory=list)
    shard_sizes: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    footprint: dict[str, float] = field(default_factory=dict)
    axes: dict[str, float] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    error_type: str = ""
    error_text: str = ""
    transient: bool = True
    crowded: bool = False
    started: float = 0.0
    seconds: float = 0.0
    host: str = ""
    device: str = ""
    worker: str = ""
    model_was_warm: bool = False
    stages_computed: list[tuple[str, float]] = field(default_factory=list)


class Runner:
    """Executes jobs and stages in this process.

    Args:
        cache_dir: root of the stage cache.
        device: torch device, or those over which a model is spread; chosen from torch when None.
        name: of the worker, for provenance.
    """

    def __init__(
        self, cache_dir: str | Path | None = None, device: str | Sequence[str] | None = None, name: str = "driver"
    ) -> None:
        self.cache = StageCache(cache_dir, device or devices_here())
        self.name = name
        self._models = WarmModels(self.cache.devices)
        self._used = False

    def run_job(self, job: Job, on_shard: OnShard | None = None, alone: bool = False) -> Outcome:
        """Run one job to its end; never raises for the job's own failures.

        Args:
            on_shard: called after each shard with (shard index, mean error so far, examples so far); True stops the job.
            alone: without other models in memory.
        """
        if alone:
            self._models.clear()
        out = Outcome(
            "failed",
            started=time.time(),
            host=socket.gethostname(),
            device=name_of(self.cache.devices),
            worker=self.name,
        )
        clock = time.monotonic()
        computed_before = len(self.cache.computed)
        fresh, self._used = not self._used, True
        warm = set(self._models.held())
        try:
            resolved = resolve_here(job)
            warm.discard(resolved.model_key)
            self._run(resolved, out, on_shard)
        except Infeasible as error:
            out.status, out.error_type, out.error_text = "infeasible", "Infeasible", safe_text(error)
        except BaseException as error:  # also SystemExit, GeneratorExit and the panics of libraries in Rust
            if is_interrupt(error):
                raise
            out.status, out.transient = status_of(error, fresh, not warm), is_transient(error)
            out.crowded = out.status == "failed" and is_out_of_memory(error)
            out.error_type, out.error_text = type(error).__name__, describe(error)
            self._models.clear()  # nothing is known of their state
        out.seconds = time.monotonic() - clock
        out.stages_computed = self.cache.computed[computed_before:]
        return out

    def run_stage(self, job: Job, key: str) -> dict[str, Any]:
        """Compute the stage ``key`` of ``job``: ``{"ok": True, "seconds": …, "bytes": …}`` or the error as text.

        Where it ran out of memory beside warm models, it is computed again without them.
        """
        fresh, self._used = not self._used, True
        warm = len(self._models)
        result, crowded = self._try_stage(job, key, fresh)
        if crowded and warm:
            self._models.clear()  # here, where the error's frames hold nothing any more
            result, _ = self._try_stage(job, key, fresh)
        return result

    def _try_stage(self, job: Job, key: str, fresh: bool) -> tuple[dict[str, Any], bool]:
        """``run_stage``'s result, and whether the stage ran out of memory."""
        try:
            stage = _stage(job, key)
            seconds = self.cache.ensure(stage)
            return {"ok": True, "seconds": seconds, "bytes": self.cache.size(stage)}, False
        except BaseException as error:
            if is_interrupt(error):
                raise
            failed = {
                "ok": False,
                "status": status_of(error, fresh, alone=not self._models.held()),
                "transient": is_transient(error),
                "error_type": type(error).__name__,
                "error_text": describe(error),
            }
            return failed, is_out_of_memory(error)

    def stage_files(self, job: Job, key: str) -> dict[str, bytes]:
        """The files of a computed stage, to be sent to another host."""
        return self.cache.files(_stage(job, key))

    def install_stage(self, job: Job, key: str, files: dict[str, bytes] | Path) -> None:
        """Store a stage that another host computed: its files, or a folder that holds them."""
        self.cache.install(_stage(job, key), files)

    def _run(self, resolved: ResolvedJob, out: Outcome, on_shard: OnShard | None) -> None:
        model = self._model(resolved, out)
        errors: list[np.ndarray] = []
        metrics: dict[str, list[np.ndarray]] = {}
        stopped = False
        with ExitStack() as stack:
            prepared = [(m, self.cache.get(stage) if stage is not None else None) for m, stage in resolved.in_order]
            for method, value in prepared:
                stack.enter_context(method.apply(model, value))
            clock = time.monotonic()
            for index, shard in enumerate(resolved.task.evaluate(model, self.cache, resolved.job.seed)):
                errors.append(np.asarray(shard.errors, dtype=np.float64))
                for name, values in shard.metrics.items():
                    metrics.setdefault(safe_name(name), []).append(np.asarray(values, dtype=np.float64))
                so_far = np.concatenate(errors)
                if on_shard is not None and on_shard(index, float(so_far.mean()), len(so_far)):
                    stopped = True
                    break
            measured: dict[str, Any] = {
                "eval_seconds": time.monotonic() - clock,
                **resolved.task.measure(model, self.cache),
            }
            reports = [(method, method.footprint(model, self.cache)) for method, _ in resolved.in_order]
            footprint = merge_footprints(measured, reports)
        if not errors:
            raise ValueError(f"task {resolved.job.task} yielded no examples")
        out.footprint = {safe_name(name): float(value) for name, value in footprint.items()}
        scores = np.concatenate(errors)
        if not np.isfinite(scores).all():
            raise ArithmeticError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
        out.errors, out.shard_sizes = scores.tolist(), [len(e) for e in errors]
        out.metrics = {name: float(np.concatenate(parts).mean()) for name, parts in metrics.items()}
        # of the worker since it started, earlier jobs included: the system keeps no peak per job
        out.footprint["worker_peak_bytes"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        out.axes = _axes(resolved, out.footprint)
        out.traces = traces_of(prepared)
        out.status = "pruned" if stopped else "ok"

    def _model(self, resolved: ResolvedJob, out: Outcome) -> Model:
        warm = self._models.get(resolved.model_key)
        if warm is not None:
            out.model_was_warm = True
            return warm
        self._models.make_room(resolved.info)
        try:
            model = resolved.family.load(resolved.info, resolved.weights, self.cache)
        except NoRoom:
            if not self._models.held():
                raise
            self._models.clear()  # they may have taken it
            model = resolved.family.load(resolved.info, resolved.weights, self.cache)
        self._models.put(resolved.model_key, model)
        return model


class VersionMismatch(RuntimeError):
    """This process would compute something else than the job's id names."""


def resolve_here(job: Job) -> ResolvedJob:
    """The job's objects, if they are here what they were where the job was made; else VersionMismatch."""
    task = task_of(job.task, dict(job.task_options), dict(job.task_paths))
    methods = tuple(m.name for m in job.methods)
    here = versions_of(job.model, dict(job.model_options), methods, task, dict(job.calibration))
    for part, wanted in job.versions:
        found = here.get(part, "none")
        if found != wanted:
            name = {"model": f"model {job.model}", "task": f"task {job.task}"}.get(part, part.replace(":", " "))
            raise VersionMismatch(
                f"{name} has version {found} on {socket.gethostname()}, but the sweep was started with version {wanted}; "
                "every host needs the same code, checkpoint files and data; run the sweep again where these were changed on purpose"
            )
    return ResolvedJob.of(job)


def _stage(job: Job, key: str) -> Stage:
    """The stage of a job by its key."""
    stages = {stage.key: stage for stage in resolve_here(job).stages()}
    if key not in stages:
        raise VersionMismatch(
            f"job {job.id} has no stage {key} on {socket.gethostname()} (it has: {', '.join(stages) or 'none'}); "
            "every host needs the same code"
        )
    return stages[key]


def merge_footprints(
    measured: Mapping[str, Any], reports: Sequence[tuple[Method, Mapping[str, float]]]
) -> dict[str, Any]:
    """What the task measured together with what each method adds to it.

    Args:
        measured: from the task; holds for all methods together and is never replaced.
        reports: footprint of each method. Keys in ``ADDITIVE_COSTS`` are summed over the methods; ``ratio`` becomes
            ``ratio_<family>``, and so does ``bits`` where several methods report it (of the cache, of the weights).

    Raises:
        ValueError: a method reports what the task measured, or two report the same key that cannot be summed.
    """
    merged = dict(measured)
    owner = dict.fromkeys(measured, "the task")
    by_family = {"ratio"} | ({"bits"} if sum("bits" in report for _, report in reports) > 1 else set())
    for method, report in reports:
        for name, value in report.items():
            key = f"{name}_{method.family.replace('-', '_')}" if name in by_family else name
            if key in owner and (key not in ADDITIVE_COSTS or key in measured):
                raise ValueError(
                    f"method {method.name}: its footprint gives {key} = {value}, which {owner[key]} gave already; "
                    "report it under a name of its own"
                )
            owner[key] = f"method {method.name}"
            merged[key] = merged[key] + value if key in merged else value
    return merged


def _axes(resolved: ResolvedJob, footprint: dict[str, float]) -> dict[str, float]:
    axes = {"N": float(resolved.info.n_params)}
    for axis, key in (("V", "visual_tokens"), ("Q", "text_tokens"), ("bits", "bits")):
        if key in footprint:
            axes[axis] = footprint[key]
    ratio = _ratio(resolved, footprint)
    if ratio is not None:
        axes["ratio"] = ratio
    return axes


def _ratio(resolved: ResolvedJob, footprint: dict[str, float]) -> float | None:
    """The ratio of a trial's one method; in a composition that of all bytes, dense over compressed."""
    ratios = {key: value for key, value in footprint.items() if key.startswith("ratio_")}
    full = footprint.get("visual_tokens_dense", resolved.info.geometry.get("visual_tokens"))
    if full and footprint.get("visual_tokens"):
        ratios["ratio_visual_tokens"] = float(full) / footprint["visual_tokens"]  # measured, not claimed
    if len(resolved.methods) > 1:  # by their number, so that one sweep's branch never mixes units
        if footprint.get("bytes"):
            return footprint["bytes_dense"] / footprint["bytes"]
        return ratios.get("ratio_visual_tokens", next(iter(ratios.values())) if len(ratios) == 1 else None)
    own = f"ratio_{resolved.methods[0].family.replace('-', '_')}" if resolved.methods else "ratio_visual_tokens"
    return ratios.get(own, ratios.get("ratio_visual_tokens"))
