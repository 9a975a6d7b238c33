"""A real MLflow server that is killed in the middle of a sweep, comes back, or stays away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Lines, run_local, scores, toy
from mlflow import MlflowClient

pytestmark = pytest.mark.usefixtures("toy_parts")


class Server:
    """An MLflow server on a free port of loopback, with a database that outlives it."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder, self.database = folder, database
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.folder / "artifacts"),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
        )  # fmt: skip
        log.close()

    def wait(self, seconds: float = 120) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)

    def kill(self) -> None:
        """Power off."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    database = folder / "mlflow.db"
    database.write_bytes(empty_mlflow.read_bytes())
    made = Server(folder, database)
    made.start()
    yield made
    made.kill()


class Acting(Lines):
    """Does something when the given number of jobs has got its row."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self.actions = actions
        self.done = 0

    def line(self, text: str) -> None:
        super().line(text)
        if " ok on " in text:
            self.done += 1
            if self.done in self.actions:
                self.actions[self.done]()


def check(server: Server, opened: Any, name: str) -> None:
    """As many finished nested runs as rows, one parent, none running; values equal. Read from the database."""
    client = MlflowClient(f"sqlite:///{server.database}")
    runs = list(client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000))
    rows = {r["job_id"]: r for r in opened.results().to_pylist()}
    parents = [r for r in runs if "isoflop.parent" in r.data.tags]
    nested = [r for r in runs if "isoflop.job_id" in r.data.tags]
    assert len(parents) == 1
    assert len(runs) == len(rows) + 1
    assert sorted(r.data.tags["isoflop.job_id"] for r in nested) == sorted(rows)
    assert {r.info.status for r in runs} == {"FINISHED"}
    for run in nested:
        row = rows[run.data.tags["isoflop.job_id"]]
        assert run.data.metrics["error"] == pytest.approx(row["error"], abs=1e-12)
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id


def sweep(name: str) -> dict[str, Any]:
    return toy(name=name, tasks=[{"toy-task": {"seconds": 0.05}}, {"toy-other": {"seconds": 0.05}}])


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(tmp_path: Path, server: Server) -> None:
    """Jobs go on while it is down: the server starts again only when the last one has its row."""
    if server.process is None:
        server.start()
    server.wait()
    progress = Acting({4: server.kill, 12: server.start})
    opened = run_local(sweep("back"), tmp_path, progress, tracking_uri=server.uri)
    assert opened.summary.ok == 12
    assert not any("does not show everything" in line for line in progress.lines)
    backlogs = [s["backlog"] for s in progress.snapshots]
    assert max(backlogs) >= 4  # rows waited while jobs went on
    assert any(s["problem"].startswith(f"MLflow at {server.uri}") for s in progress.snapshots)
    check(server, opened, "back")
    assert scores(opened.results()) == scores(run_local(sweep("back"), tmp_path / "undisturbed").results())


def test_a_server_that_stays_away_is_caught_up_with_later(tmp_path: Path, server: Server) -> None:
    if server.process is None:
        server.start()
    server.wait()
    progress = Acting({4: server.kill})
    opened = run_local(sweep("away"), tmp_path, progress, tracking_uri=server.uri, track_wait=1.0)
    assert opened.summary.ok == 12
    told = [line for line in progress.lines if "does not show everything" in line]
    assert len(told) == 1
    assert server.uri in told[0]
    assert "`isoflop resume` will bring the rest" in told[0]
    missing = int(told[0].split("(")[1].split(" rows")[0])
    assert 8 <= missing <= 12  # whatever was pushed after the kill, at least

    server.start()
    server.wait()
    again = run_local(sweep("away"), tmp_path, tracking_uri=server.uri)
    assert again.summary.ran == 0
    check(server, again, "away")


def test_a_resume_that_finds_no_server_says_how_many_rows_are_missing(tmp_path: Path) -> None:
    first = run_local(sweep("later"), tmp_path, tracking_uri="none")
    assert first.summary.ok == 12
    progress = Lines()
    again = run_local(sweep("later"), tmp_path, progress, tracking_uri="http://127.0.0.1:9", track_wait=0.5)
    assert again.summary.ran == 0
    assert [line for line in progress.lines if "(12 rows; MLflow at http://127.0.0.1:9" in line]


def test_ctrl_c_while_waiting_for_mlflow_ends_the_waiting_and_nothing_else(tmp_path: Path) -> None:
    class Impatient(Lines):
        def line(self, text: str) -> None:
            super().line(text)
            if text.startswith("waiting for MLflow"):
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    progress = Impatient()
    begin = time.monotonic()
    opened = run_local(sweep("impatient"), tmp_path, progress, tracking_uri="http://127.0.0.1:9", track_wait=600.0)
    assert time.monotonic() - begin < 120
    assert opened.summary.ok == 12
    assert not opened.summary.interrupted
    assert "not waiting for MLflow any longer" in progress.lines
