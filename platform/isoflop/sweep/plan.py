"""The dry run: what a sweep would run, which stages its jobs would share, and what is known of the cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from isoflop.core.documents import documents
from isoflop.core.errors import UserError
from isoflop.jobs import Job, ResolvedJob
from isoflop.ledger import Ledger, Store
from isoflop.models.worlds.own_text import text_bytes
from isoflop.search.law.forecast import Forecast
from isoflop.stages import StageCache
from isoflop.sweep.law_axes import axes_of
from isoflop.sweep.queue import kind_of
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.searching import SweepShelf, make_proposer_for, problem_of
from isoflop.sweep.trials import TrialBook

_SAMPLE = 2000  # jobs looked at in detail


@dataclass
class StagePlan:
    """Stages of one kind: how many there are, how many lie in this host's cache, how many jobs share them."""

    kind: str
    count: int = 0
    cached: int = 0
    uses: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass
class Plan:
    """What a sweep would do.

    Attributes:
        trials, jobs: in all; None when the search runs until it is stopped.
        done: jobs that have results; infeasible: points that cannot run, with the reason.
        job_seconds: median of the jobs that have run, or None.
        flops: per answer, summed over finished jobs' answers; None when nothing has run.
        forecast: what the search's answer is expected to cost, where it says.
        axes: of each method, the least and the most that its configurations plan on an axis (``Method.axes``).
        dense_bits: of each model, what an element counts where nothing compresses it (``ModelInfo.dense_bits``): what planned
            and measured ratios of bits are against.
        calibration: the texts that methods calibrate on where the sweep names some: ``data``, ``documents``, ``bytes``.
    """

    name: str
    sampler: str
    store: str
    trials: int | None
    jobs: int | None
    done: int
    stages: list[StagePlan]
    infeasible: list[str]
    job_seconds: float | None
    flops: float | None
    sampled: bool
    budget: dict[str, Any]
    forecast: Forecast | None = None
    axes: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    dense_bits: dict[str, int] = field(default_factory=dict)
    calibration: tuple[dict[str, Any], ...] = ()

    @property
    def left(self) -> int | None:
        """Jobs to run."""
        return None if self.jobs is None else max(0, self.jobs - self.done)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "sampler": self.sampler,
            "store": self.store,
            "trials": self.trials,
            "jobs": self.jobs,
            "done": self.done,
            "left": self.left,
            "stages": [
                {
                    "kind": s.kind,
                    "count": s.count,
                    "cached": s.cached,
                    "uses": s.uses,
                    "median_seconds": median(s.seconds) if s.seconds else None,
                }
                for s in self.stages
            ],
            "infeasible": self.infeasible,
            "median_job_seconds": self.job_seconds,
            "flops_spent": self.flops,
            "sampled": self.sampled,
            "budget": self.budget,
            "axes": {method: {axis: list(ends) for axis, ends in found.items()} for method, found in self.axes.items()},
            "dense_bits": self.dense_bits,
            "calibration": list(self.calibration),
            "forecast": None if self.forecast is None else self.forecast.to_dict(),
        }


def make_plan(sweep: Sweep, store_uri: str | None = None, cache_dir: Path | None = None) -> Plan:
    """Plan a sweep against its store and this host's stage cache; runs nothing and writes nothing."""
    spec = sweep.spec
    store = Store.open(store_uri or spec.store)
    rows = sweep.current(
        Ledger(store, spec.name).read(["job_id", "spec", "status", "wall_seconds", "flops", "n_examples"])
    )
    trials = _trials(sweep)
    per_trial = len(sweep.task_options) * spec.repeats
    jobs = None if trials is None else trials * per_trial
    if spec.budget.jobs is not None:
        jobs = spec.budget.jobs if jobs is None else min(jobs, spec.budget.jobs)
    sample, infeasible = _sample(sweep)
    stages = _stages(sample, StageCache(cache_dir))
    finished = [s for s in rows["wall_seconds"].to_pylist() if s]
    return Plan(
        name=spec.name,
        sampler=spec.search.sampler,
        store=store.shown,
        trials=trials,
        jobs=jobs,
        done=rows.num_rows,
        stages=stages,
        infeasible=infeasible,
        job_seconds=median(finished) if finished else None,
        flops=_flops(rows),
        sampled=jobs is None or len(sample) < jobs,
        budget={k: v for k, v in spec.budget.model_dump().items() if v is not None},
        forecast=_forecast(sweep, store),
        axes=_axes(sample),
        dense_bits={job.job.model: job.info.dense_bits for job in sample},
        calibration=tuple(_calibration(dict(text.choice)) for text in sweep.calibrations if text.choice),
    )


