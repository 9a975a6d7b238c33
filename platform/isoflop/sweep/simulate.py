"""Runs a sweep's own driver on a simulated cluster: how long it would take, how busy the GPUs would be."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

from isoflop.core.hashing import derive_seed
from isoflop.execute.simulated import Rates, SimulatedExecutor
from isoflop.jobs import Job
from isoflop.ledger import Ledger, Store
from isoflop.sweep.driver import Driver
from isoflop.sweep.progress import Progress, Quiet
from isoflop.sweep.resolved import Sweep
from isoflop.sweep.searching import make_proposer_for
from isoflop.track import NullTracker


@dataclass
class Simulation:
    """What a simulated run came to.

    Attributes:
        makespan: simulated seconds from start to end.
        utilisation: busy share of all slots over the makespan.
        affinity: share of jobs that found their model warm.
        driver_ms: real CPU milliseconds of the driver per job.
    """

    jobs: int
    failed: int
    lost_nodes: int
    slots: int
    makespan: float
    utilisation: float
    affinity: float
    loads: int
    stages: int
    driver_ms: float
    real_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def simulate(
    sweep: Sweep, nodes: int, slots: int, rates: Rates, seed: int = 0, progress: Progress | None = None
) -> Simulation:
    """Simulate a sweep from nothing; touches neither its store nor any cluster.

    Args:
        nodes, slots: of the cluster; slots per node.
    """
    spec = sweep.spec
    executor = SimulatedExecutor(nodes, slots, rates, _score, seed)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Store.open(folder), spec.name).lock()
        executor.start()
        proposer = make_proposer_for(sweep, pruned=False)
        cpu, real = time.process_time(), time.monotonic()
        summary = Driver(
            sweep, ledger, executor, proposer, NullTracker(), progress or Quiet(), clock=executor.clock
        ).run()
        cpu, real = time.process_time() - cpu, time.monotonic() - real
        ledger.unlock()
    return Simulation(
        jobs=summary.ran,
        failed=summary.failed,
        lost_nodes=executor.losses,
        slots=nodes * slots,
        makespan=summary.seconds,
        utilisation=executor.busy / max(1e-9, summary.seconds * nodes * slots),
        affinity=summary.affinity,
        loads=executor.loads,
        stages=summary.stages,
        driver_ms=1000 * cpu / max(1, summary.ran),
        real_seconds=real,
    )


def _score(job: Job) -> float:
    """An error that depends on nothing but the job: simulations are about time, not about quality."""
    return derive_seed(job.id) / 2**31
