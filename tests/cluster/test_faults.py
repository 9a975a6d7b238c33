"""Nodes that die, are cut off, or join while a sweep runs on a cluster; the rows are those of an undisturbed run.

Every node has a stage cache of its own, as hosts without a shared disk have.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from netns import PORT, Host, Network, network, why_not

import isoflop
from isoflop.ledger import Ledger, Store

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
TOY = Path(__file__).parents[1] / "engine" / "toy_parts.py"
# A silent node is given up after some 6 s instead of Ray's minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
SWEEP = """
name: {name}
seed: {seed}
import: [toy_parts]
models: [toy/s, toy/m, toy/l]
methods: [{{toy-tokens: {{tokens: [1, 2, 3, 4, 6, 8, 12, 16, 32, 64]}}}}]
tasks: [{{toy-task: {{shards: 4, seconds: {seconds}}}}}]
limits: {{timeout: 2m, retries: 0}}
"""
JOBS = 30


@dataclass
class Cluster:
    """A head without slots and two nodes with two slots and a cache each."""

    net: Network
    folder: Path

    def cache(self, host: Host) -> Path:
        return self.folder / f"cache{host.index}"

    def have(self, count: int) -> None:
        """Exactly the first ``count`` nodes (the head is one of them) are up and healthy."""
        for host in self.net.hosts:
            node = self.net.nodes.get(host.index)
            if host.index >= count or (node is not None and node.poll() is not None):
                self.net.kill_node(host)
        for host in self.net.hosts[:count]:
            if host.index not in self.net.nodes:
                self.start(host)
        self.net.wait_for(count)

    def start(self, host: Host) -> None:
        cpus = 0 if host.index == 0 else 2
        self.net.start_ray(host, cpus=cpus, gpus=0, health={**HEALTH, "ISOFLOP_CACHE": str(self.cache(host))})

    def stages_computed(self) -> Counter[str]:
        """Key -> how often it was computed, over all nodes."""
        found: Counter[str] = Counter()
        for host in self.net.hosts:
            log = self.cache(host) / "toy.log"
            lines = log.read_text().splitlines() if log.exists() else []
            found.update(line.split()[1] for line in lines if line.startswith("stage "))
        return found


class Running:
    """A sweep that a driver on the head runs."""

    def __init__(self, cluster: Cluster, name: str, seed: int, seconds: float = 0.15) -> None:
        self.cluster, self.name, self.folder = cluster, name, cluster.folder / name
        self.folder.mkdir()
        (self.folder / "toy_parts.py").write_bytes(TOY.read_bytes())
        self.yaml = self.folder / "sweep.yaml"
        self.yaml.write_text(SWEEP.format(name=name, seed=seed, seconds=seconds))
        self.store = self.folder / "store"
        head = cluster.net.hosts[0]
        self.process = head.popen(
            sys.executable, "-m", "isoflop", "run", str(self.yaml), "--json", "--store", str(self.store),
            "--ray-address", f"{head.address}:{PORT}", "--node-ip", head.address, "--tracking-uri", "none",
            env={"ISOFLOP_CACHE": str(cluster.cache(head))},
        )  # fmt: skip

    def log(self) -> str:
        path = self.store / "sweeps" / self.name / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for_rows(self, count: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while self.log().count(" ok on ") < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def finish(self, timeout: float = 240) -> list[dict[str, Any]]:
        """Wait for the end; the rows, after checking that they are those of an undisturbed run on this host alone."""
        try:
            out = self.process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the sweep hangs: {self.log()}\n{self.process.communicate()[0]}")
        assert self.process.returncode == 0, out + self.log()
        assert "Traceback" not in out
        ledger = Ledger(Store.open(str(self.store)), self.name)
        rows = ledger.read().to_pylist()
        assert ledger.history().num_rows == len(rows) == JOBS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", lambda seconds: None)  # what makes its jobs slow; scores do not depend on it
            alone = isoflop.run(
                str(self.yaml),
                executor="local",
                store=str(self.folder / "alone"),
                cache_dir=self.folder / "alone-cache",
                tracking_uri="none",
            )
        assert _essence(rows) == _essence(alone.results().to_pylist())
        return rows

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def _essence(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = ("status", "error", "error_se", "N", "V", "scores", "spec")
    return {r["job_id"]: [r[c] for c in columns] for r in rows}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with network(3) as net:
        yield Cluster(net, tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def run(cluster: Cluster) -> Iterator[Any]:
    """Starts sweeps, and ends what a failed test leaves."""
    started: list[Running] = []

    def start(name: str, **options: Any) -> Running:
        started.append(Running(cluster, name, seed=sum(name.encode()), **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def test_stages_reach_other_nodes_and_are_computed_once(cluster: Cluster, run: Any) -> None:
    cluster.have(3)
    rows = run("stages").finish()
    computed = cluster.stages_computed()
    assert len(computed) == 4  # the base, and the weights of three models
    assert set(computed.values()) == {1}, computed
    # every node evaluated jobs, so every node was sent what the other one had computed
    for host in cluster.net.hosts[1:]:
        assert any(line.startswith("eval") for line in _toy_log(cluster, host)), host
    assert len({r["worker"] for r in rows}) == 4


def test_a_node_that_dies_in_the_middle_of_jobs(cluster: Cluster, run: Any) -> None:
    cluster.have(3)
    sweep = run("dies")
    sweep.wait_for_rows(5)
    cluster.net.kill_node(cluster.net.hosts[2])
    rows = sweep.finish()
    assert {r["status"] for r in rows} == {"ok"}
    assert sweep.log().count(" lost: ") == 2


def test_a_node_that_joins_gets_work(cluster: Cluster, run: Any) -> None:
    cluster.have(2)
    late = cluster.net.hosts[2]
    before = len(_evaluations(cluster, late))
    sweep = run("joins", seconds=1.0)  # long enough for a node to start meanwhile
    sweep.wait_for_rows(3)
    cluster.start(late)
    sweep.finish()
    assert len(_evaluations(cluster, late)) > before


def test_a_node_that_is_cut_off_and_comes_back(cluster: Cluster, run: Any) -> None:
    cluster.have(3)
    victim = cluster.net.hosts[2]
    sweep = run("cutoff", seconds=0.4)
    sweep.wait_for_rows(6)
    cluster.net.cable(victim, up=False)
    try:
        _wait_for(sweep, " lost: ", 2)
    finally:
        cluster.net.cable(victim, up=True)
    done = sweep.log().count(" ok on ")
    assert done < JOBS  # it came back while the sweep went on
    sweep.finish()


def _wait_for(sweep: Running, text: str, times: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while sweep.log().count(text) < times:
        assert sweep.process.poll() is None, sweep.process.communicate()[0]
        assert time.monotonic() < deadline, sweep.log()
        time.sleep(0.05)


def _toy_log(cluster: Cluster, host: Host) -> list[str]:
    path = cluster.cache(host) / "toy.log"
    return path.read_text().splitlines() if path.exists() else []


def _evaluations(cluster: Cluster, host: Host) -> list[str]:
    return [line for line in _toy_log(cluster, host) if line.startswith("eval")]
