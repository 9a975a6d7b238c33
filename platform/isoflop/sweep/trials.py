"""Trials in the making: which jobs of a trial have a row, and what to tell the search once all of them have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from isoflop.jobs import Job
from isoflop.search import Config, Proposer, Tell
from isoflop.sweep.resolve import Sweep
from isoflop.sweep.rows import FINAL_OK, objective_values

Row = Mapping[str, Any]
_COLUMNS = [
    "job_id", "trial_id", "trial_number", "spec", "task", "status", "error", "metrics", "footprint", "N", "V", "Q", "ratio",
    "bits", "flops", "flops_llm", "flops_vision", "flops_method", "seconds", "peak_bytes", "weight_bytes", "kv_bytes",
    "n_examples", "wall_seconds", "model", "method", "knobs",
]  # fmt: skip


@dataclass
class Trial:
    """One proposed point with its jobs."""

    number: int
    config: Config
    jobs: dict[str, Job]
    rows: dict[str, Row] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every job has a row."""
        return len(self.rows) == len(self.jobs)


class TrialBook:
    """All trials of a sweep: those of earlier sessions, rebuilt from the ledger, and those of this one."""

    def __init__(self, sweep: Sweep, proposer: Proposer) -> None:
        self._sweep = sweep
        self._proposer = proposer
        self._open: dict[int, Trial] = {}
        self._by_job: dict[str, Trial] = {}
        self.count = 0
        self.best: tuple[float, str] | None = None

    def restore(self, table: pa.Table, retry_failed: bool) -> list[tuple[Trial, list[Job]]]:
        """Rebuild from the ledger's rows: tell the proposer what is finished, return what is not.

        Args:
            table: the rows that belong to the sweep as it is now.
            retry_failed: take failed jobs as missing.

        Returns:
            Unfinished trials, each with the jobs that have no row.
        """
        by_trial: dict[str, list[Row]] = {}
        for row in table.select(_COLUMNS).to_pylist():
            by_trial.setdefault(row["trial_id"], []).append(row)
        unfinished = []
        for rows in sorted(by_trial.values(), key=lambda rs: rs[0]["trial_number"]):
            config = self._sweep.config_of(Job.from_dict(json.loads(rows[0]["spec"])))
            trial = self.open(rows[0]["trial_number"], config)
            for row in rows:
                if row["job_id"] in trial.jobs and not (retry_failed and row["status"] == "failed"):
                    trial.rows[row["job_id"]] = row
            if trial.complete:
                self._close(trial)
            else:
                self._proposer.reserve(trial.number, config)
                unfinished.append((trial, [j for i, j in trial.jobs.items() if i not in trial.rows]))
        return unfinished

    def open(self, number: int, config: Config) -> Trial:
        """A trial begins."""
        trial = Trial(number, config, {job.id: job for job in self._sweep.jobs_of(config)})
        self.count += 1
        self._open[number] = trial
        self._by_job.update(dict.fromkeys(trial.jobs, trial))
        return trial

    def of(self, job_id: str) -> Trial:
        """The trial that a job belongs to."""
        return self._by_job[job_id]

    @property
    def open_count(self) -> int:
        """Trials with jobs that have no row yet."""
        return len(self._open)

    def record(self, rows: Iterable[Row]) -> None:
        """Rows that are in the ledger now; tells the proposer of trials that are complete with them."""
        for row in rows:
            trial = self._by_job.get(row["job_id"])
            if trial is None:
                continue
            trial.rows[row["job_id"]] = row
            if trial.complete:
                self._close(trial)

    def report(self, job_id: str, shard: int, mean_error: float) -> bool:
        """An intermediate value of a running job; True when its trial should be pruned.

        The steps of a trial are the shards of its jobs one after the other, so that equal steps compare equal work.
        """
        trial = self._by_job[job_id]
        index = list(trial.jobs).index(job_id)
        step = index * 1_000_000 + shard
        trial.steps[step] = mean_error
        return self._proposer.should_prune(trial.number, step, mean_error)

    def _close(self, trial: Trial) -> None:
        self._open.pop(trial.number, None)
        for job_id in trial.jobs:
            self._by_job.pop(job_id, None)
        rows = list(trial.rows.values())
        values = objective_values(self._sweep.spec.objectives, rows) if all(r["status"] in FINAL_OK for r in rows) else None
        if values is None:
            outcome = Tell(trial.number, trial.config, "failed")
        elif any(r["status"] == "pruned" for r in rows):
            outcome = Tell(trial.number, trial.config, "pruned", steps=trial.steps)
        else:
            outcome = Tell(trial.number, trial.config, "complete", values, trial.steps)
            self._note_best(values[0], trial)
        self._proposer.tell(outcome)

    def _note_best(self, value: float, trial: Trial) -> None:
        objective = self._sweep.spec.objectives[0]
        better = self.best is None or (value < self.best[0] if objective.direction == "minimize" else value > self.best[0])
        if better:
            knobs = " ".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in trial.config.items() if k not in ("model", "method"))
            self.best = (value, f"{trial.config['model']} {trial.config['method']} {knobs}".strip())
