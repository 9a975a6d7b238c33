"""Sweeps end to end in this process: resume, change, retry, budgets, misbehaviour, pruning, several objectives."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import Lines, run_local, scores, toy, within

import isoflop
from isoflop.core.errors import UserError
from isoflop.execute import LocalExecutor
from isoflop.jobs.runner import Runner, VersionMismatch
from isoflop.sweep.api import RunOptions
from isoflop.sweep.driver import Driver
from isoflop.sweep.outbox import Outbox
from isoflop.sweep.progress import Quiet
from isoflop.sweep.resolve import resolve

pytestmark = pytest.mark.usefixtures("toy_parts")


def _column(table: Any, name: str) -> list[Any]:
    return table[name].to_pylist()


def test_a_grid_runs_every_job_once_and_each_stage_once(tmp_path: Path, toy_parts: ModuleType) -> None:
    opened = run_local(toy(), tmp_path)
    table = opened.results()
    assert opened.summary.ok == 12 == table.num_rows == len(set(_column(table, "job_id")))
    assert set(_column(table, "status")) == {"ok"}
    assert sorted(set(_column(table, "trial_number"))) == list(range(6))
    stages = toy_parts.log_lines(tmp_path / "cache", "stage")
    assert len(stages) == len(set(stages)) == 3  # the base and the weights of two models
    assert len(toy_parts.log_lines(tmp_path / "cache", "load")) == 2  # models stay warm


def test_this_process_is_handed_one_thing_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was handed besides would begin after Ctrl-C."""
    waiting, submit = [], LocalExecutor.submit

    def noted(self: LocalExecutor, worker: str, item: Any) -> None:
        waiting.append(len(self._queue))
        submit(self, worker, item)

    monkeypatch.setattr(LocalExecutor, "submit", noted)
    run_local(toy(), tmp_path)
    assert set(waiting) == {0}


def test_the_second_run_finds_everything_done(tmp_path: Path, toy_parts: ModuleType) -> None:
    first = scores(run_local(toy(), tmp_path).results())
    before = toy_parts.log_lines(tmp_path / "cache")
    second = run_local(toy(), tmp_path)
    assert (second.summary.ran, second.summary.cached) == (0, 12)
    assert toy_parts.log_lines(tmp_path / "cache") == before
    assert scores(second.results()) == first


def test_rows_hold_identity_axes_scores_and_provenance(tmp_path: Path) -> None:
    row = run_local(toy(), tmp_path).results().to_pylist()[0]
    assert (row["sweep"], row["method"], row["family"]) == ("toy", "toy-tokens", "toy-family")
    assert row["N"] in (1000, 4000)
    assert row["V"] == json.loads(row["knobs"])["tokens"]
    assert row["ratio"] == pytest.approx(64 / row["V"])
    assert row["Q"] == 2
    assert row["flops"] == 2 * row["N"] * (row["V"] + 2)
    assert row["n_examples"] == 8 == len(row["scores"])
    assert row["shard_sizes"] == [4, 4]
    assert row["error"] == pytest.approx(np.mean(row["scores"]), abs=1e-6)
    assert row["error_se"] == pytest.approx(np.std(row["scores"], ddof=1) / np.sqrt(8), rel=1e-4)
    assert dict(row["metrics"])["loss"] == pytest.approx(2 * row["error"])
    assert row["started"] <= row["finished"]
    assert row["attempt"] == 1
    assert dict(row["versions"])["isoflop"] == isoflop.__version__


def test_a_changed_yaml_keeps_unchanged_rows_and_hides_the_others(tmp_path: Path) -> None:
    old = scores(run_local(toy(), tmp_path).results())
    changed = toy(models=["toy/s", "toy/l"], methods=[{"toy-tokens": {"tokens": [4, 16, 32]}}])
    second = run_local(changed, tmp_path)
    assert (second.summary.cached, second.summary.ran) == (4, 8)  # toy/s at 4 and 16 tokens, two tasks
    new = scores(second.results())
    assert {k: v for k, v in new.items() if k in old} == {k: v for k, v in old.items() if k in new}
    assert second.results().num_rows == 12
    assert second.results(everything=True).num_rows == 20
    third = run_local(toy(), tmp_path)
    assert (third.summary.cached, third.summary.ran) == (12, 0)
    assert scores(third.results()) == old


