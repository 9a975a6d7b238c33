"""The queue's memory of warm models, its counts, and what is not tried again; each with the numbers that follow by hand."""

from __future__ import annotations

import pytest
from test_work_queue import FakeStage, add, job

from isoflop.execute import WorkItem
from isoflop.sweep.queue import WorkQueue


def model_of(queue: WorkQueue, worker: str) -> str:
    """The model of the job that a worker is given; jobs are numbered 100 x model + n."""
    item = queue.next_for(worker)
    assert item is not None
    number: int = item.job.knobs()["n"]
    return f"m{number // 100}"


def fill(queue: WorkQueue, models: int, each: int) -> None:
    for model in range(models):
        for number in range(each):
            add(queue, 100 * model + number, f"m{model}")


def test_a_worker_is_known_to_hold_its_last_four_models() -> None:
    queue = WorkQueue(retries=0)
    fill(queue, 5, 1)
    assert [model_of(queue, "a") for _ in range(5)] == ["m0", "m1", "m2", "m3", "m4"]
    assert (queue.affinity_hits, queue.dispatched) == (0, 5)
    for model in (0, 1):  # m0 was dropped for m4; m1 is the oldest that it still holds
        add(queue, 100 * model + 1, f"m{model}")
    assert model_of(queue, "a") == "m1"
    assert queue.affinity_hits == 1
    assert model_of(queue, "a") == "m0"
    assert (queue.affinity_hits, queue.dispatched) == (1, 7)
    add(queue, 202, "m2")  # for m0 the oldest was dropped, which is m2 by now, not m1
    assert model_of(queue, "a") == "m2"
    assert queue.affinity_hits == 1


def test_of_warm_models_the_one_used_last_comes_first() -> None:
    queue = WorkQueue(retries=0)
    fill(queue, 2, 1)
    assert [model_of(queue, "a") for _ in range(2)] == ["m0", "m1"]
    add(queue, 1, "m0")
    add(queue, 101, "m1")
    assert model_of(queue, "a") == "m1"


def test_a_model_that_no_worker_holds_comes_before_one_that_another_holds() -> None:
    queue = WorkQueue(retries=0)
    fill(queue, 2, 2)
    assert model_of(queue, "a") == "m0"
    assert model_of(queue, "b") == "m1"
    add(queue, 200, "m2")
    assert model_of(queue, "c") == "m2"


@pytest.mark.parametrize("lost", [True, False])
def test_what_a_lost_worker_held_is_held_by_nobody(lost: bool) -> None:
    queue = WorkQueue(retries=5)
    fill(queue, 1, 3)
    item = queue.next_for("a")
    assert item is not None
    queue.job_done(item.job.id)
    assert model_of(queue, "b") == "m0"
    if lost:
        queue.worker_lost("a", (), blame_first=False)
        queue.worker_lost("b", (), blame_first=False)
    add(queue, 100, "m1")
    assert model_of(queue, "c") == ("m0" if lost else "m1")  # in the order of the queue, or what nobody else holds


def test_a_mistake_is_given_up_at_its_first_attempt_and_a_stage_with_its_jobs() -> None:
    queue = WorkQueue(retries=3)
    bad = add(queue, 0)
    queue.next_for("a")
    pending = queue.job_failed(bad.id, "a", transient=False)
    assert pending is not None
    assert pending.attempt == 1
    waiting = [add(queue, n, "m", FakeStage("broken")) for n in (1, 2)]
    assert isinstance(queue.next_for("a"), WorkItem)
    failure = queue.stage_failed("broken", "failed", "TypeError", "no", transient=False)
    assert failure is not None
    assert {p.job.id for p in failure.jobs} == {made.id for made in waiting}
    assert (failure.key, failure.status, failure.error_type, failure.error_text) == (
        "broken",
        "failed",
        "TypeError",
        "no",
    )
    assert (len(queue), queue.stages_left) == (0, 0)


def test_what_is_in_hand_in_words() -> None:
    queue = WorkQueue(retries=0)
    assert queue.in_hand() == ""
    add(queue, 0, "m", FakeStage("one"))
    queue.next_for("a")
    assert queue.in_hand() == "1 running stage"
    for number in (1, 2):
        add(queue, number)
        queue.next_for("b")
    assert queue.in_hand() == "2 running jobs and 1 running stage"


def test_waiting_stages_are_counted_by_kind_and_slots() -> None:
    class Wide(FakeStage):
        slots, kind = 3, "wide"

    class Narrow(FakeStage):
        kind = "narrow"

    queue = WorkQueue(retries=0)
    first = queue.stages_waiting()
    assert not first
    made = [Narrow("n1"), Narrow("n2"), Wide("w")]
    for number, stage in enumerate(made):
        add(queue, number, "m", stage)
    assert queue.stages_waiting() == {"narrow": 2, "wide": 3}
    assert queue.kind("w") == "wide"
    item = queue.next_for("a", room=1)  # the wide one does not fit there
    assert item is not None
    assert item.slots == 1
    assert queue.stages_waiting() == {"narrow": 1, "wide": 3}
    assert queue.kind("never heard of") == "stage"


def test_adding_a_job_tells_the_kinds_that_are_computed_for_it_first() -> None:
    class Tower(FakeStage):
        kind = "tower"

    from test_work_queue import FakeResolved

    queue = WorkQueue(retries=0, cached={"there"})
    resolved = FakeResolved("m", Tower("there"), Tower("new"), FakeStage("other"))
    assert queue.add(job(0), resolved) == ("tower", "fakestage")  # type: ignore[arg-type]
    assert queue.add(job(1), resolved) == ()  # type: ignore[arg-type]
