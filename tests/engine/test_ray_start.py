"""A private Ray that is slow to come up, dies on the way, or never comes: patience, one line, and nothing left running."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from helpers import toy

from isoflop.core.errors import Unavailable, UserError
from isoflop.execute import ray_node
from isoflop.execute.ray_node import start_private_ray


class Part:
    """A process of Ray's: runs until it is told to have ended."""

    def __init__(self, code: int | None = None) -> None:
        self.process = SimpleNamespace(poll=lambda: code)


class Node:
    """Stands for Ray's node: registers at its GCS after so many questions, and keeps count of those ended."""

    late = 0
    ended: tuple[str, int] | None = None
    made: list[Node] = []  # noqa: RUF012 (one list for all)

    def __init__(self, **options: Any) -> None:
        self.killed = 0
        self.all_processes = {"gcs_server": [Part()], "log_monitor": [Part(1)]}
        Node.made.append(self)
        if Node.ended is not None:
            self.all_processes[Node.ended[0]] = [Part(Node.ended[1])]
        ray_node.services.get_node("127.0.0.1:1", "id")

    def kill_all_processes(self, **how: Any) -> None:
        self.killed += 1


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Start with ``ray.init`` making such a node; the options of each attempt."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Node, "made", [])

    def init(**options: Any) -> None:
        asked.append(options)
        ray_node.ray_node.Node(**options)

    class State:
        """What the GCS knows."""

        def _initialize_global_state(self, options: Any) -> None: ...

        def node_table(self) -> list[dict[str, str]]:
            Node.late -= 1
            return [] if Node.late >= 0 else [{"NodeID": "id"}]

    monkeypatch.setattr(ray_node.ray_node, "Node", Node)
    monkeypatch.setattr(ray_node.services, "get_node", lambda *_: "node")
    monkeypatch.setattr(ray_node, "GlobalState", State)
    monkeypatch.setattr(ray_node, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray_node.ray, "init", init)
    monkeypatch.setattr(ray_node.ray, "shutdown", lambda: None)

    def begin(late: int = 0, ended: tuple[str, int] | None = None, **options: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(Node, "late", late)
        monkeypatch.setattr(Node, "ended", ended)
        before = ray_node.ray_node.Node, ray_node.services.get_node, dict(os.environ)
        try:
            start_private_ray(**options)
        finally:
            assert (ray_node.ray_node.Node, ray_node.services.get_node, dict(os.environ)) == before
        return asked

    return begin


def test_a_late_node_is_waited_for_and_not_started_again(start: Callable[..., list[dict[str, Any]]]) -> None:
    asked = start(late=20, timeout=60, num_cpus=1)
    assert len(asked) == 1
    assert asked[0]["_node_ip_address"] == "127.0.0.1"
    assert asked[0]["num_cpus"] == 1
    assert Node.made[0].killed == 0


def test_a_long_wait_is_told_once(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(ray_node, "_TELL_SECONDS", 0.0)
    start(late=5, timeout=60, tell=lines.append)
    assert len(lines) == 1
    assert "waiting for at most 60 s (--ray-start-timeout)" in lines[0]


def test_a_node_that_is_never_up_is_given_up_and_cleared_away(start: Callable[..., Any]) -> None:
    with pytest.raises(
        Unavailable, match=r"not up within 0\.1 s; .*--ray-start-timeout SECONDS.*--executor local"
    ) as caught:
        start(late=10**9, timeout=0.1)
    assert caught.value.exit_code == 3
    assert [node.killed for node in Node.made] == [1]


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_node_whose_part_dies_is_started_again_at_once(part: str, start: Callable[..., Any]) -> None:
    lines: list[str] = []
    with pytest.raises(Unavailable, match=rf"could not be started, 3 times: its {part} was killed by SIGKILL"):
        start(late=10**9, ended=(part, -9), timeout=60, tell=lines.append)
    assert [node.killed for node in Node.made] == [1, 1, 1]
    assert len(lines) == 2


def test_other_failures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, start: Callable[..., Any]) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("num_cpus must not be negative")

    monkeypatch.setattr(ray_node.ray, "init", refuse)
    with pytest.raises(ValueError, match="num_cpus must not be negative"):
        start(num_cpus=-1)


def test_the_option_says_how_long_a_start_may_take(toy_parts: object) -> None:
    from isoflop.sweep.api import RunOptions, make_executor
    from isoflop.sweep.resolve import resolve

    executor: Any = make_executor(resolve(toy()), RunOptions(ray_start_timeout=7))
    assert executor._cluster.start_timeout == 7
    with pytest.raises(UserError, match="ray_start_timeout = -1; allowed: seconds from 0"):
        RunOptions(ray_start_timeout=-1)


def test_a_real_start_that_is_given_up_leaves_no_process(children: Callable[[], set[int]]) -> None:
    """Its raylet stands still, as on a machine that has no time for it."""
    before = children()

    def halt() -> None:
        while not stop.is_set():
            for pid in children() - before:
                if _name(pid) == "raylet":
                    os.kill(pid, signal.SIGSTOP)
                    return
            time.sleep(0.02)

    stop = threading.Event()
    thread = threading.Thread(target=halt, daemon=True)
    thread.start()
    try:
        with pytest.raises(Unavailable, match="not up within 8 s"):
            start_private_ray(8.0, num_cpus=1, log_to_driver=False, logging_level="ERROR")
    finally:
        stop.set()
        thread.join()
    assert not ray.is_initialized()
    until = time.monotonic() + 10
    while (left := {pid: _name(pid) for pid in children() - before if _name(pid)}) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def _name(pid: int) -> str:
    """Of a living process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except OSError:
        return ""
    return "" if text.rpartition(")")[2].split()[0] == "Z" else text.partition("(")[2].rpartition(")")[0]


def test_ray_still_asks_in_these_places() -> None:
    """What is replaced while it starts is private to it."""
    import inspect

    assert "ray._private.services.get_node(" in inspect.getsource(ray._private.node)
    assert "ray._private.node.Node(" in inspect.getsource(ray._private.worker)
    assert "print_to_stdstream(" in inspect.getsource(ray._private.worker.listen_error_messages)
