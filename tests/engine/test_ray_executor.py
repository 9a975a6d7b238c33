"""The same sweeps on Ray: same rows, and a cluster that survives what jobs do to it. One Ray for the whole session."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.compute as pc
import pytest
from helpers import Lines, one_bad, run_local, scores, toy

import isoflop
from isoflop.core.errors import UserError
from isoflop.testing import executors as executor_suite

pytestmark = pytest.mark.usefixtures("toy_parts", "cluster")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A private Ray on loopback with two CPUs."""
    import ray

    from isoflop.execute.ray_node import start_private_ray

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    start_private_ray(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    patch.undo()


def run_ray(given: Any, tmp_path: Path, progress: Any = None, **options: Any) -> Any:
    chosen = {
        "executor": "ray",
        "tracking_uri": "none",
        "store": str(tmp_path / "store"),
        "cache_dir": tmp_path / "cache",
        **options,
    }
    return isoflop.run(given, progress=progress, **chosen)


def test_ray_listens_on_loopback_only(children: Callable[[], set[int]]) -> None:
    sockets = set()
    for pid in children():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(link))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: listening
                addresses.add(fields[1].split(":")[0])
    assert addresses
    assert all(a == "0100007F" or a.endswith("FFFF00000100007F") for a in addresses), addresses


def test_rows_and_scores_equal_those_of_the_local_executor(tmp_path: Path, toy_parts: ModuleType) -> None:
    on_ray = run_ray(toy(), tmp_path / "ray")
    assert on_ray.summary.ok == 12
    assert scores(on_ray.results()) == scores(run_local(toy(), tmp_path / "local").results())
    stages = toy_parts.log_lines(tmp_path / "ray" / "cache", "stage")
    assert len(stages) == len(set(stages)) == 3  # once on the cluster, though two workers wanted them
    loads = toy_parts.log_lines(tmp_path / "ray" / "cache", "load")
    assert len(loads) <= 4
    assert run_ray(toy(), tmp_path / "ray").summary.ran == 0


def test_misbehaving_jobs_are_quarantined_and_the_sweep_goes_on(tmp_path: Path) -> None:
    """All in one sweep, with good jobs between them; the bad ones get as many attempts as the limits say."""
    failing = ["raise", "unpicklable", "unprintable", "nan", "sysexit", "panic", "keyboard", "type"]
    how = [*failing, "exit", "once-exit", "fine"]
    spec = toy(
        models=["toy/s"],
        tasks=["toy-task"],
        methods=[{"toy-bad": {"how": how}}, {"toy-tokens": {"tokens": [1, 2, 4, 8, 16, 32]}}],
    )
    opened = run_ray(spec, tmp_path)
    rows = {(_how(r) or r["V"]): r for r in opened.results().to_pylist()}
    assert len(rows) == opened.results().num_rows == 17
    for name in ("exit", *failing):
        assert rows[name]["status"] == "failed", name
        assert rows[name]["attempt"] == (1 if name == "type" else 2), name
        assert rows[name]["error_type"]
    assert rows["exit"]["error_type"] == "WorkerLost"
    assert rows["once-exit"]["status"] == "ok"
    assert opened.summary.ok == 8
    # A result that a worker has just sent may be lost with it: its job runs again, but is not taken for the killer.
    innocent = [row for name, row in rows.items() if name == "fine" or not _how(row)]
    assert {(row["status"], row["attempt"]) for row in innocent} == {("ok", 1)}
    again = run_ray(spec, tmp_path)
    assert again.summary.ran == 0


def _how(row: dict[str, Any]) -> str:
    found = re.search(r'"how": "([^"]+)"', row["knobs"])
    return found[1] if found else ""


def test_a_job_that_hangs_is_ended_by_its_deadline(tmp_path: Path) -> None:
    opened = run_ray(one_bad("hang", models=["toy/s"], limits={"timeout": 2, "retries": 0}), tmp_path)
    failed = opened.results().filter(pc.equal(opened.results()["status"], "failed")).to_pylist()
    assert (opened.summary.ok, opened.summary.failed) == (1, 1)
    assert "deadline of 2 s" in failed[0]["error_text"]


def test_a_stage_that_hangs_is_ended_by_its_own_deadline(tmp_path: Path) -> None:
    models = ["toy/s", {"toy/m": {"fail": "hang"}}]
    opened = run_ray(toy(models=models, limits={"stage_timeout": 2, "retries": 0}), tmp_path)
    assert (opened.summary.ok, opened.summary.failed) == (6, 6)


def test_a_stage_that_kills_its_worker(tmp_path: Path) -> None:
    models = ["toy/s", {"toy/m": {"fail": "exit"}}, {"toy/l": {"fail": "once-exit"}}]
    opened = run_ray(toy(models=models), tmp_path)
    assert (opened.summary.ok, opened.summary.failed) == (12, 6)


def test_a_leak_ends_in_an_error_and_harms_no_other_job(tmp_path: Path) -> None:
    spec = toy(
        models=["toy/s"],
        tasks=["toy-task"],
        methods=[{"toy-bad": {"how": "leak"}}, {"toy-tokens": {"tokens": [1, 2, 4, 8]}}],
        resources={"memory": "1GiB"},
    )
    opened = run_ray(spec, tmp_path, workers=1)
    assert opened.summary.ok == 4
    bad = [r for r in opened.results().to_pylist() if r["method"] == "toy-bad"]
    assert bad[0]["status"] in ("failed", "infeasible")
    assert bad[0]["error_type"] == "MemoryError"


