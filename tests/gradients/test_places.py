"""Stages of several processes get their slots: who stands aside, and that nothing runs beside them or waits for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.execute import Done, Event, Executor, Lost, WorkerInfo, WorkItem
from isoflop.execute.simulated import Rates, SimulatedExecutor
from isoflop.jobs import Job, MethodSpec
from isoflop.ledger import Ledger, Store
from isoflop.search import make_proposer
from isoflop.sweep.driver import Driver
from isoflop.sweep.places import Places, room
from isoflop.sweep.progress import Quiet
from isoflop.sweep.resolve import resolve
from isoflop.sweep.simulate import simulate as run_simulated
from isoflop.track import NullTracker

JOB = Job(model="m", methods=(MethodSpec("x"),), task="t", repeat=0, seed=0)


def worker(name: str, node: str = "n0") -> WorkerInfo:
    return WorkerInfo(name, node, "host", "cpu")


def item(name: str, slots: int) -> WorkItem:
    return WorkItem(name, "stage", JOB, name, slots=slots)


def test_a_claim_waits_for_busy_workers_of_its_host_only() -> None:
    places = Places()
    workers = [worker("a"), worker("b"), worker("c", "n1")]
    busy = {"b"}
    places.claim(workers[0], item("s", 2))
    assert places.settle(workers, lambda w: w not in busy) == []
    assert places.wanted("n0")
    assert not places.wanted("n1")
    assert not places.taken("c")
    busy.clear()
    assert [(w, i.id) for w, i in places.settle(workers, lambda w: w not in busy)] == [("a", "s")]
    assert places.taken("b")
    assert places.beside("b") == "a"
    assert places.settle(workers, lambda w: False) == []  # handed out once
    places.ended("a", "s")
    assert not any(places.taken(w.id) for w in workers)


def test_a_host_with_fewer_slots_gives_all_it_has() -> None:
    places = Places()
    places.claim(worker("a"), item("s", 4))
    assert len(places.settle([worker("a")], lambda w: True)) == 1


def test_a_lost_worker_gives_back_what_it_had_not_begun() -> None:
    places = Places()
    workers = [worker("a"), worker("b")]
    places.claim(workers[0], item("s", 2))
    assert places.settle(workers, lambda w: w == "a") == []
    found = places.lost("a")
    assert found is not None
    assert found.id == "s"
    places.claim(workers[1], item("t", 2))
    assert places.settle(workers[1:], lambda w: True)  # the only one left on the host
    assert places.lost("b") is None  # had been handed out: the executor reports it


def test_a_new_worker_takes_the_place_of_a_lost_one() -> None:
    places = Places()
    workers = [worker("a"), worker("b")]
    places.claim(workers[0], item("s", 2))
    places.settle(workers, lambda w: True)
    assert places.lost("b") is None
    places.settle([workers[0], worker("c")], lambda w: w != "a")
    assert places.taken("c")


def test_only_the_largest_hosts_have_room_for_anything() -> None:
    rooms = room([worker("a"), *(worker(name, node) for node in ("n1", "n2") for name in "bcd")])
    assert rooms["n0"] == 1
    assert rooms["n1"] == rooms["n2"] == float("inf")
    assert room([]) == {}


def test_only_claims_that_have_not_started_are_withdrawn() -> None:
    places = Places()
    workers = [worker("a"), worker("b"), worker("c", "n1"), worker("d", "n1")]
    places.claim(workers[0], item("s", 2))
    assert len(places.settle(workers, lambda w: True)) == 1
    places.claim(workers[2], item("t", 2))
    assert places.settle(workers, lambda w: w == "c") == []
    assert places.withdraw(workers, lambda i: True) == []
    assert [i.id for i in places.withdraw(workers, lambda i: False)] == ["t"]
    assert [w.id for w in workers if places.taken(w.id)] == ["a", "b"]


def test_a_claim_is_withdrawn_when_its_host_has_become_too_small() -> None:
    places = Places()
    workers = [worker("a"), worker("b"), worker("c", "n1"), worker("d", "n1")]
    places.claim(workers[0], item("s", 2))
    assert [i.id for i in places.withdraw([workers[0], *workers[2:]], lambda i: True)] == ["s"]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=25),
    hosts=st.integers(1, 3),
    per_host=st.integers(1, 4),
    seed=st.randoms(use_true_random=False),
)
def test_slots_are_never_oversubscribed_and_everything_ends(
    sizes: list[int], hosts: int, per_host: int, seed: object
) -> None:
    """The driver's loop with items of all sizes, ending in any order."""
    workers = [worker(f"{host}{slot}", host) for host in "xyz"[:hosts] for slot in range(per_host)]
    node_of = {w.id: w.node for w in workers}
    queue = [item(f"i{number}", size) for number, size in enumerate(sizes)]
    places, running, done = Places(), {}, []

    def hand_out() -> None:
        for name, ready in places.settle(workers, lambda w: w not in running):
            running[name] = ready

    for _ in range(10 * len(sizes) + 10):
        hand_out()
        for candidate in workers:
            if candidate.id in running or places.taken(candidate.id) or not queue:
                continue
            chosen = queue.pop(0)
            if chosen.slots == 1:
                running[candidate.id] = chosen
            else:
                places.claim(candidate, chosen)
                hand_out()
        used = Counter[str]()
        for name, ready in running.items():
            used[node_of[name]] += min(ready.slots, per_host)
        assert all(count <= per_host for count in used.values()), used
        if running:
            name = seed.choice(sorted(running))  # type: ignore[attr-defined]
            ended = running.pop(name)
            places.ended(name, ended.id)
            done.append(ended.id)
    assert sorted(done) == sorted(f"i{number}" for number in range(len(sizes)))