def test_more_repeats_and_tasks_run_only_what_is_missing(tmp_path: Path) -> None:
    run_local(toy(tasks=["toy-task"]), tmp_path)
    more = run_local(toy(repeats=2), tmp_path)
    assert (more.summary.cached, more.summary.ran) == (6, 18)
    table = more.results()
    seeds = {(r["repeat"], r["seed"]) for r in table.to_pylist()}
    assert seeds == {(0, 0), (1, 1)}


def test_another_seed_is_another_sweep_of_jobs(tmp_path: Path) -> None:
    run_local(toy(), tmp_path)
    assert run_local(toy(seed=5), tmp_path).summary.ran == 12


def test_one_task_whose_option_changes_runs_again(tmp_path: Path) -> None:
    run_local(toy(), tmp_path)
    assert run_local(toy(tasks=["toy-task", {"toy-other": {"examples": 5}}]), tmp_path).summary.ran == 6


def test_ranges_with_steps_keep_rows_only_on_the_grid(tmp_path: Path) -> None:
    def spec(step: int) -> dict[str, Any]:
        return toy(
            models=["toy/m"],
            tasks=["toy-task"],
            methods=[{"toy-tokens": {"tokens": {"low": 1, "high": 9, "step": step}}}],
        )

    assert run_local(spec(2), tmp_path).summary.ran == 5  # 1 3 5 7 9
    other = run_local(spec(4), tmp_path)  # 1 5 9
    assert (other.summary.cached, other.summary.ran, other.results().num_rows) == (3, 0, 3)


def test_a_damaged_stage_is_computed_again(tmp_path: Path, toy_parts: ModuleType) -> None:
    run_local(toy(models=["toy/s"]), tmp_path)
    for weights in (tmp_path / "cache" / "stages").glob("toy-weights-*/weights.npy"):
        weights.write_bytes(b"torn")
    opened = run_local(
        toy(models=["toy/s"], seed=0, repeats=1, tasks=["toy-task", {"toy-other": {"examples": 3}}]), tmp_path
    )
    assert opened.summary.ok == 3
    assert len(toy_parts.log_lines(tmp_path / "cache", "stage toy-weights")) == 2


def test_budget_of_trials_counts_earlier_sessions(tmp_path: Path) -> None:
    assert run_local(toy(budget={"trials": 2}), tmp_path).summary.ok == 4
    again = run_local(toy(budget={"trials": 2}), tmp_path)
    assert (again.summary.ran, again.summary.cached) == (0, 4)
    assert run_local(toy(budget={"trials": 5}), tmp_path).summary.ran == 6


def test_budget_of_jobs(tmp_path: Path) -> None:
    assert run_local(toy(budget={"jobs": 5}), tmp_path).summary.ok == 5
    assert run_local(toy(budget={"jobs": 5}), tmp_path).summary.ran == 0
    assert run_local(toy(budget={"jobs": 7}), tmp_path).summary.ran == 2
    assert run_local(toy(), tmp_path).summary.ran == 5


def test_budget_of_jobs_holds_when_points_are_infeasible(tmp_path: Path) -> None:
    spec = toy(
        models=["toy/s"],
        tasks=["toy-task"],
        methods=[{"toy-tokens": {"tokens": [13], "scale": {"low": 0.5, "high": 2.0}}}],
        search={"sampler": "random"},
        budget={"jobs": 3},
    )
    spec["exclude"] = []
    opened = run_local(spec, tmp_path)
    assert (opened.summary.ran, opened.summary.infeasible) == (3, 3)


def test_budget_of_flops(tmp_path: Path) -> None:
    opened = run_local(toy(budget={"flops": 1}), tmp_path)
    assert 1 <= opened.summary.ok < 12


def test_infeasible_points_of_a_random_search_become_rows(tmp_path: Path) -> None:
    spec = toy(
        models=["toy/s"],
        tasks=["toy-task"],
        methods=[{"toy-tokens": {"tokens": {"low": 12, "high": 14}}}],
        search={"sampler": "random"},
        budget={"trials": 9},
    )
    opened = run_local(spec, tmp_path)
    assert (opened.summary.ok, opened.summary.infeasible) == (2, 1)
    again = run_local(spec, tmp_path)
    assert (again.summary.ran, again.summary.cached) == (0, 3)