def test_killed_workers_cost_nothing_but_time(tmp_path: Path, toy_parts: ModuleType) -> None:
    """kill -9 of whichever process runs a job, three times; retries are for jobs, so each kill is blamed on a job once."""
    spec = toy(tasks=[{"toy-task": {"seconds": 0.2}}, "toy-other"], limits={"retries": 3})
    killed: list[int] = []

    def killer() -> None:
        while len(killed) < 3:
            time.sleep(0.3)
            lines = toy_parts.log_lines(tmp_path / "cache", "eval")
            pids = [int(line.rsplit(" ", 1)[1]) for line in lines]
            for pid in reversed(pids):
                if pid not in killed:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
                    break

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    lines = Lines()
    opened = run_ray(spec, tmp_path, lines)
    thread.join(5)
    assert opened.summary.ok == 12
    assert opened.results().num_rows == 12 == len(set(opened.results()["job_id"].to_pylist()))
    assert killed
    assert any("lost" in line for line in lines.lines)
    expected = scores(run_local(spec, tmp_path / "local").results())
    assert scores(opened.results()) == expected


def test_pruning_reaches_jobs_on_other_processes(tmp_path: Path) -> None:
    spec = toy(
        models=["toy/m"],
        # long enough that word of what to stop comes in time on a busy machine, too; only the first job runs to its end
        tasks=[{"toy-other": {"shards": 240, "examples": 5, "noise": 0.001, "seconds": 0.05}}],
        methods=[{"toy-tokens": {"tokens": [64, 32, 2, 1]}}],
        search={"sampler": "grid", "pruner": "median", "pruner_options": {"n_startup_trials": 1}},
    )
    opened = run_ray(spec, tmp_path, workers=1)
    rows = {json.loads(r["knobs"])["tokens"]: r for r in opened.results().to_pylist()}
    for tokens in (32, 2, 1):  # 64 runs first, and to its end
        assert rows[tokens]["status"] == "pruned"
        assert len(rows[tokens]["shard_sizes"]) < 240


def test_resources_that_no_node_has_are_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no node of the cluster can ever give one job 1 CPUs, 64 GPUs.*nodes have: 2 CPUs"
    ):
        run_ray(toy(resources={"gpus": 64}), tmp_path)
    with pytest.raises(UserError, match=r"can ever give one job 3 CPUs"):
        run_ray(toy(resources={"cpus": 3}), tmp_path)


def test_a_module_that_only_workers_cannot_import_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text(
        "import os\nif 'ISOFLOP_DRIVER' not in os.environ:\n    raise RuntimeError('not on a worker')\n"
    )
    sweep = tmp_path / "s.yaml"
    sweep.write_text(
        "name: s\nimport: [toy_parts, only_here]\nmodels: [toy/s]\nmethods: [toy-full]\ntasks: [toy-task]\n"
    )
    os.environ["ISOFLOP_DRIVER"] = "1"
    try:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"worker could not start.*not on a worker"):
            run_ray(sweep, tmp_path)
        assert time.monotonic() - began < 60
    finally:
        del os.environ["ISOFLOP_DRIVER"]


def test_modules_beside_the_yaml_reach_the_workers(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(
        "from dataclasses import dataclass\nfrom isoflop.tasks.base import TASKS\nimport toy_parts\n"
        "@TASKS.register('toy-beside')\n@dataclass(frozen=True)\nclass Beside(toy_parts.ToyTask):\n    '''Beside.'''\n"
    )
    sweep = tmp_path / "s.yaml"
    sweep.write_text(
        "name: s\nimport: [toy_parts, beside]\nmodels: [toy/s]\nmethods: [toy-full]\ntasks: [toy-beside]\n"
    )
    try:
        assert run_ray(sweep, tmp_path).summary.ok == 1
    finally:
        from isoflop.tasks.base import TASKS

        TASKS._entries.pop("toy-beside", None)


@pytest.fixture(scope="module")
def executor_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Actors on the module's Ray, whose own processes stay; what an executor must not leave are its actors'."""
    from test_executor_conformance import failing_job, stage_of, toy_job

    from isoflop.execute.base import Resources
    from isoflop.execute.ray_executor import RayExecutor
    from isoflop.testing import ExecutorProbe

    cache = tmp_path_factory.mktemp("suite") / "cache"
    cache.mkdir()
    probe = ExecutorProbe(
        lambda: RayExecutor(Resources(), cache_dir=cache, max_workers=1, imports=("toy_parts",)),
        toy_job,
        failing_job(),
        stage_of(toy_job(0)),
        left=lambda: {pid for pid in executor_suite.descendants() if "RayWorker" in _title(pid)},
    )
    yield probe
    probe.stop(now=True)


def _title(pid: int) -> str:
    """What a process calls itself; an actor's holds the name of its class."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


@pytest.mark.parametrize("check", [check.__name__ for check in executor_suite.CHECKS])
def test_the_executor_keeps_the_contract(check: str, executor_probe: Any) -> None:
    if check == "check_close":  # what it looks for must be there before
        executor_probe.running()
        assert executor_probe.left()
    dict(executor_suite.executor_checks(executor_probe))[check]()
