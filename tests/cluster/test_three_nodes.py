"""The same YAML on a cluster of three real Ray nodes, and on this host alone: the same rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from netns import PORT, network, why_not

import isoflop

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
TOY = Path(__file__).parents[1] / "engine" / "toy_parts.py"

SWEEP = """
name: {name}
import: [toy_parts]
models: [toy/s, toy/m, toy/l]
methods: [{{toy-tokens: {{tokens: [4, 16, 64]}}}}]
tasks: [{{toy-task: {{shards: 2, seconds: 0.2}}}}]
resources: {{cpus: 1, gpus: 1}}
limits: {{timeout: 2m}}
"""


def _write(folder: Path, name: str, gpus: int) -> Path:
    (folder / "toy_parts.py").write_bytes(TOY.read_bytes())
    path = folder / f"{name}.yaml"
    path.write_text(SWEEP.format(name=name).replace("gpus: 1", f"gpus: {gpus}"))
    return path


def test_cluster_gives_the_same_rows_and_pins_gpus(tmp_path: Path) -> None:
    with network(3) as net:
        head, *others = net.hosts
        net.start_ray(head, cpus=0, gpus=0)
        for host in others:
            net.start_ray(host, cpus=2, gpus=2)
        net.wait_for(3)
        done = head.run(
            sys.executable, "-m", "isoflop", "run", str(_write(tmp_path, "cluster", gpus=1)), "--json",
            "--ray-address", f"{head.address}:{PORT}", "--node-ip", head.address,
            "--store", str(tmp_path / "store"), "--cache-dir", str(tmp_path / "cache"), "--tracking-uri", "none",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["summary"]["ok"] == 9
    rows = isoflop.open("cluster", store=str(tmp_path / "store")).results().to_pylist()
    seen = {(r["worker"], r["device"]) for r in rows}
    # two pretended GPUs per node: each actor keeps one id, and ids repeat over nodes, not within one
    assert {device for _, device in seen} <= {"cpu [CUDA_VISIBLE_DEVICES=0]", "cpu [CUDA_VISIBLE_DEVICES=1]"}
    assert len(seen) == len({worker for worker, _ in seen})
    assert len({worker for worker, _ in seen}) > 1

    alone = isoflop.run(
        _write(tmp_path, "alone", gpus=0), executor="local", store=str(tmp_path / "store"), tracking_uri="none"
    )
    expected = {r["job_id"]: (r["scores"], r["error"]) for r in alone.results().to_pylist()}
    assert {r["job_id"]: (r["scores"], r["error"]) for r in rows} == expected