def test_an_infeasible_point_of_a_grid_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens = 13 is unlucky.*exclude: \{model: toy/s, toy-tokens.tokens: 13\}"):
        run_local(toy(methods=[{"toy-tokens": {"tokens": [13]}}]), tmp_path)
    assert not (tmp_path / "store").exists()
    ok = toy(methods=[{"toy-tokens": {"tokens": [13, 4]}}], exclude=[{"model": "toy/s", "toy-tokens.tokens": 13}])
    assert run_local(ok, tmp_path).summary.ok == 6


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp", "cmaes", "nsga2"])
def test_every_sampler_runs_its_trials_without_doubles(tmp_path: Path, sampler: str) -> None:
    methods = [
        {
            "toy-tokens": {
                "tokens": {"low": 1, "high": 64},
                "mode": ["plain", "scaled"],
                "scale": {"low": 0.5, "high": 2.0, "when": {"mode": "scaled"}},
            }
        },
        "toy-full",
    ]
    spec = toy(tasks=["toy-task"], methods=methods, search={"sampler": sampler}, budget={"trials": 14})
    half = run_local({**spec, "budget": {"trials": 6}}, tmp_path)
    assert half.summary.ran == 6
    opened = run_local(spec, tmp_path)
    table = opened.results()
    assert opened.summary.cached == 6
    assert table.num_rows == 14 == len(set(_column(table, "job_id")))
    assert sorted(_column(table, "trial_number")) == list(range(14))


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "nsga2"])
def test_a_small_space_is_used_up_by_any_sampler(tmp_path: Path, sampler: str) -> None:
    opened = within(60, lambda: run_local(toy(search={"sampler": sampler}), tmp_path))
    assert opened.summary.ok == 12
    assert run_local(toy(), tmp_path).summary.ran == 0  # the grid of the same space finds every job


def test_random_search_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    methods = [{"toy-tokens": {"scale": {"low": 0.5, "high": 2.0}}}]
    spec = toy(tasks=["toy-task"], methods=methods, search={"sampler": "random"}, budget={"trials": 12})
    whole = run_local(spec, tmp_path / "a")
    for trials in (1, 4, 5, 12):
        parts = run_local({**spec, "budget": {"trials": trials}}, tmp_path / "b")
    assert scores(parts.results()) == scores(whole.results())


def test_two_objectives(tmp_path: Path) -> None:
    spec = toy(objectives=[{"metric": "error"}, {"metric": "flops"}], search={"sampler": "nsga2"}, budget={"trials": 6})
    assert run_local(spec, tmp_path).summary.ok == 12


def test_an_objective_of_a_metric_that_no_row_has_fails_no_job(tmp_path: Path) -> None:
    """It ends the session, whose rows are kept."""
    given = toy(objectives=[{"metric": "nonsense"}], search={"sampler": "tpe"}, budget={"trials": 4})
    with pytest.raises(UserError, match="'nonsense'"):
        run_local(given, tmp_path)
    right = run_local({**given, "objectives": [{"metric": "error"}]}, tmp_path).summary
    assert right.failed == 0
    assert right.cached + right.ok >= 8


# pruning


