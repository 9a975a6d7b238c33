"""Ctrl-C: told by a thread whatever the process is busy with, a second one stops, and everything is put back."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from isoflop.core.errors import StopNow
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
