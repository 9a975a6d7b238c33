"""What a running sweep tells the outside: a snapshot, many times a second, and one line per event for the log file."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Protocol

from isoflop.core.text import safe_text


@dataclass
class Snapshot:
    """The state of a sweep now.

    Attributes:
        total: jobs expected in all, or None when the search decides.
        cached: jobs that an earlier session finished.
        stages_left: shared stages that are not there yet, those that run (``stages_running``) among them.
        doing: worker -> what it is doing, with the seconds since it began.
        best: objective value and a description of the best trial so far.
        eta: seconds left, or None while nothing is known.
        warm: jobs that went to a worker which held their model; ``job_seconds`` is the mean of the last jobs.
        backlog: rows that MLflow does not show yet; ``problem`` says why when nothing moves.
    """

    total: int | None = None
    done: int = 0
    cached: int = 0
    running: int = 0
    waiting: int = 0
    ok: int = 0
    failed: int = 0
    infeasible: int = 0
    pruned: int = 0
    stages_done: int = 0
    stages_left: int = 0
    stages_running: int = 0
    warm: int = 0
    job_seconds: float = 0.0
    elapsed: float = 0.0
    eta: float | None = None
    best: tuple[float, str] | None = None
    doing: Mapping[str, str] = field(default_factory=dict)
    backlog: int = 0
    problem: str = ""
    draining: bool = False


class Progress(Protocol):
    """Where snapshots and lines go: a terminal, a file, a test."""

    def update(self, snapshot: Snapshot) -> None:
        """Show the state."""

    def line(self, text: str) -> None:
        """Tell of one event."""


class Quiet:
    """Shows nothing."""

    def update(self, snapshot: Snapshot) -> None:
        """Ignored."""

    def line(self, text: str) -> None:
        """Ignored."""


class LogFile:
    """Plain lines with a time stamp, appended to a file, passed on to another progress.

    A file that cannot be written (disk full) loses lines and stops nothing.

    Args:
        descriptor: of the file, open for appending; None for no file.
    """

    def __init__(self, descriptor: int | None, inner: Progress) -> None:
        self._inner = inner
        self._file: IO[str] | None = None
        if descriptor is not None:
            self._file = os.fdopen(descriptor, "a", buffering=1, encoding="utf-8")

    def update(self, snapshot: Snapshot) -> None:
        self._inner.update(snapshot)

    def line(self, text: str) -> None:
        """What a line tells may come from a method, a library or another host: it is made safe for all that follow."""
        text = safe_text(text)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")
        self._inner.line(text)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
