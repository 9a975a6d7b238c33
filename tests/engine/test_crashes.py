"""Real processes that are killed, interrupted and started twice; the ledger and MLflow must come out right."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import run_local, scores

pytestmark = pytest.mark.usefixtures("toy_parts", "no_child_survives")

YAML = """
name: crash
import: [toy_parts]
models: [toy/s, toy/m]
methods:
  - toy-tokens: {tokens: [1, 2, 4, 8, 16]}
tasks:
  - toy-task: {seconds: 0.03}
  - toy-other: {seconds: 0.03}
limits: {timeout: 60}
"""


@pytest.fixture
def no_child_survives(children: Callable[[], set[int]]) -> Iterator[None]:
    before = children()
    yield
    deadline = time.monotonic() + 10
    while (left := children() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, [Path(f"/proc/{pid}/cmdline").read_text()[:200] for pid in left if Path(f"/proc/{pid}").exists()]


_WITH_TOYS = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


class Place:
    """A store, a cache and a YAML file in one folder, and the command line on them."""

    def __init__(
        self,
        folder: Path,
        mlflow: Path | None,
        text: str = YAML,
        executor: str = "local",
        store: Path | None = None,
        program: tuple[str, ...] = ("-m", "isoflop"),
    ) -> None:
        self.folder, self.executor, self.program = folder, executor, program
        self.store, self.cache, self.yaml = store or folder / "store", folder / "cache", folder / "sweep.yaml"
        folder.mkdir(parents=True)
        self.tracking = [] if mlflow else ["--tracking-uri", "none"]
        self.store.mkdir(parents=True)
        if mlflow:
            shutil.copy(mlflow, self.store / "mlflow.db")
        self.yaml.write_text(text)

    def start(self, *arguments: str, command: str = "run") -> subprocess.Popen[str]:
        what = [str(self.yaml)] if command == "run" else ["crash"]
        return subprocess.Popen(
            [
                sys.executable,
                *self.program,
                command,
                *what,
                "--store",
                str(self.store),
                "--cache-dir",
                str(self.cache),
                "--executor",
                self.executor,
                *self.tracking,
                *arguments,
            ],
            env={**os.environ, "PYTHONPATH": _WITH_TOYS, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def run(self, *arguments: str, command: str = "run") -> tuple[int, str, str]:
        process = self.start(*arguments, command=command)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def log(self) -> str:
        path = self.store / "sweeps" / "crash" / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, process: subprocess.Popen[str], times: int = 1, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while self.log().count(text) < times:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def rows(self) -> Any:
        from isoflop.ledger import Ledger, Store

        return Ledger(Store.open(str(self.store)), "crash").read()

    def history_rows(self) -> int:
        """Rows ever committed: more than there are jobs when one was counted twice."""
        from isoflop.ledger import Ledger, Store

        return Ledger(Store.open(str(self.store)), "crash").history(["job_id"]).num_rows

    def check_mlflow(self) -> None:
        """As many nested runs as rows, none running, none twice, values equal."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.store / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("crash")
        runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
        parents = [r for r in runs if "isoflop.parent" in r.data.tags]
        nested = {r.data.tags["isoflop.job_id"]: r for r in runs if "isoflop.job_id" in r.data.tags}
        rows = {r["job_id"]: r for r in self.rows().to_pylist()}
        assert len(parents) == 1
        assert len(runs) == len(rows) + 1
        assert set(nested) == set(rows)
        assert {r.info.status for r in runs} <= {"FINISHED", "FAILED"}
        for job_id, run in nested.items():
            row = rows[job_id]
            assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
            assert run.data.metrics["error"] == pytest.approx(row["error"], abs=1e-12)
            assert run.data.params == {
                k: str(v)
                for k, v in {
                    **{c: row[c] for c in ("model", "method", "task", "repeat", "seed")},
                    **json.loads(row["knobs"]),
                }.items()
            }
            history = client.get_metric_history(run.info.run_id, "shard_error")
            assert sorted(m.step for m in history) == list(range(len(row["shard_sizes"])))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = Place(tmp_path_factory.mktemp("undisturbed") / "x", None)
    code, _, err = place.run()
    assert code == 0, err
    return scores(place.rows())


