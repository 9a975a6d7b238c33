"""What the driver asks of the search and when, what a budget leaves, what the tracker hears: on scripted workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, jobs_with_one_stage, jobs_without_stages, nothing, play, rows_of

from isoflop.execute.base import Event
from isoflop.search import Proposal, Proposer, Tell
from isoflop.sweep.outbox import Outbox
from isoflop.sweep.resolve import resolve
from isoflop.track import NullTracker

Events = Iterator[list[Event]]
LEARNS = {"search": {"sampler": "tpe"}}


class Points(Proposer):
    """Gives the points of a sweep, never more than it may; each that it is told of lets it give another.

    Attributes:
        waits: how often the driver had nothing to do but to wait for it.
    """

    def __init__(self, spec: dict[str, Any], at_first: int, thinking: bool = False) -> None:
        self._points = deque(Proposal(n, config) for n, config in enumerate(resolve(spec).space.grid()))
        self.may = at_first
        self.thinking = thinking
        self.waits = 0
        self.told: list[Tell] = []

    def ask(self, count: int) -> list[Proposal]:
        given = min(count, self.may, len(self._points))
        self.may -= given
        return [self._points.popleft() for _ in range(given)]

    def tell(self, result: Tell) -> None:
        self.told.append(result)
        self.may += 1

    def reserve(self, number: int, config: Any) -> None:
        pass

    @property
    def pending(self) -> bool:
        return self.thinking

    def wait(self, seconds: float) -> None:
        self.waits += 1

    @property
    def reason(self) -> str | None:
        return "it has seen enough"


@pytest.fixture
def never_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written when somebody waits for them, and at no other time."""
    monkeypatch.setattr(Outbox, "due", property(lambda self: False))


# a search that learns


@pytest.mark.usefixtures("never_due")
def test_a_search_hears_of_rows_as_soon_as_a_worker_stands_idle(tmp_path: Path) -> None:
    spec = jobs_without_stages(4, **LEARNS)

    def script(on: Scripted) -> Events:
        yield []
        assert [len(items) for items in on.held.values()] == [2, 1]
        yield [on.done("a")]  # which goes on with its next
        assert rows_of(tmp_path) == 0
        yield [on.done("b")]
        assert rows_of(tmp_path) == 2
        assert sorted(len(items) for items in on.held.values()) == [1, 1]  # the fourth point

    proposer = Points(spec, at_first=3)
    found = play(spec, tmp_path, script, "ab", proposer)
    assert found.summary.ok == 4 == len(proposer.told)
    assert found.summary.reason == "it has seen enough"


@pytest.mark.usefixtures("never_due")
def test_a_search_that_thinks_hears_of_rows_before_it_runs_out_of_points(tmp_path: Path) -> None:
    spec = jobs_without_stages(3, **LEARNS)
    proposer = Points(spec, at_first=3, thinking=True)

    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a")]
        assert rows_of(tmp_path) == 0
        yield [on.done("a")]
        assert (rows_of(tmp_path), len(on.held["a"])) == (2, 1)
        proposer.thinking = False

    assert play(spec, tmp_path, script, proposer=proposer).summary.ok == 3


@pytest.mark.usefixtures("never_due")
def test_one_row_is_too_few_to_be_told_to_a_search_that_thinks(tmp_path: Path) -> None:
    spec = jobs_without_stages(2, **LEARNS)
    proposer = Points(spec, at_first=2, thinking=True)

    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a")]
        assert (rows_of(tmp_path), len(on.held["a"])) == (0, 1)
        proposer.thinking = False

    assert play(spec, tmp_path, script, proposer=proposer).summary.ok == 2


@pytest.mark.usefixtures("never_due")
def test_a_search_goes_on_where_the_worker_is_lost_right_after_the_last_job(tmp_path: Path) -> None:
    spec = jobs_without_stages(3, **LEARNS)

    def script(on: Scripted) -> Events:
        yield []
        yield [on.done("a"), on.lose("a")]

    assert play(spec, tmp_path, script, proposer=Points(spec, at_first=1)).summary.ok == 3


