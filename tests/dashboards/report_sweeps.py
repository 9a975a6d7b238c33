"""Sweeps with made-up outcomes: real specs, jobs, ledgers and stores, nothing trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import isoflop.sweep.api as api
from isoflop.jobs import Job, Outcome, ResolvedJob
from isoflop.ledger import Ledger, Store
from isoflop.sweep.resolve import resolve
from isoflop.sweep.rows import make_row
from isoflop.sweep.stored import save_spec

NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\""
EXAMPLES = 200


def store_of(folder: Path, spec: Mapping[str, Any], outcome: Callable[[Job], Outcome]) -> api.SweepResults:
    """A store in which the sweep has run with these outcomes."""
    sweep = resolve(spec)
    store = Store.open(str(folder))
    ledger = Ledger(store, sweep.spec.name).lock()
    rows = [
        make_row(sweep.spec.name, number, job, outcome(job), 1)
        for number, config in enumerate(sweep.space.grid())
        for job in sweep.jobs_of(config)
    ]
    ledger.append(rows)
    save_spec(store, sweep, ledger)
    ledger.unlock()
    return api.open_sweep(sweep.spec.name, str(folder))


def law_sweep(folder: Path) -> api.SweepResults:
    """Four sizes by four token counts whose errors follow a law but for noise."""
    rng = np.random.default_rng(0)

    def outcome(job: Job) -> Outcome:
        size, tokens = ResolvedJob.of(job).info.n_params, float(job.knobs()["tokens"])
        error = 0.6 * (size / 14_000) ** -0.25 * tokens**-0.15 * np.exp(rng.normal(0, 0.02))
        return _ok(
            error, rng, size, tokens, 36 / tokens, {"flops": 2.0 * size * (tokens + 2), "weight_bytes": 2.0 * size}
        )

    spec = {
        "name": "lawful",
        "description": NASTY,
        "models": ["tiny-llava/d24", "tiny-llava/d32", "tiny-llava/d48", "tiny-llava/d96"],
        "methods": [{"avgpool": {"tokens": [1, 4, 9, 36]}}],
        "tasks": ["reading"],
        "laws": [{"law": "product", "y": "error", "by": ["task"], "objective": "squared-log", "fixed": {"E": 0}, "bootstrap": 200}],
        "frontiers": [{"law": "product", "cost": "2*N*(Q+V)"}],
    }  # fmt: skip
    return store_of(folder, spec, outcome)


def methods_sweep(folder: Path) -> api.SweepResults:
    """Three methods at three ratios and none, on one model, three repeats; one job fails."""
    rng = np.random.default_rng(1)
    handicap = {"none": 0.0, "avgpool": 0.02, "uniform-grid": 0.02, "random": 0.15}

    def outcome(job: Job) -> Outcome:
        tokens = float(job.knobs().get("tokens", 36))
        if job.method_label == "random" and tokens == 9 and job.repeat == 2:
            return Outcome("failed", error_type="RuntimeError", error_text=NASTY, started=time.time())
        size = ResolvedJob.of(job).info.n_params
        error = 0.2 + handicap[job.method_label] + 0.02 * np.log2(36 / tokens)
        costs = {
            "flops": 1e5 * (2 + tokens),
            "kv_bytes": 64 * (2 + tokens),
            "weight_bytes": 2.0 * size,
            "seconds": 1e-3,
        }
        return _ok(error, rng, size, tokens, 36 / tokens, costs)

    knobs = {"tokens": [1, 4, 9]}
    spec = {
        "name": "methods",
        "models": ["tiny-llava/d24"],
        "methods": ["none", {"avgpool": knobs}, {"uniform-grid": knobs}, {"random": knobs}],
        "tasks": ["reading"],
        "repeats": 3,
    }
    return store_of(folder, spec, outcome)


def objectives_sweep(folder: Path) -> api.SweepResults:
    """A search for little error and little compute at once; one of its twelve trials fails."""
    rng = np.random.default_rng(2)

    def outcome(job: Job) -> Outcome:
        tokens = float(job.knobs()["tokens"])
        if job.method_label == "random" and tokens == 36:
            return Outcome("failed", error_type="RuntimeError", error_text="no", started=time.time())
        size = ResolvedJob.of(job).info.n_params
        error = 0.1 + 0.3 * rng.random()
        return _ok(error, rng, size, tokens, 36 / tokens, {"flops": 2.0 * size * (tokens + 2)})

    knobs = {"tokens": [1, 4, 36]}
    spec = {
        "name": "objectives",
        "models": ["tiny-llava/d24", "tiny-llava/d48"],
        "methods": [{"avgpool": knobs}, {"random": knobs}],
        "tasks": ["reading"],
        "objectives": [{"metric": "error"}, {"metric": "flops"}],
    }
    return store_of(folder, spec, outcome)


def failed_sweep(folder: Path) -> api.SweepResults:
    """Nothing but failures."""
    spec = {"name": "failed", "models": ["tiny-llava/d24"], "methods": ["none"], "tasks": ["reading"], "repeats": 2}
    return store_of(
        folder, spec, lambda job: Outcome("failed", error_type="OSError", error_text=NASTY, started=time.time())
    )


def _ok(
    error: float, rng: np.random.Generator, size: float, tokens: float, ratio: float, footprint: dict[str, float]
) -> Outcome:
    scores = (rng.permutation(EXAMPLES) < round(EXAMPLES * error)).astype(float).tolist()
    axes = {"N": size, "V": tokens, "Q": 2.0, "ratio": ratio}
    return Outcome(
        "ok", errors=scores, shard_sizes=[EXAMPLES], axes=axes, footprint=footprint, started=time.time(), seconds=1.5
    )
