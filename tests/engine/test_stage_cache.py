"""The stage cache: computed once, also by two processes; damage is mended; what is half done never shows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isoflop.core.errors import Infeasible
from isoflop.core.stage import Stage, StageContext, walk
from isoflop.stages import StageCache

pytestmark = pytest.mark.usefixtures("toy_parts")


@dataclass(frozen=True)
class Text(Stage):
    """Writes its text; ``fail`` says how it goes wrong."""

    text: str
    fail: str = ""
    parts: tuple[Stage, ...] = ()

    def deps(self) -> tuple[Stage, ...]:
        return self.parts

    def compute(self, ctx: StageContext, folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "text.txt").write_text(self.text)
        if self.fail == "compute":
            raise ValueError("half way")

    def load(self, ctx: StageContext, folder: Path) -> str:
        if self.fail == "memory":
            raise MemoryError
        if self.fail == "infeasible":
            raise Infeasible("no")
        return (folder / "sub" / "text.txt").read_text()


def test_a_stage_is_computed_once_and_found_again(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    stage = Text("hello")
    assert not cache.has(stage)
    assert cache.ensure(stage) > 0
    assert cache.ensure(stage) == 0
    assert cache.get(stage) is cache.get(stage) == "hello"
    other = StageCache(tmp_path)
    assert other.ensure(stage) == 0
    assert other.get(stage) == "hello"
    assert other.keys() == {stage.key}


def test_keys_depend_on_every_field_and_the_version() -> None:
    base = Text("a")
    keys = {base.key, Text("b").key, Text("a", "x").key, Text("a", parts=(Text("b"),)).key}
    assert len(keys) == 4
    assert Text("a").key == base.key
    assert [s.text for s in walk((Text("top", parts=(Text("x"), Text("y", parts=(Text("x"),)))),))] == ["x", "y", "top"]


def test_dependencies_come_first(tmp_path: Path, toy_parts: ModuleType) -> None:
    cache = StageCache(tmp_path)
    cache.get(toy_parts.ToyWeights("toy/s", 0))
    assert [line.split()[1].rsplit("-", 1)[0] for line in toy_parts.log_lines(tmp_path)] == ["toy-base", "toy-weights"]


def test_a_computation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    with pytest.raises(ValueError, match="half way"):
        cache.get(Text("x", "compute"))
    assert cache.keys() == set()
    assert [p.name for p in cache.root.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("damage", ["file gone", "meta gone", "empty folder"])
def test_a_damaged_result_is_computed_again(tmp_path: Path, damage: str) -> None:
    stage = Text("hello")
    folder = StageCache(tmp_path).folder(stage)
    StageCache(tmp_path).ensure(stage)
    for name in {
        "file gone": ["sub/text.txt"],
        "meta gone": ["stage.json"],
        "empty folder": ["sub/text.txt", "stage.json"],
    }[damage]:
        (folder / name).unlink()
    cache = StageCache(tmp_path)
    assert cache.get(stage) == "hello"
    assert cache.has(stage)
    assert len(cache.computed) == 1


@pytest.mark.parametrize("fail, error", [("memory", MemoryError), ("infeasible", Infeasible)])
def test_a_value_that_does_not_fit_does_not_condemn_the_files(
    tmp_path: Path, fail: str, error: type[Exception]
) -> None:
    cache = StageCache(tmp_path)
    with pytest.raises(error):
        cache.get(Text("x", fail))
    assert cache.has(Text("x", fail))
    assert len(cache.computed) == 1


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    stage = Text("hello")
    left = cache.root / f".{stage.key}-abandoned"
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"x" * 100)
    cache.ensure(stage)
    assert not left.exists()


@dataclass(frozen=True)
class Long(Stage):
    """Counts to three in its scratch folder; is stopped behind the first step."""

    stop: bool = True

    def compute(self, ctx: StageContext, folder: Path) -> None:
        done = ctx.scratch(self) / "done"
        begun = int(done.read_text()) if done.exists() else 0
        for step in range(begun, 3):
            done.write_text(str(step + 1))
            if step == 0:
                raise KeyboardInterrupt
        (folder / "begun").write_text(str(begun))

    def load(self, ctx: StageContext, folder: Path) -> int:
        return int((folder / "begun").read_text())


def test_a_stage_that_is_stopped_finds_its_scratch_folder_again_and_leaves_none(tmp_path: Path) -> None:
    stage = Long()
    with pytest.raises(KeyboardInterrupt):
        StageCache(tmp_path).ensure(stage)
    assert StageCache(tmp_path).get(stage) == 1
    assert [p.name for p in StageCache(tmp_path).root.iterdir() if p.is_dir()] == [stage.key]


def test_files_travel_to_another_host(tmp_path: Path) -> None:
    here, there = StageCache(tmp_path / "a"), StageCache(tmp_path / "b")
    stage = Text("hello")
    here.ensure(stage)
    there.install(stage, here.files(stage))
    there.install(stage, here.files(stage))
    assert there.has(stage)
    assert there.get(stage) == "hello"
    assert there.computed == []
    assert there.size(stage) == here.size(stage)


def test_values_leave_memory_least_recently_used_first(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, keep=2)
    a, b, c = Text("a"), Text("b"), Text("c")
    cache.get(a), cache.get(b), cache.get(a), cache.get(c)
    assert cache.loaded() == [a.key, c.key]


CHILD = """
import sys, toy_parts
from pathlib import Path
from isoflop.stages import StageCache
print("ready", flush=True)
sys.stdin.readline()
StageCache(Path(sys.argv[1])).get(toy_parts.ToyWeights("toy/s", 0, seconds=0.5))
"""


def _start(folder: Path, toy_parts: ModuleType) -> Any:
    path = os.path.dirname(str(toy_parts.__file__))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_two_processes_compute_a_stage_once(tmp_path: Path, toy_parts: ModuleType) -> None:
    children = [_start(tmp_path, toy_parts) for _ in range(2)]
    try:
        assert [c.stdout.readline().strip() for c in children] == ["ready", "ready"]
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        assert [c.wait(60) for c in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert len(toy_parts.log_lines(tmp_path, "stage toy-weights")) == 1
