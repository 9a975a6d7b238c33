"""Large stages between nodes: through a folder that all of them see, else through Ray's object store.

The two "nodes" are two workers of one Ray with a cache each, which say that they are on different nodes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import Lines, run_local, scores, toy

import isoflop
from isoflop.execute.ray_worker import RayWorker
from isoflop.stages import LARGE_STAGE, SharedStages


def finished(folder: Path, content: str = "x") -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data.bin").write_text(content)
    (folder / "stage.json").write_text("{}")
    return folder


def test_a_stage_is_published_once_and_complete(tmp_path: Path) -> None:
    shared = SharedStages(tmp_path / "shared")
    shared.leave_mark()
    source = finished(tmp_path / "cache" / "k-1", "hello")
    target = shared.publish("k-1", source)
    before = target.stat().st_ino
    assert shared.publish("k-1", source).stat().st_ino == before
    assert (target / "sub" / "data.bin").read_text() == "hello"
    assert (shared.keys(), "k-1" in shared, "k-2" in shared) == ({"k-1"}, True, False)


def test_many_publish_at_once(tmp_path: Path) -> None:
    shared = SharedStages(tmp_path / "shared")
    shared.leave_mark()
    source = finished(tmp_path / "cache" / "k-1", "y" * 100_000)
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            assert (shared.publish("k-1", source) / "stage.json").is_file()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in shared.root.iterdir() if p.is_dir()] == ["k-1"]


def test_a_folder_of_the_same_name_on_another_host_is_not_taken_for_the_shared_one(tmp_path: Path) -> None:
    here, there = SharedStages(tmp_path / "a"), SharedStages(tmp_path / "b")
    mark = here.leave_mark()
    there.leave_mark()
    assert here.sees(mark)
    assert not there.sees(mark)
    here.remove_mark(mark)
    assert not here.sees(mark)


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    shared = SharedStages(tmp_path)
    old, new = tmp_path / ".k-1-old", tmp_path / ".k-2-new"
    finished(old), finished(new)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    shared.leave_mark()
    assert (old.exists(), new.exists()) == (False, True)
    assert shared.keys() == set()


class Apart(RayWorker):
    """A worker that passes for a node of its own."""

    def __init__(self, name: str, cache_dir: str | None, *rest: Any) -> None:
        super().__init__(name, f"{cache_dir}/{name}", *rest)

    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "node": self._runner.name}


class Blind(Apart):
    """The second node does not see the shared folder."""

    def __init__(self, name: str, *rest: Any) -> None:
        super().__init__(name, *rest)
        if name == "w1":
            self._shared = None


class Full(Apart):
    """The shared folder cannot be written."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        assert self._shared is not None
        self._shared.root = Path("/proc/nowhere")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from isoflop.execute.ray_node import start_private_ray

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    start_private_ray(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    patch.undo()


@pytest.fixture
def run(
    cluster: None, toy_parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[type[RayWorker], int], Counter[str]]:
    """Run the toy sweep on two "nodes": stage -> how often it was computed, after checking the rows."""
    from isoflop.execute import Resources, ray_executor

    class Both(ray_executor.RayExecutor):
        """Begins when both workers are there, however long one of them takes."""

        def _node_ids(self) -> set[str]:
            return {f"w{i}" for i in range(9)}

        def start(self) -> None:
            super().start()
            while len(self.workers()) < 2:
                self._greet(timeout=1.0)

    spec = toy(tasks=[{"toy-task": {"seconds": 0.1}}, "toy-other"])

    def start(worker: type[RayWorker], large: int) -> Counter[str]:
        told = Lines()
        with monkeypatch.context() as patch:
            patch.setattr(ray_executor, "RayWorker", worker)
            patch.setattr(
                "isoflop.sweep.api.make_executor",
                lambda sweep, *_: Both(
                    Resources(), "auto", tmp_path / "cache", None, sweep.spec.imports,
                    shared_stages=tmp_path / "shared", large_stage=large,
                ),
            )  # fmt: skip
            opened = isoflop.run(spec, store=str(tmp_path / "store"), tracking_uri="none", progress=told)
        assert scores(opened.results()) == scores(run_local(spec, tmp_path / "alone").results())
        logs = {name: toy_parts.log_lines(tmp_path / "cache" / name) for name in ("w0", "w1")}
        print(*told.lines, logs, sep="\n")  # shown when a test fails
        assert all(any(line.startswith("eval") for line in lines) for lines in logs.values())  # both took part
        assert not list((tmp_path / "shared").glob(".*"))
        return Counter(line for lines in logs.values() for line in lines if line.startswith("stage"))

    return start


def in_shared(tmp_path: Path) -> set[str]:
    return {p.name.rsplit("-", 1)[0] for p in (tmp_path / "shared").iterdir()}


def test_large_stages_go_through_the_shared_folder(run: Any, tmp_path: Path) -> None:
    computed = run(Apart, 0)
    assert len(computed) == 3
    assert set(computed.values()) == {1}
    assert "toy-base" in in_shared(tmp_path)  # computed on one, needed for weights on the other


def test_small_stages_do_not(run: Any, tmp_path: Path) -> None:
    assert set(run(Apart, LARGE_STAGE).values()) == {1}
    assert in_shared(tmp_path) == set()


def test_a_node_that_does_not_see_the_folder_gets_its_stages_all_the_same(run: Any, tmp_path: Path) -> None:
    assert set(run(Blind, 0).values()) == {1}
    assert in_shared(tmp_path) == set()


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_warning(run: Any) -> None:
    assert set(run(Full, 0).values()) == {1}


def test_a_published_stage_outlives_the_nodes_that_computed_it(run: Any, tmp_path: Path) -> None:
    """New nodes with empty disks take from the folder what is there."""
    import shutil

    run(Apart, 0)
    published = {p.name for p in (tmp_path / "shared").iterdir()}
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "store")
    computed = run(Apart, 0)
    assert {line.split()[1] for line in computed}.isdisjoint(published)
