"""Jobs and stages that fail, budgets that end meanwhile, executors that give way: what becomes a row, and what is tried again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.compute as pc
import pytest
from helpers import one_bad, run_local, toy, within

import isoflop
from isoflop.core.errors import Unavailable
from isoflop.execute import LocalExecutor
from isoflop.jobs.runner import Runner
from isoflop.sweep.driver import Driver
from isoflop.sweep.resolve import resolve

pytestmark = pytest.mark.usefixtures("toy_parts")


def _column(table: Any, name: str) -> list[Any]:
    return table[name].to_pylist()


@pytest.mark.parametrize(
    "how",
    ["raise", "runtime", "file", "connection", "panic", "generator-exit", "keyboard", "unpicklable", "unprintable", "nan",
     "sysexit", "footprint"],
)  # fmt: skip
def test_a_failing_job_is_retried_recorded_and_does_not_end_the_sweep(
    tmp_path: Path, toy_parts: ModuleType, how: str
) -> None:
    opened = run_local(one_bad(how), tmp_path)
    table = opened.results()
    assert (opened.summary.ok, opened.summary.failed) == (2, 2)
    failed = table.filter(pc.equal(table["status"], "failed")).to_pylist()
    assert {r["attempt"] for r in failed} == {2}
    assert all(r["error"] is None and r["error_type"] and r["error_text"] for r in failed)
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) == 2 + 2 * 2


@pytest.mark.parametrize("how", ["type", "attribute", "name", "key", "assertion", "unwritten", "division"])
def test_a_mistake_in_the_code_of_a_job_or_a_stage_is_not_tried_again(
    tmp_path: Path, toy_parts: ModuleType, how: str
) -> None:
    opened = run_local(one_bad(how), tmp_path)
    assert (opened.summary.ok, opened.summary.failed) == (2, 2)
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) == 2 + 2
    failed = [row for row in opened.results().to_pylist() if row["status"] == "failed"]
    assert [(row["error_type"], row["attempt"]) for row in failed] == 2 * [(toy_parts.MISTAKES[how].__name__, 1)]
    staged = run_local(toy(models=[{"toy/m": {"fail": how}}]), tmp_path / "stage")
    assert staged.summary.failed == 6
    assert len(toy_parts.log_lines(tmp_path / "stage" / "cache", "stage toy-weights")) == 1


@pytest.mark.parametrize("how", ["panic", "generator-exit", "keyboard", "sysexit"])
def test_a_stage_may_raise_anything(tmp_path: Path, toy_parts: ModuleType, how: str) -> None:
    opened = run_local(toy(models=["toy/s", {"toy/m": {"fail": how}}]), tmp_path)
    assert (opened.summary.ok, opened.summary.failed) == (6, 6)
    assert len(toy_parts.log_lines(tmp_path / "cache", "stage toy-weights")) == 1 + 2


def test_errors_that_libraries_derive_from_pythons_own_are_tried_again() -> None:
    from isoflop.jobs.faults import is_transient

    class Missing(KeyError):
        """As a library names a key that its server does not have yet."""

    assert is_transient(Missing())
    assert not is_transient(KeyError())


@pytest.mark.parametrize("how", ["oom", "infeasible"])
def test_what_cannot_run_is_infeasible_and_not_tried_again(tmp_path: Path, toy_parts: ModuleType, how: str) -> None:
    opened = run_local(one_bad(how), tmp_path)
    assert (opened.summary.ok, opened.summary.infeasible, opened.summary.failed) == (2, 2, 0)
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) == 4
    assert run_local(one_bad(how), tmp_path, retry_failed=True).summary.ran == 0


def test_a_job_that_fails_once_ends_well(tmp_path: Path) -> None:
    opened = run_local(one_bad("once-raise"), tmp_path)
    assert (opened.summary.ok, opened.summary.failed) == (4, 0)
    assert sorted(_column(opened.results(), "attempt")) == [1, 1, 2, 2]


def test_without_retries_a_job_is_tried_once(tmp_path: Path) -> None:
    opened = run_local(one_bad("once-raise", limits={"retries": 0}), tmp_path)
    assert (opened.summary.ok, opened.summary.failed) == (2, 2)


def test_retry_failed_runs_exactly_the_failed_jobs(tmp_path: Path, toy_parts: ModuleType) -> None:
    spec = one_bad("once-raise", limits={"retries": 0})
    rows = run_local(spec, tmp_path).results().num_rows
    assert run_local(spec, tmp_path).summary.ran == 0
    before = len(toy_parts.log_lines(tmp_path / "cache", "eval"))
    second = run_local(spec, tmp_path, retry_failed=True)
    assert (second.summary.ran, second.summary.ok, second.summary.cached) == (2, 2, 2)
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) == before + 2
    assert second.results().num_rows == rows == 4
    assert set(_column(second.results(), "status")) == {"ok"}


def test_a_stage_that_fails_fails_its_jobs_and_no_others(tmp_path: Path) -> None:
    models = ["toy/s", {"toy/m": {"fail": "raise"}}]
    opened = run_local(toy(models=models), tmp_path)
    table = opened.results()
    assert (opened.summary.ok, opened.summary.failed) == (6, 6)
    for row in table.to_pylist():
        assert row["status"] == ("ok" if row["model"] == "toy/s" else "failed")
        if row["status"] == "failed":
            assert "toy-weights" in row["error_text"]
            assert row["attempt"] == 0  # the job itself never ran


def test_a_stage_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    assert run_local(toy(models=[{"toy/m": {"fail": "once-raise"}}]), tmp_path).summary.ok == 6


def test_hours_that_end_while_a_job_fails_end_the_sweep(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed job is put back into the queue; with the budget gone nobody may wait for it. An hour passes with the first job."""

    def clock() -> float:
        return 3600.0 if toy_parts.log_lines(tmp_path / "cache", "eval") else 0.0

    monkeypatch.setattr("isoflop.sweep.api.Driver", partial(Driver, clock=clock))
    spec = toy(methods=[{"toy-bad": {"how": "raise", "n": [0, 1, 2, 3]}}], budget={"hours": 0.5}, limits={"retries": 5})
    opened = within(30, lambda: run_local(spec, tmp_path))
    assert opened.summary.reason == "0.5 hours"
    assert opened.summary.ran == 0  # no row says failed: attempts were left
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) <= 2  # one that ran, one that was handed out behind it
    assert opened.summary.left > 0