def test_the_driver_waits_for_the_search_only_while_nothing_else_is_to_be_done(tmp_path: Path) -> None:
    spec = jobs_without_stages(1, **LEARNS)
    proposer = Points(spec, at_first=0, thinking=True)

    def script(on: Scripted) -> Events:
        assert on.starts == 1  # workers come up while it thinks
        assert proposer.waits == 1
        yield []
        assert proposer.waits == 2
        proposer.may = 1
        yield []
        assert (proposer.waits, len(on.held["a"])) == (3, 1)
        for _ in range(3):
            yield []
        assert proposer.waits == 3
        proposer.thinking = False

    assert play(spec, tmp_path, script, proposer=proposer).summary.ok == 1


def test_a_search_without_a_reason_ends_without_one(tmp_path: Path) -> None:
    assert play(jobs_without_stages(2), tmp_path, nothing).summary.reason == ""


# budgets


def paid(on: Scripted) -> Events:
    """Every answer takes ten FLOPs."""
    yield []
    while on.held["a"]:
        yield [on.done("a", footprint={"flops": 10.0})]


def budget_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("budget")]


def test_when_flops_end_what_waits_is_left_and_said_once(tmp_path: Path) -> None:
    found = play(jobs_without_stages(6, budget={"flops": 25}), tmp_path, paid)
    assert budget_lines(found.lines) == ["budget: 25 FLOPs; 2 queued jobs are left"]
    assert (found.summary.ok, found.summary.left, found.summary.reason) == (4, 2, "25 FLOPs")


def test_a_budget_of_jobs_leaves_nothing_in_the_queue(tmp_path: Path) -> None:
    found = play(jobs_without_stages(3, budget={"jobs": 2}), tmp_path, nothing)
    assert budget_lines(found.lines) == ["budget: 2 jobs"]
    assert (found.summary.ok, found.summary.left, found.summary.reason) == (2, 0, "2 jobs")


def test_a_budget_of_trials_ends_a_search_that_still_thinks(tmp_path: Path) -> None:
    spec = jobs_without_stages(4, budget={"trials": 2}, **LEARNS)
    found = play(spec, tmp_path, nothing, proposer=Points(spec, at_first=4, thinking=True))
    assert (found.summary.ok, found.summary.reason) == (2, "2 trials")


def test_flops_of_earlier_sessions_are_spent(tmp_path: Path) -> None:
    play(jobs_without_stages(2), tmp_path, paid)
    over = play(jobs_without_stages(5, budget={"flops": 20}), tmp_path, nothing)
    assert (over.summary.ran, over.summary.reason) == (0, "20 FLOPs")
    assert over.executor.given == []
    assert play(jobs_without_stages(5, budget={"flops": 21}), tmp_path, paid).summary.ran == 2


@pytest.mark.parametrize(("sampler", "queued"), [("tpe", 2), ("grid", 4)])
def test_a_search_without_an_aim_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, queued: int
) -> None:
    monkeypatch.setattr(Outbox, "due", property(lambda self: True))
    spec = jobs_without_stages(6, search={"sampler": sampler}, objectives=[{"metric": "nothing"}])
    found = play(spec, tmp_path, nothing, proposer=Points(spec, at_first=6))
    assert found.summary.ran == 2  # the second was handed out behind the first
    assert sum("no row so far has 'nothing'" in line for line in found.lines) == 1
    assert "'nothing'" in found.summary.aimless
    gave_up = f"budget: no row has what the objectives name; {queued} queued jobs are left"
    assert budget_lines(found.lines) == [gave_up]


