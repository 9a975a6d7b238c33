"""Parts of Ray that die under a sweep: a private Ray is started again, another ends the sweep in one line; rows stay."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import Lines, run_local, scores, toy
from ray._private import ray_constants
from test_crashes import YAML, Place

import isoflop
from isoflop.core.errors import Unavailable
from isoflop.execute import ray_cluster
from isoflop.execute.ray_cluster import RayCluster, RayDied

pytestmark = pytest.mark.usefixtures("toy_parts")


# without a Ray


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has ended of a private Ray that is none."""
    ended: list[str] = []
    monkeypatch.setattr(ray_cluster, "ended_parts", lambda: list(ended))
    monkeypatch.setattr(ray_cluster, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(RayCluster, "connect", lambda self: setattr(self, "_connected", True))
    monkeypatch.setattr(RayCluster, "close", lambda self: None)
    return ended


def test_a_head_that_does_not_answer_is_given_up(no_ray: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_SILENCE_SECONDS", 0.1)
    never = threading.Event()
    with pytest.raises(RayDied, match="has not answered for 0 s"):
        RayCluster("10.0.0.1:1").ask(never.wait)
    never.set()


def test_a_question_ends_with_the_process_that_should_answer_it(no_ray: list[str]) -> None:
    cluster, never = RayCluster(None), threading.Event()
    threading.Timer(0.1, no_ray.append, ["its gcs_server was killed by SIGKILL"]).start()
    with pytest.raises(RayDied, match="gcs_server was killed by SIGKILL"):
        cluster.ask(never.wait)
    never.set()
    with pytest.raises(RayDied, match="gcs_server"):  # and is not even asked after that
        cluster.ask(lambda: pytest.fail("asked"))


def test_answers_and_errors_come_through(no_ray: list[str]) -> None:
    cluster = RayCluster(None)
    assert cluster.ask(lambda: 3) == 3
    with pytest.raises(KeyError):
        cluster.ask(lambda: {}["a"])
    with pytest.raises(RayDied, match=r"does not answer \(gone"):
        cluster.ask(lambda: (_ for _ in ()).throw(ConnectionError("gone")))


def test_a_host_whose_own_node_is_dead_cannot_go_on(no_ray: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": "own", "Alive": True}, {"NodeID": "other", "Alive": False}]
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: nodes)
    cluster = RayCluster(None)
    cluster._own_node = "own"
    assert [node["NodeID"] for node in cluster.live_nodes()] == ["own"]
    nodes[0]["Alive"] = False
    with pytest.raises(RayDied, match="node of this host is dead"):
        cluster.live_nodes()


def test_a_private_ray_that_dies_again_and_again_is_given_up_with_nothing_done_in_between(no_ray: list[str]) -> None:
    lines: list[str] = []
    cluster = RayCluster(None)
    cluster.tell = lines.append
    cluster.connect()
    for _ in range(3):
        for _ in range(3):
            cluster.restart(RayDied("its raylet was killed by SIGKILL"))
        cluster.progress()
    assert lines == 9 * ["Ray has died: its raylet was killed by SIGKILL; starting it again"]
    for _ in range(3):
        cluster.restart(RayDied("so"))
    with pytest.raises(
        Unavailable, match="died 4 times with no job finished in between, the last time: so; finished jobs are kept"
    ):
        cluster.restart(RayDied("so"))


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_ray_of_somebody_else_is_not_started_again(address: str | None, no_ray: list[str]) -> None:
    """One that runs already in this process, or at an address."""
    cluster = RayCluster(address)
    cluster._connected = address is not None
    with pytest.raises(Unavailable, match=r"has died: gone; finished jobs are kept, run the sweep again") as caught:
        cluster.restart(RayDied("gone"))
    assert caught.value.exit_code == 3


# with one


def kill(of: int, part: str) -> bool:
    """kill -9 of a part of the Ray that a process has started."""
    for child in psutil.Process(of).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if part in command.split(" --")[0] and child.status() != psutil.STATUS_ZOMBIE:
                child.kill()
                return True
        except psutil.Error:
            continue
    return False


def test_a_private_ray_whose_raylet_is_killed_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    spec = toy(tasks=[{"toy-task": {"seconds": 0.1}}, "toy-other"], limits={"retries": 0})

    class Killing(Lines):
        def line(self, text: str) -> None:
            super().line(text)
            if " ok on " in text and sum(" ok on " in line for line in self.lines) == 2:
                assert kill(os.getpid(), "raylet/raylet")

    lines = Killing()
    opened = isoflop.run(
        spec,
        progress=lines,
        store=str(tmp_path / "store"),
        cache_dir=tmp_path / "cache",
        tracking_uri="none",
        workers=1,
    )
    assert opened.summary.ok == 12  # without retries: nobody is blamed
    assert "Ray has died: its raylet was killed by SIGKILL; starting it again" in lines.lines
    assert scores(opened.results()) == scores(run_local(spec, tmp_path / "local").results())


PARTS = ("raylet/raylet", "gcs_server", "DashboardAgent", "RuntimeEnvAgent", "log_monitor")


@pytest.mark.slow
def test_ten_kills_of_parts_of_a_private_ray(tmp_path: Path, empty_mlflow: Path) -> None:
    """Raylet and GCS four times each, and what a raylet does not outlive or nobody needs."""
    text = YAML.replace("0.03", "0.2").replace("[1, 2, 4, 8, 16]", str([t for t in range(1, 17) if t != 13]))
    place = Place(tmp_path / "x", empty_mlflow, text, executor="ray")
    process = place.start("--workers", "2")
    try:
        for part in (*PARTS, *PARTS[:2] * 3)[:10]:
            place.wait_for(" ok on ", process, place.log().count(" ok on ") + 2, seconds=120)
            assert kill(process.pid, part), part
            time.sleep(1)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "state-dump" not in out + err
    assert place.log().count("starting it again") >= 7
    assert place.rows().num_rows == place.history_rows() == 60
    assert set(place.rows()["status"].to_pylist()) == {"ok"}
    place.check_mlflow()


_HEAD = """
import time, ray
from isoflop.execute.ray_node import start_private_ray
start_private_ray(num_cpus=2, log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(1000)
"""


class Head:
    """The head, and only node, of a cluster of somebody else on this host."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HEAD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def run(self, place: Place, killed: Callable[[int], bool], *options: str) -> tuple[int, str, float]:
        """A sweep on it, of which something is killed after two jobs: exit code, standard error, seconds since then."""
        process: Any = place.start("--ray-address", self.address, "--node-ip", "127.0.0.1", *options)
        try:
            place.wait_for(" ok on ", process, 2)
            assert killed(self.process.pid)
            begun = time.monotonic()
            _, err = process.communicate(timeout=120)
            return process.returncode, err, time.monotonic() - begun
        finally:
            process.kill()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")  # or the driver would not look on loopback
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the home of whoever runs the test may hold a token
    found = Head()
    yield found
    processes = psutil.Process(found.process.pid).children(recursive=True)
    found.process.kill()
    found.process.wait()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def kill_with_workers(of: int) -> bool:
    """As when a host is taken away: its raylet, and with it all workers, which nobody is the parent of after that."""
    workers = [
        p for p in psutil.Process(of).children(recursive=True) if " ".join(p.cmdline()).startswith("ray::RayWorker")
    ]
    killed = kill(of, "raylet/raylet")
    for worker in workers:
        worker.kill()
    return killed and bool(workers)


PARTS_OF_OTHERS = [
    (lambda of: kill(of, "gcs_server"), 0.4, " has died: "),  # without which nothing of it can be asked
    (lambda of: kill(of, "raylet/raylet"), 2.0, " has died: the node of this host is dead; "),
    (kill_with_workers, 2.0, " has died: the node of this host is dead; "),
]


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "seconds", "said"), PARTS_OF_OTHERS, ids=["gcs", "raylet", "whole-node"])
def test_a_cluster_of_somebody_else_that_dies_ends_the_sweep_in_one_line(
    killed: Callable[[int], bool], seconds: float, said: str, head: Head, tmp_path: Path
) -> None:
    text = YAML.replace("0.03", f"{seconds}").replace("timeout: 60", "timeout: 60, retries: 0")
    place = Place(tmp_path / "x", None, text, executor="ray")
    code, err, took = head.run(place, killed)
    assert code == 3, err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"isoflop: Ray at {head.address}{said}"), err
    assert "Traceback" not in err
    assert "rpc_client.h" not in err
    assert took < 60  # after that Ray's library would have ended the process
    assert place.rows().num_rows >= 2
    assert set(place.rows()["status"].to_pylist()) == {"ok"}  # nobody is blamed


@pytest.mark.slow
def test_workers_outlive_their_raylet_until_the_head_notices_and_a_sweep_that_ends_before_is_whole(
    head: Head, tmp_path: Path
) -> None:
    """A quarter of a minute: results come from the workers themselves, and count."""
    place = Place(tmp_path / "x", None, YAML.replace("0.03", "0.2"), executor="ray")
    code, err, _ = head.run(place, lambda of: kill(of, "raylet/raylet"))
    assert code == 0, err
    assert place.rows().num_rows == place.history_rows() == 20
    assert set(place.rows()["status"].to_pylist()) == {"ok"}