@pytest.fixture
def told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is written, and the pruner told of it, before the next job: else that depends on how long jobs take."""
    monkeypatch.setattr(Outbox, "due", property(lambda self: True))


def _pruned_sweep(pruner: str, sampler: str = "grid", **options: Any) -> dict[str, Any]:
    # tokens fall from trial to trial, so each is worse than the one before
    methods = [{"toy-tokens": {"tokens": [64, 32, 16, 8, 4, 2, 1]}}]
    return toy(
        models=["toy/m"],
        tasks=[{"toy-other": {"shards": 9, "examples": 5, "noise": 0.001}}],
        methods=methods,
        search={"sampler": sampler, "pruner": pruner, "pruner_options": options},
    )


@pytest.mark.parametrize(
    "pruner, options",
    [
        ("median", {"n_startup_trials": 2}),
        ("wilcoxon", {"p_threshold": 0.1}),
        ("hyperband", {"min_resource": 1, "max_resource": 9, "reduction_factor": 3}),
    ],
)
def test_pruners_stop_hopeless_jobs_early(
    told_at_once: None, tmp_path: Path, pruner: str, options: dict[str, Any]
) -> None:
    opened = run_local(_pruned_sweep(pruner, **options), tmp_path)
    table = opened.results()
    assert opened.summary.ok + opened.summary.pruned == 7
    assert opened.summary.pruned >= 1
    for row in table.to_pylist():
        assert (len(row["shard_sizes"]) < 9) == (row["status"] == "pruned")
        assert row["error"] is not None
    best = min(table.to_pylist(), key=lambda r: r["error"])
    assert (best["status"], best["V"]) == ("ok", 64)
    assert run_local(_pruned_sweep(pruner, **options), tmp_path).summary.ran == 0


def test_a_pruner_knows_the_trials_of_earlier_sessions(told_at_once: None, tmp_path: Path) -> None:
    spec = _pruned_sweep("median", n_startup_trials=2)
    run_local({**spec, "budget": {"trials": 3}}, tmp_path)
    later = run_local(spec, tmp_path)
    assert later.summary.ran == 4
    assert later.summary.pruned == 4  # all worse than the median of the first three


def test_a_random_search_can_be_pruned(told_at_once: None, tmp_path: Path) -> None:
    opened = run_local(_pruned_sweep("median", "random", n_startup_trials=1), tmp_path)
    assert opened.summary.ran == 7


# what a worker runs is what the job's id says


@pytest.mark.parametrize("part", ["model", "task", "method"])
def test_a_worker_with_another_version_fails_the_job_and_says_so(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    sweep = resolve(toy(models=["toy/s"], tasks=["toy-task"]))
    job = sweep.jobs_of(next(iter(sweep.space.grid())))[0]
    runner = Runner(tmp_path)
    assert runner.run_job(job).status == "ok"
    if part == "model":
        info = toy_parts.ToyFamily.info
        monkeypatch.setattr(
            toy_parts.ToyFamily, "info", lambda *given: dataclasses.replace(info(*given), version="other")
        )
    else:
        monkeypatch.setattr({"task": toy_parts.ToyTask, "method": toy_parts.ToyTokens}[part], "version", "other")
    outcome = runner.run_job(job)
    assert (outcome.status, outcome.error_type) == ("failed", "VersionMismatch")
    name = {"model": "model toy/s", "task": "task toy-task", "method": "method toy-tokens"}[part]
    assert f"{name} has version other" in outcome.error_text
    assert "started with version 1" in outcome.error_text


def test_a_stage_that_a_worker_does_not_know_is_named(tmp_path: Path) -> None:
    sweep = resolve(toy())
    job = sweep.jobs_of(next(iter(sweep.space.grid())))[0]
    runner = Runner(tmp_path)
    told = runner.run_stage(job, "toy-weights-0")
    assert told["error_type"] == "VersionMismatch"
    assert "no stage toy-weights-0" in told["error_text"]
    for call in (lambda: runner.stage_files(job, "other"), lambda: runner.install_stage(job, "other", {})):
        with pytest.raises(VersionMismatch, match="no stage other"):
            call()


def test_the_peak_of_the_process_is_called_the_workers(tmp_path: Path) -> None:
    """The system gives the maximum since the process began, not that of a job."""
    for row in run_local(toy(tasks=["toy-task"]), tmp_path).results().to_pylist():
        footprint = dict(row["footprint"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # by now, of the same process
        assert 0.5 * peak < footprint["worker_peak_bytes"] <= peak
        assert footprint["worker_peak_bytes"] % 1024 == 0
        assert "process_peak_bytes" not in footprint


# costs of a composition


def _report(
    monkeypatch: pytest.MonkeyPatch, parts: ModuleType, tokens: dict[str, float], kept: dict[str, float]
) -> None:
    monkeypatch.setattr(parts.ToyTokens, "footprint", lambda *_: tokens)
    monkeypatch.setattr(parts.ToyPrepared, "footprint", lambda *_: kept)


_COMPOSED = toy(
    models=["toy/s"], tasks=["toy-task"], methods=[[{"toy-tokens": {"tokens": [16]}}, {"toy-prepared": {"k": [8]}}]]
)


def test_costs_of_composed_methods_add_up_and_the_ratio_is_measured(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"method_params": 5.0, "method_bytes": 20.0}
    more = {"method_params": 10.0, "method_bytes": 40.0, "index_bytes": 3.0}
    _report(monkeypatch, toy_parts, {"ratio": 4.0, **costs}, more)
    (row,) = run_local(_COMPOSED, tmp_path).results().to_pylist()
    assert (row["status"], row["V"], row["ratio"]) == ("ok", 8, 8)
    footprint = dict(row["footprint"])
    assert (footprint["method_params"], footprint["method_bytes"], footprint["index_bytes"]) == (15, 60, 3)


@pytest.mark.parametrize(
    ("tokens", "kept", "told"),
    [
        ({"flops": 1.0}, {}, "method toy-tokens: its footprint gives flops = 1.0, which the task gave already"),
        (
            {"bits": 4.0},
            {"bits": 8.0},
            "method toy-prepared: .* bits_toy_family = 8.0, which method toy-tokens gave already",
        ),
    ],
)
def test_no_cost_replaces_another(
    tmp_path: Path,
    toy_parts: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tokens: dict[str, float],
    kept: dict[str, float],
    told: str,
) -> None:
    _report(monkeypatch, toy_parts, tokens, kept)
    (row,) = run_local(_COMPOSED, tmp_path).results().to_pylist()
    assert row["status"] == "failed"
    assert re.search(told, row["error_text"])


def test_the_ratio_is_the_methods_where_no_tokens_are_measured(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _report(monkeypatch, toy_parts, {"ratio": 4.0}, {})
    monkeypatch.setattr(toy_parts.ToyTask, "measure", lambda *_: {"flops": 1.0})
    (row,) = run_local(_COMPOSED, tmp_path).results().to_pylist()
    assert (row["V"], row["ratio"]) == (None, 4)


# the clock and the queue


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_budget_of_hours_on_a_clock_of_our_own(tmp_path: Path) -> None:
    from isoflop.ledger import Ledger, Store
    from isoflop.search import make_proposer
    from isoflop.track import NullTracker

    sweep = resolve(toy(budget={"hours": 0.3 / 3600}))
    ledger = Ledger(Store.open(str(tmp_path / "store")), "toy").lock()
    executor = LocalExecutor(tmp_path / "cache")
    executor.start()
    summary = Driver(
        sweep, ledger, executor, make_proposer(sweep.space, "grid"), NullTracker(), Quiet(), clock=_Clock()
    ).run()
    executor.close()
    ledger.unlock()
    assert 0 < summary.ran < 12
    assert summary.left > 0
    assert "hours" in summary.reason


def test_progress_is_told_of_everything(tmp_path: Path) -> None:
    lines = Lines()
    run_local(toy(), tmp_path, progress=lines)
    last = lines.snapshots[-1]
    assert (last["done"], last["ok"], last["total"], last["running"], last["waiting"]) == (12, 12, 12, 0, 0)
    assert last["best"][0] == pytest.approx(min(s["best"][0] for s in lines.snapshots if s["best"]))
    assert sum(" ok on local" in line for line in lines.lines) == 12
    log = (tmp_path / "store" / "sweeps" / "toy" / "log.txt").read_text()
    assert log.count(" ok on local") == 12


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"unknown executor 'lokal'.*did you mean 'local'"):
        isoflop.run(toy(), executor="lokal")
    assert RunOptions().executor == "ray"


def test_lines_name_stages_by_what_they_belong_to(tmp_path: Path) -> None:
    progress = Lines()
    run_local(toy(), tmp_path, progress)
    stages = [line for line in progress.lines if line.startswith("stage ")]
    assert stages
    assert all(" of toy" in line and " computed by local in " in line for line in stages), stages


def test_unreadable_files_of_the_ledger_are_told_and_their_jobs_run_again(tmp_path: Path) -> None:
    run_local(toy(), tmp_path)
    (first, *_) = sorted((tmp_path / "store" / "sweeps" / "toy" / "ledger").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-9])
    lines = Lines()
    again = run_local(toy(), tmp_path, lines)
    assert "1 unreadable ledger files were set aside; their jobs run again" in lines.lines
    assert again.summary.ran > 0
    assert again.results().num_rows == 12