def test_flops_that_end_while_a_job_fails_end_the_sweep(tmp_path: Path, toy_parts: ModuleType) -> None:
    methods = [{"toy-tokens": {"tokens": [4]}}, {"toy-bad": {"how": "raise", "n": [0, 1, 2, 3]}}]
    spec = toy(models=["toy/s"], tasks=["toy-task"], methods=methods, budget={"flops": 1}, limits={"retries": 5})
    opened = within(30, lambda: run_local(spec, tmp_path))
    assert (opened.summary.ok, opened.summary.failed, opened.summary.reason) == (1, 0, "1 FLOPs")
    assert len(toy_parts.log_lines(tmp_path / "cache", "eval")) <= 3


def test_rows_are_kept_when_what_runs_the_jobs_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = iter(range(99))

    def dying(self: LocalExecutor, timeout: float, poll: Any = LocalExecutor.poll) -> Any:
        if next(polls) > 8:
            raise Unavailable("it has died")
        return poll(self, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(LocalExecutor, "poll", dying)
        with pytest.raises(Unavailable, match="it has died"):
            run_local(toy(), tmp_path)
    kept = isoflop.open("toy", str(tmp_path / "store")).results().num_rows
    assert 0 < kept < 12
    again = run_local(toy(), tmp_path)
    assert (again.summary.cached, again.summary.ok) == (kept, 12 - kept)


@pytest.mark.parametrize(
    ("how", "kept"), [("fine", True), ("infeasible", True), ("raise", False), ("panic", False), ("nan", False)]
)
def test_after_a_failure_models_are_loaded_afresh(tmp_path: Path, toy_parts: ModuleType, how: str, kept: bool) -> None:
    """Nobody knows in what state a failed job leaves them."""
    (tmp_path / "cache").mkdir()
    sweep = resolve(toy(models=["toy/s"], tasks=["toy-task"], methods=["toy-full", {"toy-bad": {"how": how}}]))
    good, bad = (sweep.jobs_of(config)[0] for config in sweep.space.grid())
    runner = Runner(tmp_path / "cache")
    assert [runner.run_job(good).model_was_warm for _ in range(2)] == [False, True]
    assert runner.run_job(bad).model_was_warm
    assert runner.run_job(good).model_was_warm == kept
    assert len(toy_parts.log_lines(tmp_path / "cache", "load")) == (1 if kept else 2)


def test_a_worker_keeps_the_models_that_it_used_last(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isoflop.jobs.warm.MOST_WARM", 2)
    (tmp_path / "cache").mkdir()
    sweep = resolve(toy(models=["toy/s", "toy/m", "toy/l"], tasks=["toy-task"], methods=["toy-full"]))
    jobs = {job.model: job for config in sweep.space.grid() for job in sweep.jobs_of(config)}
    runner = Runner(tmp_path / "cache")
    asked = [
        "toy/s",
        "toy/m",
        "toy/s",
        "toy/l",
        "toy/s",
        "toy/m",
        "toy/l",
    ]  # toy/m is the one that has to go, not toy/s
    warm = [runner.run_job(jobs[model]).model_was_warm for model in asked]
    assert warm == [False, False, True, False, True, False, False]
    assert len(toy_parts.log_lines(tmp_path / "cache", "load")) == 5


def test_a_task_without_examples_is_named(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_parts.ToyTask, "evaluate", lambda *given: iter(()))
    sweep = resolve(toy(models=["toy/s"], tasks=["toy-task"], methods=["toy-full"]))
    job = sweep.jobs_of(next(iter(sweep.space.grid())))[0]
    outcome = Runner(tmp_path).run_job(job)
    assert outcome.status == "failed"
    assert outcome.error_text.startswith("task toy-task yielded no examples")
