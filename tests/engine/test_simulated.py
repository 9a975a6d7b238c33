"""The driver on simulated clusters: everything is run once, time adds up, lost nodes cost what they held."""

from __future__ import annotations

import pytest

from isoflop.execute.simulated import Rates
from isoflop.sweep.resolve import resolve
from isoflop.sweep.simulate import Simulation, simulate

JOBS = 400


def run(rates: Rates, nodes: int = 5, slots: int = 4, seed: int = 0) -> Simulation:
    spec = {
        "name": "sim",
        "import": ["isoflop.bench.parts"],
        "models": ["bench/noop", "bench/big"],
        "methods": [{"bench-knobs": {"x": {}, "y": {}}}],
        "tasks": ["bench-noop"],
        "search": {"sampler": "random"},
        "budget": {"trials": JOBS},
    }
    return simulate(resolve(spec), nodes, slots, rates, seed)


def test_without_spread_the_makespan_is_the_work_over_the_slots() -> None:
    found = run(Rates(job=60.0, load=0.0, stage=60.0, spread=0.0))
    assert found.jobs == JOBS
    assert found.makespan == pytest.approx(60 * JOBS / 20, rel=0.1)
    assert found.utilisation == pytest.approx(1.0, abs=0.1)
    assert found.affinity > 0.8


def test_lost_nodes_and_failures_lose_no_job_and_cost_little() -> None:
    calm = run(Rates(spread=0.3))
    stormy = run(Rates(spread=0.3, node_hours=1.0, failure=0.02))
    assert stormy.lost_nodes > 0
    assert stormy.jobs == JOBS
    assert calm.makespan < stormy.makespan < 2 * calm.makespan


def test_a_simulation_is_reproducible() -> None:
    first, second = run(Rates(node_hours=2.0), seed=3), run(Rates(node_hours=2.0), seed=3)
    real = {"driver_ms", "real_seconds"}
    assert {k: v for k, v in first.to_dict().items() if k not in real} == {
        k: v for k, v in second.to_dict().items() if k not in real
    }
