"""Stages of several processes get their slots: who stands aside, and that nothing runs beside them or waits for ever."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.execute import WorkerInfo, WorkItem
from isoflop.execute.simulated import Rates
from isoflop.jobs import Job, MethodSpec
from isoflop.sweep.places import Places
from isoflop.sweep.resolve import resolve
from isoflop.sweep.simulate import simulate as run_simulated

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