def _yaml_of(jobs: int) -> str:
    """The sweep with so many jobs: 2 models x 2 tasks x numbers of tokens."""
    return YAML.replace("[1, 2, 4, 8, 16]", str([t for t in range(1, 64) if t != 13][: jobs // 4]))


@pytest.mark.parametrize("kills, jobs", [(5, 20), pytest.param(30, 160, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, empty_mlflow: Path, kills: int, jobs: int) -> None:
    """Some while the driver starts, most while it runs jobs."""
    place = Place(tmp_path / "x", empty_mlflow, _yaml_of(jobs))
    rng = random.Random(0)
    kept: dict[str, Any] = {}
    for index in range(kills):
        before = place.log().count(" ok on ")
        process = place.start()
        try:
            if index % 5 == 4:
                time.sleep(rng.random() * 5)
            else:
                place.wait_for(" ok on ", process, before + rng.randint(1, 3))
                time.sleep(rng.random() * 0.3)
        finally:
            process.kill()
            process.communicate()
        now = scores(place.rows())
        assert {job: now.get(job) for job in kept} == kept  # no row lost
        assert place.history_rows() == len(now)  # none doubled
        kept = now
    assert len(kept) < jobs
    code, out, err = place.run("--json")
    assert code == 0, err
    summary = json.loads(out)["summary"]
    assert summary["ran"] + summary["cached"] == jobs
    assert scores(place.rows()) == scores(run_local(place.yaml, tmp_path / "undisturbed").results())
    assert place.history_rows() == jobs
    place.check_mlflow()
    code, out, _ = place.run("--json")
    assert (code, json.loads(out)["summary"]["ran"]) == (0, 0)


# Ends the process at one exact line. The product has no switch for that: this program patches it from outside.
_DIES = """
import os, sys
from isoflop.cli import main
from isoflop.track.tracker import MlflowTracker

where, count = sys.argv[1], int(sys.argv[2])
sys.argv = ["isoflop", *sys.argv[3:]]
seen = 0

def die() -> None:
    global seen
    seen += 1
    if seen == count:
        os._exit(9)

push, rename = MlflowTracker.push, os.rename

def dying_push(self, rows):
    rows = list(rows)
    if rows:
        die()
    push(self, rows)

def dying_rename(source, target):
    ledger = str(target).endswith(".parquet")
    if ledger and where == "before rename":
        die()
    rename(source, target)
    if ledger and where == "after rename":
        die()

if where == "before MLflow":
    MlflowTracker.push = dying_push
os.rename = dying_rename
main()
"""


@pytest.mark.parametrize("where", ["before rename", "after rename", "before MLflow"])
def test_a_kill_at_exactly_this_line_changes_nothing(
    tmp_path: Path, empty_mlflow: Path, undisturbed: dict[str, Any], where: str
) -> None:
    place = Place(tmp_path / "x", empty_mlflow)
    program = tmp_path / "dies.py"
    program.write_text(_DIES)
    for count in (1, 2):
        place.program = (str(program), where, str(count))
        assert place.run()[0] == 9
    kept = scores(place.rows())
    assert place.history_rows() == len(kept) < 20
    assert bool(kept)
    place.program = ("-m", "isoflop")
    code, out, err = place.run("--json")
    assert code == 0, err
    assert json.loads(out)["summary"]["cached"] == len(kept)
    assert scores(place.rows()) == undisturbed
    assert place.history_rows() == 20
    place.check_mlflow()


def test_ctrl_c_once_drains_and_resume_brings_the_rest(
    tmp_path: Path, empty_mlflow: Path, undisturbed: dict[str, Any]
) -> None:
    place = Place(tmp_path / "x", empty_mlflow)
    process = place.start()
    place.wait_for(" ok on ", process, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "isoflop resume crash" in out
    assert "SIGINT: waiting for" in err
    assert 2 <= place.rows().num_rows < 20
    assert place.run(command="resume")[0] == 0
    assert scores(place.rows()) == undisturbed
    place.check_mlflow()


def test_ctrl_c_twice_stops_now(tmp_path: Path) -> None:
    text = YAML.replace("seconds: 0.03", "seconds: 30")
    place = Place(tmp_path / "x", None, text)
    process = place.start()
    place.wait_for("toy-weights", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 15
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped at once" in err


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_ctrl_c_in_a_long_stage_is_told_at_once(tmp_path: Path, executor: str) -> None:
    """Also where the process is busy computing it; with nothing measured there is nothing to tell of laws."""
    text = YAML.replace("models: [toy/s, toy/m]", "models: [toy/m: {seconds: 8}]") + "laws: [{law: product}]\n"
    place = Place(
        tmp_path / "x", None, text.replace("[toy/m: {seconds: 8}]", "[{toy/m: {seconds: 8}}]"), executor=executor
    )
    process = place.start()
    place.wait_for("toy-base of", process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    place.wait_for("SIGINT: waiting for 1 running stage; once more to stop now", process, seconds=5)
    assert time.monotonic() - began < 5
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "no rows" not in out + err
    assert "isoflop resume crash" in out


def test_sigterm_drains_too(tmp_path: Path) -> None:
    place = Place(tmp_path / "x", None)
    process = place.start()
    place.wait_for(" ok on ", process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert 1 <= place.rows().num_rows < 20


def test_a_second_driver_on_the_same_sweep_is_refused_in_one_line(tmp_path: Path) -> None:
    place = Place(tmp_path / "x", None, YAML.replace("seconds: 0.03", "seconds: 0.4"))
    process = place.start()
    try:
        place.wait_for("toy-weights", process)
        code, _, err = place.run()
        assert code == 2
        assert err.count("\n") == 1
        assert f"is being written by process {process.pid}" in err
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_failed_jobs_give_exit_code_one_and_retry_failed_mends_them_in_mlflow_too(
    tmp_path: Path, empty_mlflow: Path
) -> None:
    text = (
        YAML.replace("  - toy-tokens: {tokens: [1, 2, 4, 8, 16]}", "  - toy-full\n  - toy-bad: {how: once-raise}")
        + "\n"
    )
    place = Place(tmp_path / "x", empty_mlflow, text.replace("limits: {timeout: 60}", "limits: {retries: 0}"))
    code, out, err = place.run()
    assert code == 1, err
    assert "isoflop resume crash --retry-failed" in out
    code, _, err = place.run("--retry-failed", command="resume")
    assert code == 0, err
    place.check_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place.store / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("crash").experiment_id])
    assert all("isoflop.error" not in r.data.tags for r in runs)
    assert {r.data.tags.get("isoflop.status", "ok") for r in runs} == {"ok"}


def test_on_ray_a_killed_driver_leaves_no_process_and_ctrl_c_drains(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    place = Place(tmp_path / "x", None, executor="ray")
    process = place.start("--workers", "2")
    place.wait_for(" ok on ", process, 3)
    process.kill()
    process.communicate()
    process = place.start("--workers", "2")
    done = place.log().count(" ok on ")
    place.wait_for(" ok on ", process, done + 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert place.run("--workers", "2")[0] == 0
    assert scores(place.rows()) == undisturbed
