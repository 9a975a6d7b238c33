"""The driver's rounds on scripted workers and a clock of our own: deadlines, losses, what is durable, told and shown when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import Scripted, jobs_with_one_stage, jobs_without_stages, nothing, play, rows_of

from isoflop.execute.base import Event
from isoflop.sweep.outbox import Outbox

Events = Iterator[list[Event]]


# deadlines


def test_a_job_and_a_stage_may_take_their_limit_and_no_longer(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        on.now = 1000.0  # of the stage: all that it may take
        yield []
        assert on.kills == []
        on.now = 1000.5
        yield []
        assert on.kills.pop() == ("a", "passed the deadline of 1000 s", True)
        yield []
        yield [on.done("a'")]  # the second attempt
        began = on.now
        yield []
        on.now = began + 100.0
        yield []
        assert on.kills == []
        on.now = began + 100.5
        yield []
        assert on.kills == [("a'", "passed the deadline of 100 s", True)]

    found = play(jobs_with_one_stage(1), tmp_path, script)
    assert [(row["status"], row["attempt"]) for row in found.rows] == [("ok", 2)]
    assert "worker a lost: passed the deadline of 1000 s" in found.lines


def test_a_deadline_counts_from_when_a_job_began_on_a_worker_that_was_idle(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        on.now = 300.0  # b has been idle meanwhile
        yield [on.done("a", seconds=300.0)]
        assert [item.kind for item in on.held["b"]] == ["job"]
        on.now = 390.0
        yield []

    found = play(jobs_with_one_stage(2), tmp_path, script, "ab")
    assert found.executor.kills == []
    assert found.summary.ok == 2


def test_a_deadline_counts_from_when_the_job_before_ended(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        assert len(on.held["a"]) == 2
        on.now = 90.0
        yield [on.done("a", seconds=0.1)]
        on.now = 180.0
        yield []

    found = play(jobs_without_stages(2), tmp_path, script)
    assert found.executor.kills == []
    assert found.summary.ok == 2


def test_what_is_queued_behind_a_job_does_not_put_its_deadline_off(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        on.now = 50.0
        yield [on.done("b", "failed", seconds=0.1, error_type="E", error_text="no")]
        assert len(on.held["a"]) == 2  # the failed one, which is better tried on another worker
        on.now = 101.0
        yield []
        assert on.kills == [("a", "passed the deadline of 100 s", True)]

    assert play(jobs_without_stages(2), tmp_path, script, "ab").summary.ok == 2


# losses


def test_what_a_lost_worker_had_runs_elsewhere_until_it_is_to_blame_too_often(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        yield [on.lose("a", "first")]
        yield [on.lose("a'", "second")]

    before = time.time()
    found = play(jobs_without_stages(2), tmp_path, script)
    assert [line for line in found.lines if "lost" in line][:2] == ["worker a lost: first", "worker a' lost: second"]
    by_status = {row["status"]: row for row in found.rows}
    failed = by_status["failed"]
    assert (failed["error_type"], failed["error_text"], failed["attempt"]) == ("WorkerLost", "second", 2)
    assert failed["worker"] == "a'"
    assert before - 1 <= failed["started"].timestamp() <= time.time() + 1
    assert by_status["ok"]["attempt"] == 1  # it only waited behind the other


def test_a_worker_lost_without_blame_costs_no_attempt(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        for number in range(4):
            yield [on.lose("a" + number * "'", blame=False)]

    (row,) = play(jobs_without_stages(1), tmp_path, script).rows
    assert (row["status"], row["attempt"]) == ("ok", 1)


def test_a_stage_that_kills_its_workers_fails_its_jobs(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        yield [on.lose("a", "first")]
        yield [on.lose("a'", "second")]

    found = play(jobs_with_one_stage(3), tmp_path, script)
    assert [(r["status"], r["error_type"], r["error_text"], r["attempt"]) for r in found.rows] == 3 * [
        ("failed", "WorkerLost", "second", 0)
    ]


def test_a_stage_that_went_with_its_worker_is_computed_again(tmp_path: Path) -> None:
    stages: list[str] = []

    def script(on: Scripted) -> Events:
        yield []
        stages.append(on.held["a"][0].stage)
        yield [on.done("a")]
        yield [on.lose("a", gone=frozenset(stages))]

    found = play(jobs_with_one_stage(2), tmp_path, script)
    kinds = [item.kind for _, _, item in found.executor.given]
    assert kinds.count("stage") == 2 == found.summary.stages
    assert found.summary.ok == 2


def test_a_worker_whose_memory_ran_out_is_replaced_and_nobody_is_blamed(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a", "failed", error_type="MemoryError", error_text="no room")]
        assert on.kills == [("a", "ran out of memory; another takes its place", False)]

    found = play(jobs_without_stages(3), tmp_path, script)
    assert found.summary.ok == 3
    assert len(found.executor.kills) == 1
    assert sorted(row["attempt"] for row in found.rows) == [1, 1, 2]


def test_other_failures_leave_the_worker_where_it_is(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a", "failed", error_type="OSError", error_text="no file")]

    found = play(jobs_without_stages(2), tmp_path, script)
    assert found.executor.kills == []
    assert any("failed, will be tried again: OSError: no file" in line for line in found.lines)


def test_a_stage_that_fails_says_whether_it_will_be_tried_again(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        for _ in range(2):
            yield [on.done("a", "failed", error_type="OSError", error_text="no file")]

    before = time.time()
    found = play(jobs_with_one_stage(2), tmp_path, script)
    told = [line for line in found.lines if line.startswith("stage ")]
    assert told == ["stage bench-weights of bench/big failed, will be tried again: no file"]
    for row in found.rows:
        assert (row["status"], row["error_type"], row["attempt"]) == ("failed", "OSError", 0)
        assert row["error_text"].startswith("stage bench-weights-")
        assert row["error_text"].endswith(": no file")
        assert before - 1 <= row["started"].timestamp() <= time.time() + 1


# rows


def test_rows_are_durable_while_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "due", property(lambda self: True))

    def script(on: Scripted) -> Events:
        yield []
        for number in range(1, 4):
            yield [on.done("a")]
            assert rows_of(tmp_path) == number

    assert play(jobs_without_stages(6), tmp_path, script).summary.ok == 6


def test_rows_are_written_a_few_at_a_time_and_the_last_ones_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outbox, "due", property(lambda self: False))
    seen = []

    def script(on: Scripted) -> Events:
        yield []
        for _ in range(3):
            yield [on.done("a")]
            seen.append(rows_of(tmp_path))

    assert play(jobs_without_stages(3), tmp_path, script).summary.ok == 3
    assert seen[:2] == [0, 0]
    assert rows_of(tmp_path) == 3


def test_a_result_that_cannot_be_kept_fails_its_own_job_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is found when the row is made, one when the ledger refuses it, together with a good one."""
    monkeypatch.setattr(Outbox, "due", property(lambda self: False))

    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a", metrics={"loss": "much"}, footprint={"flops": 10.0})]
        yield [on.done("a", axes={"N": 2.0**70})]
        yield [on.done("a")]

    found = play(jobs_without_stages(3), tmp_path, script)
    assert (found.summary.ok, found.summary.failed, found.summary.ran) == (1, 2, 3)
    assert [row["status"] for row in found.rows] == ["failed", "failed", "ok"]
    for row, why in zip(
        found.rows, ("could not convert string to float", "its result cannot be kept (N): "), strict=False
    ):
        assert (row["error_type"], row["error"], row["scores"]) == ("SpoiltResult", None, None)
        assert row["error_text"].startswith(why)
        assert any("failed" in line and why in line for line in found.lines)
    refused = found.rows[1]
    assert f"job {refused['job_id']} failed: {refused['error_text']}" in found.lines
    assert (refused["worker"], refused["attempt"], refused["task"]) == ("a", 1, "bench-noop")
    assert play(jobs_without_stages(3), tmp_path, nothing).summary.cached == 3


