"""How many models a worker keeps warm, and what becomes of a job that ran out of memory beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Lines, run_local, toy

from isoflop.jobs import Job, Runner
from isoflop.jobs.warm import MOST_WARM, WarmModels
from isoflop.models.base import ModelInfo
from isoflop.models.family import family_of
from isoflop.models.memory import memory_of

GIB = 2.0**30


class Memory:
    """Devices of 80 GiB, on which loaded models take what they say, each an equal part; ``taken`` of the last one is somebody else's."""

    def __init__(self, devices: int = 1, taken: float = 0.0) -> None:
        self.devices, self.taken = devices, taken
        self.warm = WarmModels([f"cuda:{number}" for number in range(devices)], self.measure)
        self.sizes: dict[str, float] = {}

    def measure(self) -> list[tuple[float, float]]:
        held = sum(self.sizes[key] for key in self.warm.held()) / self.devices
        taken = [0.0] * (self.devices - 1) + [self.taken]
        return [((80 - held - other) * GIB, 80 * GIB) for other in taken]

    def load(self, key: str, gib: float, info: ModelInfo) -> list[str]:
        if self.warm.get(key) is None:
            self.warm.make_room(replace(info, n_params=int(gib * GIB / 1.5 / 2), dense_bits=16))
            self.sizes[key] = gib
            self.warm.put(key, key)  # type: ignore[arg-type]
        return self.warm.held()


@pytest.fixture
def info(toy_parts: ModuleType) -> ModelInfo:
    return family_of("toy/s").info("toy/s", {})


def test_models_stay_warm_as_long_as_the_next_one_has_room(info: ModelInfo) -> None:
    memory = Memory()
    assert memory.load("8b", 16, info) == ["8b"]
    assert memory.load("13b", 26, info) == ["8b", "13b"]  # 38 of 80 GiB are left, 24 are the job's
    assert memory.load("1b", 2, info) == ["8b", "13b", "1b"]
    assert memory.load("8b", 16, info) == ["13b", "1b", "8b"]  # used again
    assert memory.load("7b", 14, info) == ["1b", "8b", "7b"]  # the longest unused goes
    assert memory.load("70b", 140, info) == ["70b"]  # whatever it takes


def test_models_over_several_devices_have_the_room_of_all_of_them(info: ModelInfo) -> None:
    """And what one of them lacks counts, however much the others have."""
    memory = Memory(devices=4)
    assert memory.load("70b", 140, info) == ["70b"]
    assert memory.load("32b", 64, info) == ["70b", "32b"]  # 29 of 80 GiB are left on each, 24 are the job's
    assert memory.load("13b", 26, info) == ["32b", "13b"]
    memory = Memory(devices=4, taken=30)
    assert memory.load("70b", 140, info) == ["70b"]
    assert memory.load("32b", 64, info) == ["32b"]


def test_small_models_stay_warm_up_to_a_number(info: ModelInfo) -> None:
    memory = Memory()
    for number in range(2 * MOST_WARM):
        kept = memory.load(f"m{number}", 0.001, info)
    assert kept == [f"m{number}" for number in range(MOST_WARM, 2 * MOST_WARM)]


def test_this_host_has_memory() -> None:
    free, total = memory_of("cpu")
    assert 0 < free <= total


def test_files_that_were_read_are_no_memory_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group counts them as used, and lets go of them where somebody needs the room."""
    gib = 2**30
    files = {
        "/proc/meminfo": [f"MemTotal: {64 * 2**20} kB", f"MemAvailable: {60 * 2**20} kB"],
        "/sys/fs/cgroup/memory.max": [str(16 * gib)],
        "/sys/fs/cgroup/memory.current": [str(15 * gib)],
        "/sys/fs/cgroup/memory.stat": [f"anon {5 * gib}", f"inactive_file {8 * gib}", f"active_file {2 * gib}"],
    }
    monkeypatch.setattr("isoflop.models.memory._lines", lambda path: files.get(path, []))
    assert memory_of("cpu") == (11 * gib, 16 * gib)
    del files["/sys/fs/cgroup/memory.stat"]
    assert memory_of("cpu") == (1 * gib, 16 * gib)
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert memory_of("cpu") == (60 * gib, 64 * gib)


def test_a_stage_that_ran_out_of_memory_beside_models_is_computed_without_them(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same attempt, as the models were none of its doing; and what then fails is the stage's own."""
    runner = Runner(tmp_path, "cpu")
    seen: list[int] = []
    enough = 0

    def ensure(stage: Any) -> float:
        seen.append(len(runner._models))
        if seen[-1] > enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr("isoflop.jobs.runner._stage", lambda job, key: None)
    monkeypatch.setattr(runner.cache, "ensure", ensure)
    monkeypatch.setattr(runner.cache, "size", lambda stage: 0)
    job = Job(model="toy/s", methods=(), task="toy-task", repeat=0, seed=0)
    runner._models.put("a", object())  # type: ignore[arg-type]
    assert runner.run_stage(job, "key") == {"ok": True, "seconds": 1.0, "bytes": 0}
    assert seen == [1, 0]
    enough = -1
    runner._models.put("a", object())  # type: ignore[arg-type]
    assert runner.run_stage(job, "key")["status"] == "infeasible"
    assert seen == [1, 0, 1, 0]


def test_what_ran_out_of_memory_beside_others_is_tried_alone_and_only_then_infeasible(
    tmp_path: Path, toy_parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an attempt lost: there are no retries here, and the job that fits alone has its result from its first one."""
    seen: list[tuple[str, int]] = []
    run = Runner._run

    def crowded(self: Runner, resolved: Any, out: Any, on_shard: Any) -> None:
        others = len(set(self._models.held()) - {resolved.model_key})
        seen.append((resolved.job.model, others))
        if resolved.job.model == "toy/m" and others:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, resolved, out, on_shard)

    monkeypatch.setattr(Runner, "_run", crowded)
    told = Lines()
    spec = toy(
        models=["toy/s", "toy/m"],
        tasks=["toy-task"],
        methods=[{"toy-tokens": {"tokens": [1, 2]}}],
        limits={"retries": 0},
    )
    opened = run_local(spec, tmp_path, told)
    rows = opened.results().to_pylist()
    assert {(row["status"], row["attempt"]) for row in rows} == {("ok", 1)}
    assert ("toy/m", 1) in seen  # it was crowded
    assert ("toy/m", 0) in seen  # and then it was not
    assert any("will be tried again: OutOfMemoryError" in line for line in told.lines)


def test_what_does_not_fit_alone_is_infeasible(tmp_path: Path, toy_parts: ModuleType) -> None:
    spec = toy(
        models=["toy/s"], tasks=["toy-task"], methods=[{"toy-tokens": {"tokens": [1]}}, {"toy-bad": {"how": "oom"}}]
    )
    rows = run_local(spec, tmp_path).results().to_pylist()
    assert sorted(row["status"] for row in rows) == ["infeasible", "ok"]
