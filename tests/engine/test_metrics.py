"""A sweep's figures as Prometheus sees them: from a snapshot to the endpoint of a real Ray node."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Lines, toy

import isoflop
from isoflop.sweep.metrics import MetricsProgress
from isoflop.sweep.progress import Snapshot


class Recorder:
    """Stands for SweepMetrics."""

    is_ready = True
    made = 0

    def __init__(self, sweep: str) -> None:
        type(self).made += 1
        self.values: dict[str, float] = {}
        self.sent = 0

    @staticmethod
    def ready() -> bool:
        return Recorder.is_ready

    def gauge(self, name: str, value: float) -> None:
        self.values[name] = value
        self.sent += name == "isoflop_jobs_running"

    def total(self, name: str, value: float, status: str = "") -> None:
        self.values[f"{name}{{{status}}}" if status else name] = value


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr("isoflop.execute.metrics.SweepMetrics", Recorder)
    Recorder.is_ready, Recorder.made = True, 0
    return Recorder


def test_every_figure_of_a_snapshot_is_passed_on(recorder: type[Recorder]) -> None:
    inner = Lines()
    progress = MetricsProgress(inner, "s", True)
    progress.line("hello")
    progress.update(
        Snapshot(total=9, running=2, waiting=3, ok=4, failed=1, infeasible=2, pruned=5, stages_done=6, stages_left=7,
                 warm=8, job_seconds=1.5, backlog=10, doing={"w0": "", "w1": ""})
    )  # fmt: skip
    assert isinstance(progress._metrics, Recorder)
    assert progress._metrics.values == {
        "isoflop_jobs{ok}": 4,
        "isoflop_jobs{failed}": 1,
        "isoflop_jobs{infeasible}": 2,
        "isoflop_jobs{pruned}": 5,
        "isoflop_warm_model_hits": 8,
        "isoflop_stages_computed": 6,
        "isoflop_jobs_expected": 9,
        "isoflop_jobs_running": 2,
        "isoflop_jobs_waiting": 3,
        "isoflop_stages_waiting": 7,
        "isoflop_workers": 2,
        "isoflop_tracking_backlog": 10,
        "isoflop_job_seconds": 1.5,
    }
    assert inner.lines == ["hello"]
    assert len(inner.snapshots) == 1


def test_many_snapshots_are_one_message_and_the_last_always_counts(recorder: type[Recorder]) -> None:
    inner = Lines()
    progress = MetricsProgress(inner, "s", True)
    for done in range(100):
        progress.update(Snapshot(ok=done, running=1))
    progress.update(Snapshot(ok=100))
    assert len(inner.snapshots) == 101
    assert isinstance(progress._metrics, Recorder)
    assert progress._metrics.sent == 2
    assert progress._metrics.values["isoflop_jobs{ok}"] == 100


def test_nothing_is_made_before_there_is_a_cluster(recorder: type[Recorder]) -> None:
    recorder.is_ready = False
    MetricsProgress(Lines(), "s", True).update(Snapshot())
    assert recorder.made == 0


def test_without_ray_nothing_is_imported() -> None:
    code = (
        "import sys; from isoflop.sweep.metrics import MetricsProgress; from isoflop.sweep.progress import Quiet, Snapshot;"
        "MetricsProgress(Quiet(), 's', False).update(Snapshot()); print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The Prometheus endpoint of a private Ray on loopback."""
    import ray

    from isoflop.execute.ray_node import start_private_ray

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("RAY_metrics_report_interval_ms", "500")
    start_private_ray(num_cpus=1, log_to_driver=False, logging_level="ERROR", _metrics_export_port=port)
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()
    patch.undo()


def scrape(endpoint: str, sweep: str) -> dict[str, float]:
    """What Prometheus would read of a sweep: ``name{status}`` -> value."""
    try:
        with urllib.request.urlopen(endpoint, timeout=10) as answer:
            text = answer.read().decode()
    except OSError:  # the node's agent is not up yet
        return {}
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(ray_isoflop_\w+)\{(.*)\} (\S+)", line)
        if match and f'sweep="{sweep}"' in match[2]:
            status = re.search(r'status="(\w+)"', match[2])
            found[match[1] + (f"{{{status[1]}}}" if status else "")] = float(match[3])
    return found


def test_prometheus_reads_a_sweep_from_ray(endpoint: str, tmp_path: Path, toy_parts: Any) -> None:
    methods = [{"toy-tokens": {"tokens": [1, 4, 16]}}, {"toy-bad": {"how": "raise"}}]
    spec = toy(methods=methods, limits={"retries": 0})
    options = {"tracking_uri": "none", "store": str(tmp_path / "store"), "cache_dir": tmp_path / "cache"}
    isoflop.run(spec, **options)
    expected = {
        "ray_isoflop_jobs_total{ok}": 12,
        "ray_isoflop_jobs_total{failed}": 4,
        "ray_isoflop_jobs_expected": 16,
        "ray_isoflop_jobs_running": 0,
        "ray_isoflop_jobs_waiting": 0,
        "ray_isoflop_tracking_backlog": 0,
    }
    deadline = time.monotonic() + 60
    seen: dict[str, float] = {}
    while time.monotonic() < deadline and not expected.items() <= seen.items():
        time.sleep(0.5)
        seen = scrape(endpoint, "toy")
    assert expected.items() <= seen.items(), seen
    assert seen["ray_isoflop_stages_computed_total"] >= 3
    assert seen["ray_isoflop_warm_model_hits_total"] >= 1
    assert seen["ray_isoflop_job_seconds"] > 0
    assert seen["ray_isoflop_workers"] >= 1


def test_the_documentation_names_every_metric(endpoint: str) -> None:
    from isoflop.execute.metrics import describe

    assert len(describe()) == 10
    assert all(re.fullmatch(r"ray_isoflop_[a-z_]+", name) and text.endswith(".") for name, text in describe().items())
