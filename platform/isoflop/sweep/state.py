"""What a running sweep is doing, kept in a file of the store so that another process can watch it (``isoflop watch``).

The file is for looking at only: nothing is ever resumed from it, it is not flushed to the disk, and one that cannot be
written costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from isoflop.core.errors import UserError
from isoflop.core.text import safe_tree
from isoflop.ledger import Store
from isoflop.sweep.progress import Progress, Snapshot

_LOCAL_SECONDS = 1.0
_REMOTE_SECONDS = 10.0
_SILENT_SECONDS = 60.0
NAME = "state.json"


@dataclass(frozen=True)
class State:
    """The last that is known of a session.

    Attributes:
        snapshot: as the terminal of the session shows it.
        line: the latest event.
        at: when that was, in seconds since the epoch.
        host, pid: of the process that drives the sweep.
        ended: the session is over.
    """

    snapshot: Snapshot
    line: str
    at: float
    host: str
    pid: int
    ended: bool

    @property
    def alive(self) -> bool:
        """Whether the session goes on, as far as can be told from here."""
        if self.ended:
            return False
        if self.host == socket.gethostname():
            return _exists(self.pid)
        return time.time() - self.at < _SILENT_SECONDS


class StateFile:
    """A progress that also writes the state down, about once a second (every ten seconds to a remote store).

    Args:
        store, sweep: whose state.
        inner: is told everything, too.
    """

    def __init__(self, store: Store, sweep: str, inner: Progress) -> None:
        self._store = store
        self._sweep = sweep
        self._inner = inner
        self._seconds = _LOCAL_SECONDS if store.local is not None else _REMOTE_SECONDS
        self._snapshot = Snapshot()
        self._line = ""
        self._written = float("-inf")

    def update(self, snapshot: Snapshot) -> None:
        """Show the state, and write it down when the last time is long enough ago."""
        self._inner.update(snapshot)
        self._snapshot = snapshot
        self._now_and_then()

    def line(self, text: str) -> None:
        """Pass an event on, and remember it."""
        self._inner.line(text)
        self._line = text
        self._now_and_then()

    def close(self) -> None:
        """The session is over."""
        self._write(ended=True)

    def _now_and_then(self) -> None:
        if time.monotonic() - self._written >= self._seconds:
            self._write(ended=False)

    def _write(self, ended: bool) -> None:
        self._written = time.monotonic()
        state = State(self._snapshot, self._line, time.time(), socket.gethostname(), os.getpid(), ended)
        data = json.dumps(asdict(state)).encode()
        with contextlib.suppress(OSError, UserError):
            self._store.write(self._store.path("sweeps", self._sweep, NAME), data, durable=False)


def read_state(store: Store, sweep: str) -> State | None:
    """The state of the sweep's last session; None when there is none that this version can read."""
    data = store.read(store.path("sweeps", sweep, NAME))
    if data is None:
        return None
    try:
        return _STATE.validate_python(safe_tree(json.loads(data)))
    except (ValueError, RecursionError):
        return None


_STATE = TypeAdapter(State)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