def test_a_search_without_an_aim_does_not_go_on_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial has jobs without a row, which no row's column would make worth their time."""
    monkeypatch.setattr(Outbox, "due", property(lambda self: True))
    spec = jobs_without_stages(3, repeats=4, objectives=[{"metric": "nothing"}])
    first = play(spec, tmp_path, nothing)
    assert 0 < first.summary.ran < 4
    again = play(spec, tmp_path, nothing)
    assert "'nothing'" in again.summary.aimless
    assert again.executor.given == []
    assert len(budget_lines(again.lines)) == 1


# who is given what


def test_no_job_is_queued_behind_a_stage(tmp_path: Path) -> None:
    def script(on: Scripted) -> Events:
        yield []
        assert [item.kind for item in on.held["a"]] == ["job"]
        yield [on.done("a")]
        assert [item.kind for item in on.held["a"]] == ["stage"]
        yield [on.done("b", "failed", error_type="OSError", error_text="no file")]
        assert [item.kind for item in on.held["a"]] == ["stage"]  # though b is the one on which the job failed

    spec = jobs_without_stages(1, models=["bench/noop", "bench/big"], repeats=2)
    assert play(spec, tmp_path, script, "ab").summary.ok == 4


def test_stages_that_workers_have_already_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[str] = []

    def script(on: Scripted) -> Events:
        yield []
        known.append(on.held["a"][0].stage)

    play(jobs_with_one_stage(1), tmp_path / "first", script)
    monkeypatch.setattr(Scripted, "cached_stages", lambda self: set(known))
    found = play(jobs_with_one_stage(1), tmp_path / "second", nothing)
    assert [item.kind for _, _, item in found.executor.given] == ["job"]


def test_what_stages_took_is_counted_and_told_unless_they_were_there(tmp_path: Path) -> None:
    def computed(on: Scripted) -> Events:
        yield []
        yield [on.done("a", seconds=300.0)]

    def there(on: Scripted) -> Events:
        yield []
        yield [on.done("a", seconds=0.0)]

    first = play(jobs_with_one_stage(4), tmp_path / "first", computed)
    assert (first.summary.stages, first.summary.stage_seconds) == (1, 300.0)
    assert "stage bench-weights of bench/big computed by a in 300.0 s" in first.lines
    assert first.summary.job_seconds == 4.0
    assert first.summary.affinity == 0.75
    second = play(jobs_with_one_stage(4), tmp_path / "second", there)
    assert (second.summary.stages, second.summary.stage_seconds) == (1, 0.0)
    assert not any(line.startswith("stage ") for line in second.lines)


# the tracker and the page of the workers


class Spy(NullTracker):
    """Remembers."""

    def __init__(self) -> None:
        self.pushed: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.caught_up = -1

    def push(self, rows: Any) -> None:
        self.pushed += rows

    def catch_up(self, table: Any) -> None:
        self.caught_up = table.num_rows

    def describe(self, note: str) -> None:
        self.notes.append(note)

    def run_id(self, job_id: str) -> str:
        return f"run-{job_id}"


def test_the_tracker_hears_of_all_rows_once_they_are_durable(tmp_path: Path) -> None:
    first, second = Spy(), Spy()
    play(jobs_without_stages(2), tmp_path, nothing, tracker=first)
    found = play(jobs_without_stages(3), tmp_path, nothing, tracker=second)
    assert (first.caught_up, second.caught_up) == (0, 2)
    pushed = [*first.pushed, *second.pushed]
    assert [row["sequence"] for row in pushed] == [1, 2, 3]
    assert {row["mlflow_run_id"] for row in found.rows} == {f"run-{row['job_id']}" for row in pushed}


def test_the_page_of_the_workers_is_told_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Spy()
    assert not any("dashboard" in line for line in play(jobs_without_stages(1), tmp_path / "a", nothing).lines)
    monkeypatch.setattr(Scripted, "dashboard", "http://127.0.0.1:8265")
    found = play(jobs_without_stages(1), tmp_path / "b", nothing, tracker=tracker)
    assert "Ray's dashboard: http://127.0.0.1:8265" in found.lines
    assert len(tracker.notes) == 1
    assert "http://127.0.0.1:8265" in tracker.notes[0]