def _calibration(chosen: dict[str, Any]) -> dict[str, Any]:
    """How much text there is to calibrate on."""
    rows = documents(chosen["data"], chosen["split"])
    return {"data": chosen["data"], "documents": len(rows), "bytes": text_bytes(rows, chosen["field"])}


def _axes(jobs: list[ResolvedJob]) -> dict[str, dict[str, tuple[float, float]]]:
    """The ends of what each method plans, over the jobs that were looked at."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for job in jobs:
        ends = found.setdefault(job.job.method_label, {})
        for axis, value in axes_of(job.info, job.methods).items():
            low, high = ends.get(axis, (value, value))
            ends[axis] = min(low, value), max(high, value)
    return {method: ends for method, ends in found.items() if ends}


def _forecast(sweep: Sweep, store: Store) -> Forecast | None:
    """What the search's answer is expected to cost, from what its rows have told so far; None where it does not say."""
    if not sweep.strategy.forecasts:
        return None
    problem = problem_of(sweep, pruned=False)
    proposer = sweep.strategy.make(problem)
    sweep.strategy.keep(proposer, SweepShelf(store, sweep.spec.name))
    rows = sweep.current(Ledger(store, sweep.spec.name).read())
    if rows.num_rows:
        TrialBook(sweep, proposer).restore(rows)
    return sweep.strategy.forecast(proposer, problem)


def _trials(sweep: Sweep) -> int | None:
    sizes = [n for n in (sweep.space.size(), sweep.spec.budget.trials) if n is not None]
    return min(sizes) if sizes else None


def _sample(sweep: Sweep) -> tuple[list[ResolvedJob], list[str]]:
    """The jobs that a grid would run, or the first that a search would."""
    spec = sweep.spec
    proposer = make_proposer_for(sweep, pruned=False)
    per_trial = len(sweep.task_options) * spec.repeats
    wanted = min(_trials(sweep) or 50, max(1, _SAMPLE // per_trial))
    jobs: list[ResolvedJob] = []
    infeasible: list[str] = []
    for proposal in proposer.ask(wanted):
        for job in sweep.jobs_of(proposal.config):
            try:
                jobs.append(ResolvedJob.of(job))
            except UserError as error:
                infeasible.append(_label(job) + str(error))
                break
    return jobs, infeasible


def _stages(jobs: list[ResolvedJob], cache: StageCache) -> list[StagePlan]:
    uses: Counter[str] = Counter()
    seen: dict[str, Any] = {}
    for job in jobs:
        for stage in job.stages():
            uses[stage.key] += 1
            seen[stage.key] = stage
    plans: dict[str, StagePlan] = {}
    for key, stage in seen.items():
        kind = kind_of(stage)
        plan = plans.setdefault(kind, StagePlan(kind))
        plan.count += 1
        plan.uses += uses[key]
        if cache.has(stage):
            plan.cached += 1
            plan.seconds.append(json.loads((cache.folder(stage) / "stage.json").read_text())["seconds"])
    return list(plans.values())


def _flops(rows: pa.Table) -> float | None:
    pairs = zip(rows["flops"].to_pylist(), rows["n_examples"].to_pylist(), strict=True)
    spent = [f * n for f, n in pairs if f and n]
    return sum(spent) if spent else None


def _label(job: Job) -> str:
    return f"{job.model} {job.method_label} {json.dumps(job.knobs())}: "