def makespan(workers: int, backend: str, slots: int = 4, nodes: int = 1, rates: Rates | None = None) -> float:
    """Simulated seconds of the real driver for twelve trainings of 100 s, once text and tokenizer are there."""
    densities = [round(0.01 * (n + 1), 2) for n in range(12)]
    spec = {
        "name": "places",
        "models": [{"tiny-lm/text-d64": {"batch": 12}}],
        "methods": [{"dgc": {"workers": workers, "backend": backend, "density": densities}}],
        "tasks": ["bits-per-byte"],
        "search": {"sampler": "grid"},
        "limits": {"retries": 20},
    }
    found = run_simulated(resolve(spec), nodes, slots, rates or Rates(job=1.0, load=0.0, stage=100.0, spread=0.0))
    assert (found.jobs, found.failed) == (12, 0)
    return found.makespan


def test_the_driver_runs_as_many_trainings_at_a_time_as_have_room() -> None:
    """Four processes fill a host of four slots; two leave room for another two; a simulated exchange takes one slot."""
    text = 400  # at most four stages in a row before the first training
    for workers, backend, rounds in ((4, "ddp", 12), (3, "ddp", 12), (2, "ddp", 6), (4, "simulated", 3)):
        assert 100 * rounds <= makespan(workers, backend) <= 100 * rounds + text + 50


def test_a_small_host_still_runs_it() -> None:
    assert makespan(4, "ddp", slots=1) >= 1200


def test_lost_nodes_do_not_block_places() -> None:
    stormy = Rates(job=1.0, load=0.0, stage=100.0, spread=0.3, node_hours=0.2)
    assert makespan(2, "ddp", slots=3, nodes=3, rates=stormy) > 0


class UnevenCluster(SimulatedExecutor):
    """One slot on the first host, two on the second, and so on; notes how many slots the host of each stage had."""

    room: list[tuple[int, int]]

    def start(self) -> None:
        if self.workers():
            return
        self.room = []
        super().start()
        for worker in self.workers():
            if int(worker.slot) > int(worker.node[1:]):
                del self._slots[worker.id]

    def submit(self, worker: str, item: WorkItem) -> None:
        super().submit(worker, item)
        self.room.append((item.slots, int(self._slots[worker].info.node[1:]) + 1))


@pytest.mark.parametrize("node_hours", [0.0, 0.1])
def test_hosts_of_different_sizes_run_everything(monkeypatch: pytest.MonkeyPatch, node_hours: float) -> None:
    made: list[UnevenCluster] = []

    def make(*args: Any) -> UnevenCluster:
        made.append(UnevenCluster(*args))
        return made[-1]

    monkeypatch.setattr("isoflop.sweep.simulate.SimulatedExecutor", make)
    rates = Rates(job=1.0, load=0.0, stage=100.0, spread=0.3, node_hours=node_hours)
    makespan(3, "ddp", slots=4, nodes=4, rates=rates)
    wide = [has for slots, has in made[0].room if slots == 3]
    assert len(wide) >= 12
    assert node_hours or min(wide) >= 3  # with losses the largest that is left may be smaller