# what is told and shown


def test_what_workers_do_is_shown_while_they_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoflop.sweep.display._SHOW_SECONDS", 0.0)

    def script(on: Scripted) -> Events:
        yield []
        on.now = 7.0
        yield []

    shown = play(jobs_without_stages(1), tmp_path, script, "ab").snapshots
    doing = [snapshot["doing"] for snapshot in shown]
    assert {"a": "bench/noop bench-knobs k=8 x=0.1 y=0.1 z=1.0 bench-noop (7 s)", "b": "idle"} in doing
    assert shown[0]["running"] == 1
    assert doing[-1] == {"a": "idle", "b": "idle"}


def test_the_state_is_shown_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoflop.sweep.display._SHOW_SECONDS", 1e9)
    shown = play(jobs_without_stages(4), tmp_path, nothing).snapshots
    assert shown[-1]["done"] == 4
    assert len(shown) <= 2


def test_an_executor_may_tell_of_itself(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        assert on._line is not None
        on._line("no node can run a job now")
        yield []

    assert "no node can run a job now" in play(jobs_without_stages(1), tmp_path, script).lines


def test_how_long_it_will_take_is_known_from_earlier_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoflop.sweep.display._SHOW_SECONDS", 0.0)

    def slowly(on: Scripted) -> Events:
        yield []
        while on.held["a"]:
            yield [on.done("a", seconds=40.0)]

    def waiting(on: Scripted) -> Events:
        yield []

    play(jobs_without_stages(2), tmp_path, slowly)
    again = play(jobs_without_stages(5), tmp_path, waiting)
    assert again.summary.cached == 2
    assert again.snapshots[0]["eta"] == pytest.approx(120.0)


def test_how_long_stages_took_counts_for_those_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoflop.sweep.display._SHOW_SECONDS", 0.0)

    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a", seconds=300.0)]  # the features, for which both jobs wait
        yield [on.done("a", seconds=2.0)]
        assert [item.kind for item in on.held["a"]] == ["stage"]  # the weights, for the second
        yield []

    spec = jobs_without_stages(1, models=["bench/noop", "bench/big"], tasks=["bench-features"])
    known = [snapshot["eta"] for snapshot in play(spec, tmp_path, script).snapshots if snapshot["eta"]]
    assert known[0] == pytest.approx(302.0)


# ends


def test_ctrl_c_twice_drops_what_runs_and_keeps_what_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "due", property(lambda self: False))

    def script(on: Scripted) -> Events:
        yield []
        on.now = 5.0
        yield [on.done("a", seconds=0.1)]
        raise KeyboardInterrupt

    found = play(jobs_without_stages(4), tmp_path, script)
    assert found.summary.interrupted
    assert "stopped at once; what runs is dropped and will run again" in found.lines
    assert (len(found.rows), found.summary.left, found.summary.seconds) == (1, 3, 5.0)


