"""Ctrl-C: told by a thread whatever the process is busy with, a second one stops, and everything is put back."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_local, toy

from isoflop.core.errors import StopNow
from isoflop.execute import LocalExecutor
from isoflop.jobs import Runner
from isoflop.sweep.interrupts import Interrupts


def send(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def send_and_wait(number: signal.Signals = signal.SIGINT) -> None:
    send(number)
    time.sleep(20)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> object:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], threading.active_count()
    yield
    assert ([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], threading.active_count()) == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_drains_and_the_second_stops(number: signal.Signals) -> None:
    lines: list[str] = []
    interrupts = Interrupts()
    with interrupts.watched(lambda: "2 running jobs", lines.append):
        assert not interrupts.draining
        send(number)
        wait_for(lambda: lines)
        assert interrupts.draining
        with pytest.raises(StopNow):
            send_and_wait(number)
    assert lines == [f"{number.name}: waiting for 2 running jobs; once more to stop now"]


def test_it_is_told_before_a_long_call_ends() -> None:
    told: list[float] = []
    interrupts = Interrupts()
    with interrupts.watched(lambda: "1 running stage", lambda line: told.append(time.monotonic())):
        threading.Timer(0.05, send).start()
        hashlib.pbkdf2_hmac("sha256", b"a call into C", b"that knows no signals", 5_000_000)
        ended = time.monotonic()
        wait_for(lambda: told and interrupts.draining)
    assert told[0] < ended


def test_where_nothing_runs_it_says_so_and_the_sweep_ends() -> None:
    lines: list[str] = []
    with Interrupts().watched(lambda: "", lines.append):
        send()
        wait_for(lambda: lines)
    assert lines == ["SIGINT: ending the sweep"]


def test_while_workers_start_the_first_stops() -> None:
    interrupts = Interrupts()
    with (
        interrupts.watched(lambda: "", lambda line: None),
        pytest.raises(StopNow),
        interrupts.at_once(),
    ):
        send_and_wait()
    assert interrupts.draining


def test_in_another_thread_signals_are_left_alone() -> None:
    found: list[object] = []

    def body() -> None:
        with Interrupts().watched(lambda: "", lambda line: None):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_a_handler_that_a_library_puts_under_pythons_own_is_taken_back(tmp_path: Path) -> None:
    """As Ray's, which prints a stack of C++ for a SIGTERM; Python does not know of it."""
    interrupts, lines = Interrupts(), []
    with (tmp_path / "stack.txt").open("w") as stack, interrupts.watched(lambda: "", lines.append):
        faulthandler.register(signal.SIGTERM, stack, chain=True)
        try:
            interrupts.keep()
            send(signal.SIGTERM)
            wait_for(lambda: lines)
        finally:
            interrupts.keep()
            faulthandler.unregister(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    assert interrupts.draining
    assert (tmp_path / "stack.txt").read_text() == ""


def test_a_sweep_takes_its_signals_back_from_what_its_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_parts: object
) -> None:
    started, run_job = LocalExecutor.start, Runner.run_job

    def start(self: LocalExecutor) -> None:
        started(self)
        faulthandler.register(signal.SIGTERM, stack, chain=True)

    def run(self: Runner, *arguments: Any) -> Any:
        send(signal.SIGTERM)
        return run_job(self, *arguments)

    monkeypatch.setattr(LocalExecutor, "start", start)
    monkeypatch.setattr(Runner, "run_job", run)
    with (tmp_path / "stack.txt").open("w") as stack:
        try:
            summary = run_local(toy(), tmp_path).summary
        finally:
            faulthandler.unregister(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    assert summary.interrupted
    assert summary.ran == 1
    assert (tmp_path / "stack.txt").read_text() == ""