# the driver's own rounds, with stages and workers made up


class MadeUpStage:
    kind = ""

    def __init__(self, key: str, *deps: MadeUpStage, slots: int = 1) -> None:
        self.key, self._deps, self.slots = key, deps, slots

    def deps(self) -> tuple[MadeUpStage, ...]:
        return self._deps


class MadeUpJob:
    model_key = "m"

    def __init__(self, *stages: MadeUpStage) -> None:
        self._stages = stages

    def stages(self) -> tuple[MadeUpStage, ...]:
        return self._stages


class Workers(Executor):
    """Takes note of what it is given."""

    def __init__(self, *live: WorkerInfo) -> None:
        self.live = list(live)
        self.given: list[tuple[str, WorkItem]] = []

    def start(self) -> None:
        pass

    def workers(self) -> list[WorkerInfo]:
        return self.live

    def submit(self, worker: str, item: WorkItem) -> None:
        self.given.append((worker, item))

    def poll(self, timeout: float) -> list[Event]:
        return []

    def kill(self, worker: str, reason: str, blame: bool = True) -> None:
        raise AssertionError(reason)

    def close(self, now: bool = False) -> None:
        pass

    @property
    def stages(self) -> list[tuple[str, str]]:
        """Workers and the stages that they were given."""
        return [(worker, item.stage) for worker, item in self.given]


class Office:
    """A driver whose rounds are taken one by one; ``dropped`` are the jobs that it recorded."""

    def __init__(self, ledger: Ledger, *live: WorkerInfo) -> None:
        spec = {
            "name": "office",
            "models": [{"tiny-lm/text-d64": {"batch": 12}}],
            "methods": [{"dgc": {"workers": 2, "density": 0.01}}],
            "tasks": ["bits-per-byte"],
            "search": {"sampler": "grid"},
            "limits": {"retries": 1},
        }
        sweep = resolve(spec)
        self.workers = Workers(*live)
        self.driver = Driver(sweep, ledger, self.workers, make_proposer(sweep.space, "grid"), NullTracker(), Quiet())
        self.queue, self.round = self.driver._queue, self.driver._dispatch
        self.dropped: list[str] = []
        self.driver._record = lambda job, outcome, attempt: self.dropped.append(job.id)  # type: ignore[method-assign]

    def add(self, number: int, *stages: MadeUpStage) -> Job:
        job = Job(model="m", methods=(MethodSpec("x", (("n", number),)),), task="t", repeat=0, seed=0)
        self.queue.add(job, MadeUpJob(*stages))  # type: ignore[arg-type]
        return job

    def end(self, stage: str, status: str = "ok", seconds: float = 0.0) -> None:
        """The worker that computes a stage is done with it."""
        name, found = next((w, i) for w, i in self.workers.given if i.stage == stage)
        result: dict[str, Any] = {"ok": status == "ok", "status": status, "seconds": seconds}
        self.driver._on_done(Done(name, found, {**result, "error_type": "X", "error_text": "no"}))

    def lose(self, name: str, gone: frozenset[str] = frozenset()) -> None:
        """A worker is lost, and another takes its place in the next round."""
        self.driver._on_lost(Lost(name, tuple(self.driver._slots[name].items), "gone", False, gone))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(Store.open(str(tmp_path)), "office").lock()
    yield found
    found.unlock()


def test_a_stage_goes_to_a_host_that_has_its_slots(ledger: Ledger) -> None:
    """A small host asks first; while a host with eight slots is there, it gets what fits, and nothing else."""
    office = Office(ledger, worker("a0", "small"), *(worker(f"b{n}", "large") for n in range(8)))
    for number in range(2):
        office.add(number, MadeUpStage("wide", slots=8))
    office.add(2, MadeUpStage("narrow"))
    office.round()
    assert office.workers.stages == [("a0", "narrow"), ("b0", "wide")]


def test_seconds_of_a_stage_count_for_all_its_slots(ledger: Ledger) -> None:
    office = Office(ledger, *(worker(f"b{n}", "large") for n in range(3)))
    office.driver._display.title = lambda item: item.stage  # type: ignore[method-assign]
    office.add(0, MadeUpStage("wide", slots=3))
    office.round()
    office.end("wide", seconds=2.0)
    assert office.driver._summary.stage_seconds == 6.0


