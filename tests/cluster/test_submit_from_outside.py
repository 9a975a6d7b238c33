"""`isoflop submit` from a host outside the cluster to three real Ray nodes, through Ray's Jobs API, with a token."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from netns import network, why_not

import isoflop

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
TOY = Path(__file__).parents[1] / "engine" / "toy_parts.py"
SWEEP = """
name: outside
import: [toy_parts, witness]
models: [toy/s, toy/m, toy/l]
methods: [{toy-tokens: {tokens: [1, 4, 16]}}]
tasks: [{toy-task: {shards: 1, seconds: 0.3}}]
"""
# Told by every process that imports the sweep's modules: on which node, and from where isoflop was imported.
WITNESS = """
import os, ray, isoflop
if ray.is_initialized():
    line = ray.util.get_node_ip_address() + " " + isoflop.__file__
    open(os.path.join({folder!r}, f"witness-{{os.getpid()}}"), "w").write(line)
"""


def test_a_sweep_submitted_from_outside_runs_on_several_nodes_with_the_code_that_was_sent(tmp_path: Path) -> None:
    shutil.copy(TOY, tmp_path / "toy_parts.py")
    (tmp_path / "witness.py").write_text(WITNESS.format(folder=str(tmp_path)))
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    store = tmp_path / "store"
    python_path = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "ISOFLOP_CACHE": str(tmp_path / "cache"),
    }
    with network(4) as net:
        head, first, second, laptop = net.hosts
        net.start_ray(head, cpus=0, gpus=0, health=python_path, dashboard=True)
        net.start_ray(first, cpus=1, gpus=0, health=python_path)
        net.start_ray(second, cpus=1, gpus=0, health=python_path)
        net.wait_for(3)
        done = laptop.run(
            sys.executable, "-m", "isoflop", "submit", str(tmp_path / "sweep.yaml"), "--json",
            "--address", f"http://{head.address}:8265", "--store", str(store), "--tracking-uri", "none",
        )  # fmt: skip
        addresses = {first.address, second.address}
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads(done.stdout)["status"] == "SUCCEEDED"
    rows = isoflop.open("outside", store=str(store)).results().to_pylist()
    assert [r["status"] for r in rows] == ["ok"] * 9
    assert len({r["job_id"] for r in rows}) == 9
    told = [path.read_text().split(" ", 1) for path in tmp_path.glob("witness-*")]
    assert {address for address, _ in told} == addresses  # one slot per node
    assert len({r["worker"] for r in rows}) == 2
    assert all("py_modules_files" in origin for _, origin in told), told
