"""A sweep can be watched from another process, and a file that cannot be written costs nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import Lines, run_local, toy

from isoflop.cli import cli
from isoflop.ledger import Store
from isoflop.sweep.progress import Snapshot
from isoflop.sweep.state import StateFile, read_state

pytestmark = pytest.mark.usefixtures("toy_parts")


def watch(store: Path, *options: str) -> dict[str, object]:
    result = CliRunner().invoke(cli, ["watch", "toy", "--store", str(store), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return dict(json.loads(result.output)) if "--json" in options else {"text": result.output}


def test_after_a_session_its_last_state_is_there(tmp_path: Path) -> None:
    run_local(toy(), tmp_path)
    found = watch(tmp_path / "store", "--json")
    assert found["ended"] is True
    assert found["alive"] is False
    snapshot = found["snapshot"]
    assert isinstance(snapshot, dict)
    assert (snapshot["done"], snapshot["ok"], snapshot["total"]) == (12, 12, 12)
    assert "toy: 12/12 jobs" in str(watch(tmp_path / "store")["text"])


def test_a_session_that_was_killed_is_told_from_one_that_ended(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    code = f"""
import time
from isoflop.ledger import Store
from isoflop.sweep.progress import Quiet, Snapshot
from isoflop.sweep.state import StateFile
StateFile(Store.open({str(tmp_path)!r}), "toy", Quiet()).update(Snapshot(total=5, done=2, running=1))
print("written", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "written"
        running = read_state(store, "toy")
        assert running is not None
        assert running.alive
        assert (running.pid, running.host) == (process.pid, socket.gethostname())
        process.kill()
    stopped = read_state(store, "toy")
    assert stopped is not None
    assert not stopped.alive
    assert not stopped.ended
    assert "stopped without a word" in str(watch(tmp_path)["text"])


def test_states_pass_on_what_they_are_told_and_are_written_now_and_then(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    store, inner = Store.open(str(tmp_path)), Lines()
    state = StateFile(store, "toy", inner)
    for done in range(50):
        state.update(Snapshot(done=done))
    state.line("job 50 ok")
    assert len(inner.snapshots) == 50
    assert inner.lines == ["job 50 ok"]
    written = read_state(store, "toy")
    assert written is not None
    assert written.snapshot.done < 49  # not every one of fifty in a moment
    state.close()
    last = read_state(store, "toy")
    assert last is not None
    assert (last.snapshot.done, last.line, last.ended, last.pid) == (49, "job 50 ok", True, os.getpid())
    assert time.time() - last.at < 60


def test_a_state_that_cannot_be_written_or_read_stops_nothing(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "nowhere"))
    StateFile(store, "toy", Lines()).update(Snapshot())
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    for content in ("{", "[]", '{"snapshot": {}}'):
        (tmp_path / "sweeps" / "toy" / "state.json").write_text(content)
        assert read_state(Store.open(str(tmp_path)), "toy") is None


def test_an_unknown_sweep_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    result = CliRunner().invoke(cli, ["watch", "toi", "--store", str(tmp_path)])
    assert "did you mean 'toy'" in str(result.exception)