def test_ctrl_c_where_nothing_runs_speaks_of_nothing_that_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Scripted) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scripted, "start", stopped)
    found = play(jobs_without_stages(2), tmp_path, nothing)
    assert "stopped at once" in found.lines
    assert found.summary.left == 2


def test_the_first_ctrl_c_lets_what_runs_end_and_begins_nothing(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        os.kill(os.getpid(), signal.SIGINT)
        yield []

    found = play(jobs_without_stages(9), tmp_path, script)
    assert found.summary.interrupted
    assert found.summary.ok == 2 == len(found.rows)  # what ran, and what was handed out behind it
    assert found.summary.left == 7
    assert found.snapshots[-1]["draining"]


def test_a_finished_sweep_is_opened_again_without_a_worker(tmp_path: Path) -> None:
    def failing(on: Scripted) -> Events:
        yield []
        for _ in range(2):
            yield [on.done("a", "failed", error_type="OSError", error_text="no file")]

    first = play(jobs_without_stages(1), tmp_path, failing)
    assert (first.executor.starts, first.summary.failed) == (1, 1)
    again = play(jobs_without_stages(1), tmp_path, nothing)
    assert (again.executor.starts, again.summary.cached) == (0, 1)
    assert "1 jobs have results already" in again.lines
    retried = play(jobs_without_stages(1), tmp_path, nothing, retry_failed=True)
    assert (retried.summary.cached, retried.summary.ok) == (0, 1)
    assert not any("have results already" in line for line in retried.lines)
