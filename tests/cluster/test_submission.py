"""`isoflop submit` to a real Ray head with dashboard and token, on loopback. Nothing of it needs root."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isoflop.ledger import Ledger, Store

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
TOY = Path(__file__).parents[1] / "engine" / "toy_parts.py"
SWEEP = """
name: {name}
import: [toy_parts, witness]
models: [toy/s, toy/m]
methods: [{{toy-tokens: {{tokens: [1, 4, 16]}}}}]
tasks: [{{{task}: {{shards: 1, seconds: {seconds}}}}}]
"""
# Where the parts of a sweep are imported from, told by the driver and by every worker.
WITNESS = """
import os, isoflop
open(os.path.join({folder!r}, f"witness-{{os.getpid()}}"), "w").write(isoflop.__file__)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass
class Head:
    """A head node, and the environment of somebody who has its token."""

    address: str
    env: dict[str, str]

    def submit(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "isoflop", "submit", "--address", self.address, *arguments],
            capture_output=True, text=True, timeout=240, env={**self.env, **env},
        )  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="isohead", dir="/tmp"))  # Ray's sockets need short paths
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    port, dashboard, agent, agent_grpc, metrics = free_ports(5)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps all of it on loopback
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "ISOFLOP_CACHE": str(folder / "cache"),
        "ISOFLOP_STORE": str(folder / "store"),
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2",
        "--disable-usage-stats", f"--temp-dir={folder / 'ray'}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        node = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "log").read_text(errors="replace"):
            assert node.poll() is None, (folder / "log").read_text(errors="replace")
            assert time.monotonic() < deadline, "the head node did not start"
            time.sleep(0.5)
        yield Head(f"http://127.0.0.1:{dashboard}", env)
    finally:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def write_sweep(folder: Path, name: str, seconds: float = 0.0, task: str = "toy-task") -> Path:
    shutil.copy(TOY, folder / "toy_parts.py")
    (folder / "witness.py").write_text(WITNESS.format(folder=str(folder)))
    (folder / "sweep.yaml").write_text(SWEEP.format(name=name, seconds=seconds, task=task))
    return folder / "sweep.yaml"


def rows(store: Path, name: str) -> list[dict[str, Any]]:
    return Ledger(Store.open(str(store)), name).read().to_pylist()


def test_a_sweep_runs_on_the_head_with_the_code_that_was_sent(head: Head, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "sent")
    done = head.submit(str(sweep), "--store", str(tmp_path / "store"), "--tracking-uri", "none", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["status"], said["exit_code"], said["address"]) == ("SUCCEEDED", 0, head.address)
    assert "sent: 6 jobs" in done.stderr  # what the job printed
    assert [r["status"] for r in rows(tmp_path / "store", "sent")] == ["ok"] * 6
    origins = {p.read_text() for p in tmp_path.glob("witness-*")}
    assert len(list(tmp_path.glob("witness-*"))) >= 2  # driver and workers
    assert all("py_modules_files" in o for o in origins), origins


READS = """
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
import numpy as np
from isoflop.core.knobs import Knob
from isoflop.tasks.base import TASKS, Shard
from toy_parts import ToyTask

@TASKS.register("reads")
@dataclass(frozen=True, kw_only=True)
class Reads(ToyTask):
    place: Annotated[str, Knob(path=True, doc="file")] = ""

    def content(self):
        return Path(self.place).read_text()

    def evaluate(self, model, ctx, seed):
        yield Shard(np.array([1]), np.array([float(Path(self.place).read_text())]))
"""


def test_data_beside_the_yaml_reach_the_workers(head: Head, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "reading", task="toy-task")
    (tmp_path / "reads.py").write_text(READS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "value.txt").write_text("0.25")
    text = sweep.read_text().replace("import: [toy_parts", "import: [toy_parts, reads")
    sweep.write_text(text.replace("toy-task: {shards: 1, seconds: 0.0}", "reads: {place: data/value.txt}"))
    done = head.submit(str(sweep), "--store", str(tmp_path / "store"), "--tracking-uri", "none", "--json")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "store", "reading")
    assert [(r["status"], r["error"]) for r in found] == [("ok", 0.25)] * 6


def test_without_code_the_clusters_own_is_used_and_rows_are_found_again(head: Head, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "own")
    options = (str(sweep), "--store", str(tmp_path / "store"), "--tracking-uri", "none", "--no-code")
    assert head.submit(*options).returncode == 0
    assert not [p for p in tmp_path.glob("witness-*") if "py_modules_files" in p.read_text()]
    again = head.submit(*options)
    assert again.returncode == 0
    assert "6 from before" in again.stdout
    assert len(rows(tmp_path / "store", "own")) == 6


def test_a_mistake_that_only_the_head_can_see_gives_its_line_and_its_exit_code(head: Head, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "wrong", task="toy-tusk")
    done = head.submit(str(sweep), "--store", str(tmp_path / "store"), "--tracking-uri", "none")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sweep.yaml" in done.stdout
    assert "did you mean 'toy-task'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_submit_ask_stop_and_go_on(head: Head, tmp_path: Path) -> None:
    store = tmp_path / "store"
    sweep = write_sweep(tmp_path, "stopped", seconds=8.0)
    options = (str(sweep), "--store", str(store), "--tracking-uri", "none")
    done = head.submit(*options, "--no-follow", "--submission-id", "mine", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == "mine"
    taken = head.submit(*options, "--no-follow", "--submission-id", "mine")
    assert taken.returncode == 2
    assert taken.stderr.count("\n") == 1, taken.stderr
    near = head.submit("--status", "mime")
    assert near.returncode == 2
    assert "did you mean 'mine'" in near.stderr
    deadline = time.monotonic() + 90
    while not (store / "sweeps" / "stopped").exists() or not rows(store, "stopped"):
        assert time.monotonic() < deadline, head.submit("--status", "mine").stderr
        time.sleep(0.5)
    assert json.loads(head.submit("--status", "mine", "--json").stdout)["status"] == "RUNNING"
    assert head.submit("--stop", "mine").returncode == 0
    while json.loads(head.submit("--status", "mine", "--json").stdout)["status"] == "RUNNING":
        assert time.monotonic() < deadline + 60
    kept = rows(store, "stopped")
    assert head.submit(*options).returncode == 0
    after = rows(store, "stopped")
    assert len(after) == 6 == len({r["job_id"] for r in after})
    assert {r["job_id"]: r["finished"] for r in kept}.items() <= {r["job_id"]: r["finished"] for r in after}.items()  # fmt: skip


def test_somebody_without_the_token(head: Head, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "stranger")
    done = head.submit(str(sweep), RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "wants a token" in done.stderr
    other = head.submit(str(sweep), RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert other.returncode == 2
    assert "refuses this token" in other.stderr