def test_without_a_large_host_the_largest_takes_it(ledger: Ledger) -> None:
    office = Office(ledger, worker("a0", "small"), *(worker(f"b{n}", "larger") for n in range(3)))
    office.add(0, MadeUpStage("wide", slots=8))
    office.round()
    assert office.workers.stages == [("b0", "wide")]


def test_nothing_is_queued_behind_what_runs_on_a_host_where_a_claim_waits(ledger: Ledger) -> None:
    """Jobs that come one after the other must not keep the last worker busy for ever."""
    office = Office(ledger, worker("a"), worker("b"), worker("c", "n1"))
    first = [office.add(0), office.add(1, MadeUpStage("crowd", slots=2))][0]
    office.round()
    assert [(name, item.kind) for name, item in office.workers.given] == [("a", "job")]
    assert office.driver._places.taken("b")
    later = [office.add(number) for number in (2, 3, 4)]
    office.round()
    assert [name for name, item in office.workers.given if item.job in later] == ["c", "c"]
    assert office.workers.given[0][1].job == first


def crowd_waits(office: Office) -> None:
    """``other`` runs on a; ``crowd``, which asks for two slots, is claimed by b and waits for a."""
    office.add(1, MadeUpStage("other"), MadeUpStage("crowd", slots=2))
    office.round()
    assert office.workers.stages == [("a", "other")]
    assert office.driver._places.taken("b")


def test_a_claim_ends_with_the_last_job_that_needs_it(ledger: Ledger) -> None:
    office = Office(ledger, worker("a"), worker("b"))
    crowd_waits(office)
    office.end("other", "infeasible")
    assert len(office.dropped) == 1
    office.round()
    assert office.workers.stages == [("a", "other")]  # not crowd: nobody needs it
    assert not office.driver._places.taken("b")
    assert (len(office.queue), office.queue.stages_left) == (0, 0)
    office.add(2, MadeUpStage("crowd", slots=2))
    office.round()
    assert office.workers.stages[1:] == [("a", "crowd")]  # until somebody does


def test_a_claim_ends_when_all_that_waits_is_dropped(ledger: Ledger) -> None:
    office = Office(ledger, worker("a"), worker("b"))
    crowd_waits(office)
    office.queue.drop_waiting()
    office.end("other")
    office.round()
    assert office.workers.stages == [("a", "other")]
    assert office.queue.stages_left == 0


def test_losing_a_worker_that_waits_counts_against_nothing(ledger: Ledger) -> None:
    """As often as it may happen: the stage keeps all its attempts, and is not held to be what kills workers."""
    office = Office(ledger, worker("a"), worker("b"))
    crowd_waits(office)
    for _ in range(14):
        office.lose("b")
        office.round()
        assert office.driver._places.taken("b")
    state = office.queue._stages["crowd"]
    assert (state.attempt, state.misfortunes) == (1, 0)
    office.end("other")
    office.round()
    assert office.workers.stages[1:] == [("b", "crowd")]
    office.lose("b")  # the first time that it ran
    assert office.queue.stage_attempts_left("crowd")
    assert not office.dropped


def test_a_claim_goes_back_when_what_it_needs_is_lost(ledger: Ledger) -> None:
    """``dep`` was on a third worker's host only: it is computed again, alone, and the claim is made anew after that."""
    office = Office(ledger, worker("a"), worker("b"), worker("c", "n1"))
    dep = MadeUpStage("dep")
    office.queue.stages_exist({"dep"})
    office.add(1, MadeUpStage("long"))
    office.add(2, dep, MadeUpStage("crowd", dep, slots=2))
    office.round()
    assert office.workers.stages == [("a", "long")]
    assert office.driver._places.taken("b")
    office.workers.live.pop()
    office.lose("c", gone=frozenset({"dep"}))
    office.round()
    assert office.workers.stages[1:] == [("b", "dep")]
    assert not office.driver._places.taken("b")
    office.end("dep")
    office.round()
    office.end("long")
    office.round()
    assert office.workers.stages[2:3] == [("b", "crowd")]
    assert office.workers.given[2][1].needs == ("dep",)
