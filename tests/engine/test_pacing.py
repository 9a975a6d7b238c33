"""When the search is asked and what the budget allows, without a driver."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.sweep.blocks import Budget
from isoflop.sweep.pacing import Pacing
from isoflop.sweep.spending import Spending
from isoflop.sweep.summary import Summary


def spending(summary: Summary | None = None, per_trial: int = 1, **limits: float) -> Spending:
    return Spending(Budget(**limits), summary or Summary(), per_trial, lambda: 0.0)


def test_an_eager_search_is_asked_ahead_and_one_that_learns_as_late_as_possible() -> None:
    eager, learning = Pacing(True, 1), Pacing(False, 1)
    for pacing in (eager, learning):
        pacing.took(60.0)
    assert eager.missing_jobs(2, 0, 0, True) == 16
    assert eager.missing_jobs(8, 30, 99, True) == 2
    assert learning.missing_jobs(2, 0, 0, True) == 2
    assert learning.missing_jobs(2, 0, 2, True) == 0


def test_short_jobs_are_queued_behind_each_other() -> None:
    pacing = Pacing(False, 1)
    assert (pacing.depth, pacing.per_slot(False)) == (2, 4)
    pacing.took(0.01)
    assert pacing.per_slot(True) == 8
    for _ in range(20):
        pacing.took(30.0)
    assert (pacing.depth, pacing.per_slot(True)) == (1, 1)
    assert pacing.job_seconds == pytest.approx(30.0, rel=0.05)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_no_more_trials_begin_than_the_budget_of_jobs_has_room_for(
    per_trial: int, limit: int, done: int, open_jobs: int, missing: int
) -> None:
    """The last trial may have more jobs than there is room for: then some of them wait for ever."""
    allowed = spending(Summary(ok=done), per_trial, jobs=limit).allowed_trials(missing, open_jobs, 0)
    room = limit - done - open_jobs
    assert allowed * per_trial < max(0, min(room, missing)) + per_trial
    assert (allowed > 0) == (room > 0 and missing > 0)


def test_each_limit_ends_a_session_with_its_own_words() -> None:
    counted = spending(Summary(cached=3), jobs=5)
    assert counted.ended(1) is None
    assert counted.ended(2) == "5 jobs"
    paid = spending(flops=1e6)
    paid.spend(999_999.0)
    assert paid.ended(0) is None
    paid.spend(1.0)
    assert paid.ended(0) == "1e+06 FLOPs"
    assert spending(trials=4).all_trials(3) is None
    assert spending(trials=4).all_trials(4) == "4 trials"
    now = [0.0]
    timed = Spending(Budget(hours=1), Summary(), 1, lambda: now[0])
    now[0] = 1800.0
    timed.start()
    now[0] = 5399.0
    assert timed.ended(0) is None
    now[0] = 5400.0
    assert timed.ended(0) == "1 hours"


def test_only_what_another_run_may_take_up_counts_as_left() -> None:
    for limits, left in (({"hours": 1}, 7), ({"jobs": 9}, 0)):
        dropping = spending(**limits)
        dropping.drop(7)
        assert dropping.dropped == left


def test_a_session_that_was_stopped_leaves_what_it_never_proposed() -> None:
    assert spending(Summary(ok=4)).jobs_left(1, 0, 10) == 1
    assert spending(Summary(ok=4, interrupted=True)).jobs_left(1, 0, 10) == 6
    assert spending(Summary(ok=4, interrupted=True)).jobs_left(1, 0, None) == 1
