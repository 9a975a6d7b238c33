"""Trials in the making: which jobs of a trial have a row, and what to tell the search once all of them have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from isoflop.core.text import safe_line
from isoflop.jobs import Job
from isoflop.search import Config, Proposer, Tell, values_key
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.rows import FINAL_OK, objective_values, rows_of
from isoflop.sweep.titles import knob_text

Row = Mapping[str, Any]
_COLUMNS = [
    "job_id", "trial_id", "trial_number", "spec", "task", "status", "error", "metrics", "footprint", "N", "V", "Q", "ratio",
    "bits", "flops", "flops_llm", "flops_vision", "flops_method", "seconds", "peak_bytes", "weight_bytes", "kv_bytes",
    "n_examples", "wall_seconds", "model", "method", "knobs",
]  # fmt: skip


# Steps of a trial's jobs do not overlap, so that equal steps compare equal work.
_STEPS_PER_JOB = 1_000_000


@dataclass
class Trial:
    """One proposed point with its jobs."""

    number: int
    config: Config
    jobs: dict[str, Job]
    rows: dict[str, Row] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)
    seen: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the trial; its number does not when the YAML changed between sessions."""
        return values_key(self.config)

    @property
    def complete(self) -> bool:
        """Whether every job has a row."""
        return len(self.rows) == len(self.jobs)


def _step(trial: Trial, job_id: str, shard: int) -> int:
    return list(trial.jobs).index(job_id) * _STEPS_PER_JOB + shard


class TrialBook:
    """All trials of a sweep: those of earlier sessions, rebuilt from the ledger, and those of this one."""

    def __init__(self, sweep: Sweep, proposer: Proposer) -> None:
        self._sweep = sweep
        self._proposer = proposer
        self._open: dict[str, Trial] = {}
        self._by_job: dict[str, Trial] = {}
        self.count = 0
        self.best: tuple[float, str] | None = None

    def restore(self, table: pa.Table, again: Collection[str] = ()) -> list[tuple[Trial, list[Job]]]:
        """Rebuild from the ledger's rows: tell the proposer what is finished, return what is not.

        Args:
            table: the rows that belong to the sweep as it is now.
            again: rows of these statuses are taken as missing.

        Returns:
            Unfinished trials, each with the jobs that have no row.
        """
        by_trial: dict[str, list[tuple[Job, Row]]] = {}
        columns = _COLUMNS if self._sweep.spec.search.pruner == "none" else [*_COLUMNS, "scores", "shard_sizes"]
        for row in table.select(columns).to_pylist():
            job = self._sweep.job_of(row["spec"])
            by_trial.setdefault(job.trial_id, []).append((job, row))
        unfinished = []
        for found in sorted(by_trial.values(), key=lambda pairs: pairs[0][1]["trial_number"]):
            config = self._sweep.config_of(found[0][0])
            trial = self.open(found[0][1]["trial_number"], config)
            for job, row in found:
                if job.id in trial.jobs and row["status"] not in again:
                    trial.rows[job.id] = row
                    trial.steps.update(self._steps_of(trial, job.id, row))
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
        self._open[trial.key] = trial
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

    def report(self, job_id: str, shard: int, mean_error: float, examples: int) -> bool:
        """An intermediate value of a running job; True when its trial should be pruned.

        Args:
            shard: number of the shard that the job has just finished.
            mean_error: over the job's ``examples`` so far.
        """
        trial = self._by_job.get(job_id)
        if trial is None:  # a late report: the job has its row
            return False
        before = trial.seen.get(job_id, (0.0, 0)) if shard else (0.0, 0)
        trial.seen[job_id] = (mean_error, examples)
        step = _step(trial, job_id, shard)
        trial.steps[step] = self._intermediate(before, (mean_error, examples))
        return self._proposer.should_prune(trial.number, step, trial.steps[step])

    def _steps_of(self, trial: Trial, job_id: str, row: Row) -> dict[int, float]:
        """The intermediate values that a job of an earlier session reported, from its scores."""
        steps: dict[int, float] = {}
        scores, end, before = row.get("scores") or [], 0, (0.0, 0)
        for shard, size in enumerate(row.get("shard_sizes") or []):
            end += size
            now = (sum(scores[:end]) / max(1, end), end)
            steps[_step(trial, job_id, shard)] = self._intermediate(before, now)
            before = now
        return steps

    def _intermediate(self, before: tuple[float, int], now: tuple[float, int]) -> float:
        """What a pruner is told after a shard, from (mean error, examples) before and after it.

        Median and hyperband compare the running means of trials. Wilcoxon's test pairs independent values, so it gets
        the mean of the shard alone: the same examples in every trial.
        """
        if self._sweep.spec.search.pruner != "wilcoxon" or now[1] <= before[1]:
            return now[0]
        return (now[0] * now[1] - before[0] * before[1]) / (now[1] - before[1])

    def _close(self, trial: Trial) -> None:
        self._open.pop(trial.key, None)
        for job_id in trial.jobs:
            self._by_job.pop(job_id, None)
        rows = list(trial.rows.values())
        values = (
            objective_values(self._sweep.spec.objectives, rows) if all(r["status"] in FINAL_OK for r in rows) else None
        )
        if values is None:
            outcome = Tell(trial.number, trial.config, "failed")
        elif any(r["status"] == "pruned" for r in rows):
            outcome = Tell(trial.number, trial.config, "pruned", steps=trial.steps)
        else:
            outcome = Tell(trial.number, trial.config, "complete", values, trial.steps, self._attributes(rows))
            self._note_best(values[0], trial)
        self._proposer.tell(outcome)

    def _attributes(self, rows: list[Row]) -> dict[str, Any]:
        """What was measured beside the values, for a search that asks for it."""
        spec = self._sweep.spec
        if not self._sweep.strategy.measures:
            return {}
        spent = sum((r.get("flops") or 0.0) * (r.get("n_examples") or 0) for r in rows)
        examples = [sum(int(r.get("n_examples") or 0) for r in rows_of(o, rows)) for o in spec.objectives]
        return {"examples": examples, **({"flops": spent} if spent > 0 else {})}

    def _note_best(self, value: float, trial: Trial) -> None:
        objective = self._sweep.spec.objectives[0]
        better = self.best is None or (
            value < self.best[0] if objective.direction == "minimize" else value > self.best[0]
        )
        if better:
            knobs = knob_text({k: v for k, v in trial.config.items() if k not in ("model", "method")})
            what = f"{trial.config['model']} {trial.config['method']} {knobs}".strip()
            self.best = (value, safe_line(f"{what}{self._mean_of(trial)}"))

    def _mean_of(self, trial: Trial) -> str:
        """What the first objective is a mean over, where it is one."""
        rows = rows_of(self._sweep.spec.objectives[0], list(trial.rows.values()))
        counts = {"tasks": len({r["task"] for r in rows}), "repeats": self._sweep.spec.repeats}
        over = [f"{n} {what}" for what, n in counts.items() if n > 1]
        return f" (mean over {' and '.join(over)})" if over else ""
