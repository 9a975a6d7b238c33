"""Tests in several processes: each runs once, in the worker of its unit, and no worker waits for what never comes."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

sharing = pytest.importorskip("sharing", reason="needs pytest-xdist")


class Worker:
    """A worker as pytest-xdist has it: begins a test once it has the next one in hand, or knows that there is none."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.queue: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    @property
    def can_begin(self) -> bool:
        return len(self.queue) >= 2 or (self.shutting_down and bool(self.queue))

    @property
    def ended(self) -> bool:
        return self.shutting_down and not self.queue


def names(rng: random.Random) -> list[str]:
    """Test ids: files of one test to many, some in folders that stay together."""
    files = [f"tests/{rng.choice(['lm', 'vit', 'laws', 'sparsity', 'cluster'])}/test_{i}.py" for i in range(12)]
    return [f"{file}::test_{n}" for file in sorted(files) for n in range(rng.choice([1, 1, 2, 3, 9]))]


def run(ids: list[str], workers: int, rng: random.Random, crashes: int) -> tuple[list[tuple[str, str]], set[str]]:
    """Let the scheduler hand everything out; (test, worker) in order, and the tests that crashed their worker."""
    config = SimpleNamespace(
        option=SimpleNamespace(loadscopereorder=False), getvalue=lambda name: ["popen"] * workers,
        hook=None, rootpath=None,
    )  # fmt: skip
    units = sharing.Units.__new__(sharing.Units)
    units.__dict__.update(
        numnodes=workers, collection=None, workqueue=sharing.LoadScopeScheduling.__init__.__globals__["OrderedDict"](),
        assigned_work={}, registered_collections={}, log=lambda *_: None, config=config,
    )  # fmt: skip
    alive: list[Any] = []

    def join() -> None:
        alive.append(Worker(f"gw{len(units.registered_collections)}"))
        units.add_node(alive[-1])
        units.add_node_collection(alive[-1], ids)

    for _ in range(workers):
        join()
    units.schedule()
    ran, crashed = [], set()
    while able := [w for w in alive if w.can_begin]:
        worker = rng.choice(able)
        index = worker.queue.pop(0)
        if crashes and rng.random() < 0.2:
            crashes -= 1
            alive.remove(worker)
            crashed.add(units.remove_node(worker))
            assert ids[index] in crashed
            join()
            units.schedule()
            continue
        ran.append((ids[index], worker.gateway.id))
        units.mark_test_complete(worker, index)
    assert all(w.ended for w in alive), "a worker waits for ever"
    return ran, crashed


@pytest.mark.parametrize("crashes", [0, 3])
def test_every_test_runs_once_and_no_worker_is_left_waiting(crashes: int) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        ids = names(rng)
        ran, crashed = run(ids, rng.choice([1, 2, 3]), rng, crashes)
        done = Counter(test for test, _ in ran)
        assert set(done.values()) <= {1}, seed
        assert set(done) | crashed == set(ids), seed
        if not crashes:  # what stays together stayed in one worker
            homes: dict[str, set[str]] = {}
            for test, worker in ran:
                homes.setdefault(sharing.unit_of(test), set()).add(worker)
            assert all(len(workers) == 1 for workers in homes.values()), seed
