"""The queue: single flight of stages, warm models, attempts, and that every job ends exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.execute import WorkItem
from isoflop.jobs import Job, MethodSpec
from isoflop.sweep.queue import WorkQueue


class FakeStage:
    slots, kind = 1, ""

    def __init__(self, key: str, *deps: FakeStage) -> None:
        self.key, self._deps = key, deps

    def deps(self) -> tuple[FakeStage, ...]:
        return self._deps


class FakeResolved:
    def __init__(self, model: str, *stages: FakeStage) -> None:
        self.model_key, self._stages = model, stages

    def stages(self) -> tuple[FakeStage, ...]:
        return self._stages


def job(number: int) -> Job:
    return Job(model="m", methods=(MethodSpec("x", (("n", number),)),), task="t", repeat=0, seed=0)


def add(queue: WorkQueue, number: int, model: str = "m", *stages: FakeStage) -> Job:
    made = job(number)
    queue.add(made, FakeResolved(model, *stages))  # type: ignore[arg-type]
    return made


def test_a_stage_runs_once_and_its_jobs_wait_for_it() -> None:
    queue = WorkQueue(retries=1)
    base = FakeStage("base")
    weights = FakeStage("weights", base)
    for number in range(3):
        add(queue, number, "m", base, weights)
    first = queue.next_for("a")
    assert first is not None
    assert (first.kind, first.stage) == ("stage", "base")
    assert queue.next_for("b") is None  # everything waits for it
    queue.stage_done("base")
    second = queue.next_for("b")
    assert second is not None
    assert (second.stage, second.needs) == ("weights", ("base",))
    assert queue.next_for("a") is None
    queue.stage_done("weights")
    assert {queue.next_for(w).kind for w in ("a", "b", "c")} == {"job"}  # type: ignore[union-attr]
    assert queue.next_for("a") is None
    assert (len(queue), queue.running, queue.stages_left) == (0, 3, 0)


def test_jobs_start_in_the_order_they_were_asked_for_whatever_stage_they_waited_for() -> None:
    """Text hashes differ from process to process, and with them the order of a set of job ids: a pruner that compares
    with the first trial would judge otherwise in each run."""
    queue = WorkQueue(retries=0)
    base = FakeStage("base")
    asked = [add(queue, number, "m", base).id for number in range(40)]
    assert queue.next_for("a") is not None
    queue.stage_done("base")
    started = [queue.next_for("a") for _ in asked]
    assert [item.job.id for item in started if item is not None] == asked


def test_stages_that_exist_are_not_computed() -> None:
    queue = WorkQueue(retries=0, cached={"base"})
    add(queue, 0, "m", FakeStage("base"))
    item = queue.next_for("a")
    assert item is not None
    assert item.kind == "job"


def test_the_stage_that_most_jobs_wait_for_comes_first() -> None:
    queue = WorkQueue(retries=0)
    add(queue, 0, "m", FakeStage("rare"))
    for number in (1, 2):
        add(queue, number, "n", FakeStage("common"))
    item = queue.next_for("a")
    assert item is not None
    assert item.stage == "common"


def test_a_worker_keeps_to_its_warm_model() -> None:
    queue = WorkQueue(retries=0)
    for number in range(6):
        add(queue, number, "m1" if number % 2 else "m2")
    models = {}
    for worker in ("a", "b"):
        item = queue.next_for(worker)
        assert item is not None
        models[worker] = [item.job.knobs()["n"] % 2]
    for worker in ("a", "b", "a", "b"):
        item = queue.next_for(worker)
        assert item is not None
        models[worker].append(item.job.knobs()["n"] % 2)
    assert all(len(set(seen)) == 1 for seen in models.values())
    assert queue.affinity_hits == 4


def test_a_failed_job_is_tried_elsewhere_and_then_given_up() -> None:
    queue = WorkQueue(retries=1)
    bad, other = add(queue, 0), add(queue, 1)
    assert queue.next_for("a").job.id == bad.id  # type: ignore[union-attr]
    assert queue.next_for("b").job.id == other.id  # type: ignore[union-attr]
    assert queue.job_failed(bad.id, "a") is None
    assert queue.next_for("a") is None  # not again where it failed, while there is another worker
    queue.job_done(other.id)
    again = queue.next_for("b")
    assert again is not None
    pending = queue.job_failed(bad.id, "b")
    assert pending is not None
    assert pending.attempt == 2
    assert len(queue) == queue.running == 0


def test_a_single_worker_may_try_again_itself() -> None:
    queue = WorkQueue(retries=1)
    bad = add(queue, 0)
    queue.next_for("a")
    queue.job_failed(bad.id, "a")
    assert queue.next_for("a") is not None


def test_a_lost_worker_is_blamed_on_its_running_job_only() -> None:
    queue = WorkQueue(retries=0)
    first, second = add(queue, 0), add(queue, 1)
    items = tuple(i for i in (queue.next_for("a"), queue.next_for("a")) if i is not None)
    exhausted = queue.worker_lost("a", items, blame_first=True)
    assert [p.job.id for p in exhausted] == [first.id]
    assert len(queue) == 1
    again = queue.next_for("b")
    assert again is not None
    assert again.job.id == second.id
    assert queue.worker_lost("b", (again,), blame_first=False) == []
    assert len(queue) == 1  # nobody's fault: its attempt is given back


@pytest.mark.parametrize("killer", [0, 1])
def test_where_one_of_two_killed_its_worker_each_runs_alone_and_only_the_killer_is_blamed(killer: int) -> None:
    queue = WorkQueue(retries=0)
    jobs = [add(queue, 0), add(queue, 1)]
    items = tuple(i for i in (queue.next_for("a"), queue.next_for("a", behind=True)) if i is not None)
    assert [i.alone for i in items] == [False, False]
    assert queue.worker_lost("a", items, blame_first=True, certain=False) == []
    assert len(queue) == 2
    assert queue.next_for("b", behind=True) is None  # neither stands behind another
    blamed = []
    for worker in "bc":
        item = queue.next_for(worker)
        assert item is not None
        assert item.alone
        if item.job.id == jobs[killer].id:
            blamed += queue.worker_lost(worker, (item,), blame_first=True, certain=True)
        else:
            assert queue.job_done(item.job.id).attempt == 1
    assert [(p.job.id, p.attempt) for p in blamed] == [(jobs[killer].id, 1)]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_to_run_alone_waits_for_no_more_than_what_its_worker_has(workers: int) -> None:
    """However many others wait, and however long the search goes on adding to them."""
    queue = WorkQueue(retries=0)
    crowded = add(queue, 0)
    item = queue.next_for("w0")
    assert item is not None
    for number in range(1, 21):
        add(queue, number)
    held: dict[str, list[WorkItem]] = {f"w{n}": [] for n in range(workers)}
    for name, items in held.items():
        items += [i for i in (queue.next_for(name),) if i is not None]
    assert queue.job_failed(crowded.id, "w0", crowded=True) is None
    assert len(queue) == 21 - workers
    ended = 0
    while not any(i.alone for items in held.values() for i in items):
        for name, items in held.items():
            if len(items) < 2 and not (items and items[0].alone):
                items += [i for i in (queue.next_for(name, behind=bool(items)),) if i is not None]
        for items in held.values():
            if items and not items[0].alone:
                queue.job_done(items.pop(0).job.id)
                ended += 1
    assert ended <= 2 * workers
    assert [i.job.id for items in held.values() for i in items if i.alone] == [crowded.id]


def test_after_a_job_that_ran_alone_its_worker_has_no_other_model_warm() -> None:
    queue = WorkQueue(retries=0)
    first = add(queue, 0, "first")
    assert queue.next_for("a") is not None
    queue.job_done(first.id)
    crowded = add(queue, 1, "crowded")
    assert queue.next_for("a") is not None
    assert queue.job_failed(crowded.id, "a", crowded=True) is None
    alone = queue.next_for("a")
    assert alone is not None
    assert alone.alone
    queue.job_done(crowded.id)
    add(queue, 2, "first")
    assert queue.next_for("a") is not None
    assert queue.affinity_hits == 0  # both were loaded again


def test_a_stage_that_fails_for_good_takes_its_jobs_along_and_no_others() -> None:
    queue = WorkQueue(retries=1)
    base, weights, other = FakeStage("base"), FakeStage("weights"), FakeStage("other")
    doomed = [add(queue, n, "m", base, weights) for n in range(2)]
    fine = add(queue, 5, "n", other)
    found = []
    for _ in range(2):
        item = queue.next_for("a")
        assert item is not None
        while item.stage not in ("base",):
            queue.stage_done(item.stage)
            item = queue.next_for("a")
            assert item is not None
            if item.kind == "job":
                queue.job_done(item.job.id)
                item = queue.next_for("a")
                assert item is not None
        found.append(queue.stage_failed("base", "failed", "ValueError", "no"))
    assert found[0] is None
    assert found[1] is not None
    assert {p.job.id for p in found[1].jobs} == {d.id for d in doomed}
    for _ in range(4):
        item = queue.next_for("a")
        if item is not None:
            assert item.job.id == fine.id
            queue.stage_done(item.stage) if item.kind == "stage" else queue.job_done(item.job.id)
    assert len(queue) == queue.running == 0


def test_an_infeasible_stage_is_not_tried_again() -> None:
    queue = WorkQueue(retries=5)
    add(queue, 0, "m", FakeStage("base"))
    queue.next_for("a")
    assert queue.stage_failed("base", "infeasible", "Infeasible", "no") is not None
    assert queue.stage_failed("base", "failed", "X", "late") is None


def test_many_stages_that_nobody_waits_for_any_more_do_not_hide_the_others() -> None:
    """One shared stage fails for good; hundreds of stages of the same jobs become pointless at once."""
    queue = WorkQueue(retries=0)
    shared = FakeStage("shared")
    for number in range(300):
        add(queue, number, "m", shared, FakeStage(f"own{number}"))
    good = add(queue, 999, "n", FakeStage("good"))
    item = queue.next_for("a")
    assert item is not None
    assert item.stage == "shared"
    failure = queue.stage_failed("shared", "failed", "X", "no")
    assert failure is not None
    assert len(failure.jobs) == 300
    item = queue.next_for("a")
    assert item is not None
    assert item.stage == "good"
    queue.stage_done("good")
    item = queue.next_for("a")
    assert item is not None
    assert item.job.id == good.id


def test_dropping_what_waits_keeps_what_runs() -> None:
    queue = WorkQueue(retries=0)
    running = add(queue, 0)
    queue.next_for("a")
    add(queue, 1)
    add(queue, 2, "m", FakeStage("s"))
    assert queue.drop_waiting() == 2
    assert (len(queue), queue.running) == (0, 1)
    assert queue.next_for("b") is None
    queue.job_done(running.id)


@settings(max_examples=200)
@given(st.data())
def test_every_job_ends_exactly_once_whatever_happens(data: st.DataObject) -> None:
    """Workers die, jobs and stages fail, stages get lost with the only host that had them, in any order; at the end each
    job has one outcome and nothing is left over, and nothing was started before its stages were there."""
    retries = data.draw(st.integers(0, 2))
    queue = WorkQueue(retries)
    shared = [FakeStage(f"s{i}") for i in range(3)]
    deep = [FakeStage(f"d{i}", shared[i]) for i in range(3)]
    jobs = {}
    for number in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.integers(0, 3))
        stages = () if kind == 3 else (shared[kind], deep[kind])
        made = add(queue, number, f"m{number % 3}", *stages)
        jobs[made.id] = made
    ended: dict[str, str] = {}
    computing: set[str] = set()
    there: set[str] = set()
    held: dict[str, list[WorkItem]] = {"a": [], "b": [], "c": []}

    def end(job_id: str, how: str) -> None:
        assert job_id not in ended
        ended[job_id] = how

    def fail_stage(key: str, status: str) -> None:
        failure = queue.stage_failed(key, status, "X", "no")
        for pending in failure.jobs if failure else ():
            end(pending.job.id, "stage")

    steps, idle = 0, ""
    while len(queue) or any(held.values()):
        steps += 1
        assert steps < 2000, "the queue does not come to an end"
        # one that had nothing to do is not asked again at once: nobody waits for ever
        others = {name for name in held if held[name]} or set(held) - {idle}
        worker = data.draw(st.sampled_from(sorted(others if idle else held)))
        idle, items = "", held[worker]
        if len(items) < 2 and not (items and (items[0].kind == "stage" or items[0].alone)):
            item = queue.next_for(worker, behind=bool(items))
            if item is not None:
                assert not (items and item.alone)
                assert set(item.needs) <= there
                if item.kind == "stage":
                    assert item.stage not in computing, "two workers compute one stage"
                    computing.add(item.stage)
                items.append(item)
                continue
        if not items:
            idle = worker
            continue
        what = data.draw(st.sampled_from(["ok", "ok", "ok", "fail", "infeasible", "lost"]))
        if what == "lost":
            held[worker] = []
            computing -= {i.stage for i in items}
            blame, certain = data.draw(st.booleans()), data.draw(st.booleans())
            for pending in queue.worker_lost(worker, tuple(items), blame, certain):
                assert blame or pending.misfortunes > 10
                assert certain or len(items) == 1 or not blame
                end(pending.job.id, "lost")
            if items[0].kind == "stage" and not queue.stage_attempts_left(items[0].stage):
                fail_stage(items[0].stage, "failed")
            if data.draw(st.booleans()) and there:
                gone = data.draw(st.sets(st.sampled_from(sorted(there))))
                there -= gone
                queue.stages_lost(gone)
            continue
        item = items.pop(0)
        if item.kind == "stage":
            computing.discard(item.stage)
            if what == "ok":
                there.add(item.stage)
                queue.stage_done(item.stage)
            else:
                fail_stage(item.stage, "infeasible" if what == "infeasible" else "failed")
        elif what == "fail":
            given_up: Any = queue.job_failed(item.job.id, worker)
            if given_up is not None:
                assert given_up.attempt == retries + 1
                end(item.job.id, "failed")
        else:
            queue.job_done(item.job.id)
            end(item.job.id, what)
    assert set(ended) == set(jobs)
    assert queue.running == 0


@pytest.mark.parametrize("retries", [0, 3])
def test_a_poison_job_uses_up_its_attempts_and_no_more(retries: int) -> None:
    queue = WorkQueue(retries)
    poison = add(queue, 0)
    deaths = 0
    while (item := queue.next_for(f"w{deaths}")) is not None:
        deaths += 1
        queue.worker_lost(f"w{deaths - 1}", (item,), blame_first=True)
    assert deaths == retries + 1
    assert poison.id


@pytest.mark.parametrize("retries", [0, 3])
def test_a_poison_stage_uses_up_its_attempts_and_no_more(retries: int) -> None:
    queue = WorkQueue(retries)
    add(queue, 0, "m", FakeStage("base"))
    deaths = 0
    while queue.stage_attempts_left("base"):
        item: Any = queue.next_for(f"w{deaths}")
        queue.worker_lost(f"w{deaths}", (item,), blame_first=True)
        deaths += 1
    assert deaths == retries + 1


def test_giving_back_a_stage_that_is_there_by_now_changes_nothing() -> None:
    queue = WorkQueue(retries=0)
    add(queue, 0, "m", FakeStage("base"))
    stage: Any = queue.next_for("a")
    queue.stages_exist({"base"})  # a host that has just joined has it on its disk
    queue.give_back(stage)
    item: Any = queue.next_for("a")
    assert (item.kind, item.needs, queue.stages_left) == ("job", ("base",), 0)


def test_a_lost_host_costs_no_attempt_unless_it_happens_too_often() -> None:
    queue = WorkQueue(0)
    add(queue, 0)
    deaths, exhausted = 0, []
    while (item := queue.next_for(f"w{deaths}")) is not None:
        exhausted = queue.worker_lost(f"w{deaths}", (item,), blame_first=False)
        deaths += 1
    assert deaths == 11
    assert [p.attempt for p in exhausted] == [1]


def test_a_stage_that_was_lost_with_its_host_is_computed_again() -> None:
    queue = WorkQueue(0)
    base = FakeStage("base")
    add(queue, 0, "m", base, FakeStage("weights", base))
    for key in ("base", "weights"):
        stage: Any = queue.next_for("a")
        assert stage.stage == key
        queue.stage_done(key)
    queue.stages_lost({"base", "weights"})
    again = []
    while (item := queue.next_for("b")) is not None and item.kind == "stage":
        again.append(item.stage)
        queue.stage_done(item.stage)
    assert again == ["base", "weights"]
    assert item is not None
    assert item.kind == "job"


@pytest.mark.parametrize("times", [1, 14])
def test_what_is_given_back_is_as_if_it_had_never_been_handed_out(times: int) -> None:
    queue = WorkQueue(retries=0)
    made = add(queue, 0, "m", FakeStage("base"))
    for kind in ("stage", "job"):
        for _ in range(times):
            item = queue.next_for("a")
            assert item is not None
            assert item.kind == kind
            queue.give_back(item)
            queue.give_back(item)  # it is there already
        item = queue.next_for("a")
        assert item is not None
        if kind == "stage":
            assert queue.stage_attempts_left("base") is False  # it is the one attempt now
            queue.stage_done("base")
    pending = queue.job_failed(made.id, "a")
    assert pending is not None
    assert (pending.attempt, pending.misfortunes) == (1, 0)


def test_a_stage_is_sound_while_jobs_wait_for_it_and_all_it_needs_is_there() -> None:
    queue = WorkQueue(retries=0, cached={"base"})
    base = FakeStage("base")
    add(queue, 0, "m", base, FakeStage("weights", base))
    item = queue.next_for("a")
    assert item is not None
    assert queue.is_sound(item)
    queue.stages_lost({"base"})
    assert not queue.is_sound(item)
    queue.stage_done("base")
    assert queue.is_sound(item)
    queue.drop_waiting()
    assert not queue.is_sound(item)
    queue.give_back(item)
    assert queue.stages_left == 0


def test_stages_without_room_do_not_hide_those_that_have_it() -> None:
    queue = WorkQueue(retries=0)
    for number in range(100):
        wide = FakeStage(f"wide{number}")
        wide.slots = 2
        add(queue, number, "m", wide)
    add(queue, 100, "m", FakeStage("narrow"))
    item = queue.next_for("a", room=1)
    assert item is not None
    assert item.stage == "narrow"
    assert queue.next_for("a", room=1) is None
    item = queue.next_for("a", room=2)
    assert item is not None
    assert item.slots == 2
