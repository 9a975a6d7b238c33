"""Feeds MLflow from ledger rows, in the background.

The ledger is the truth and MLflow a projection of it: each row carries a sequence number, each MLflow run the number of
the row it shows. After any crash, pushing all rows again writes what is missing, completes what was half written, and
leaves the rest alone. A server that is down for a while delays the projection and nothing else.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from isoflop.core.secrets import redacted
from isoflop.core.text import safe_line
from isoflop.track.bulk import run_id_of
from isoflop.track.database import Unusable, check_damage
from isoflop.track.run_data import RunData

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
_REFUSALS = 2  # a row that MLflow finds wrong so often must not hold up the others
_OUTDATED = "out-of-date database schema"  # in MLflow's own words
_BATCH = 200  # rows per transaction
_PORTION = 100  # rows of earlier sessions
_GATHER_SECONDS = 0.5  # a transaction costs as much as dozens of rows, so rows wait this long for others
_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Artifact:
    """A file of the parent run: ``path`` inside it, ``text`` or bytes."""

    path: str
    content: str | bytes


class Tracker(ABC):
    """Life cycle: ``start``, any number of ``push``, ``finish``, ``close``. Nothing here ever blocks the driver for long."""

    @abstractmethod
    def start(self, spec_text: str, params: Mapping[str, str], note: str = "") -> None:
        """Begin (or take up again) the sweep's parent run; ``note`` is its description for the time being."""

    def describe(self, note: str) -> None:
        """Another description of the parent run: Markdown, with :mod:`isoflop.track.links` for targets."""
        return

    @abstractmethod
    def push(self, rows: Iterable[Row]) -> None:
        """Rows that are durable in the ledger; those that MLflow shows already cost nothing."""

    @abstractmethod
    def catch_up(self, table: pa.Table) -> None:
        """Rows of earlier sessions, of which MLflow may lack some."""

    @abstractmethod
    def finish(self, artifacts: Iterable[Artifact], metrics: Mapping[str, float], note: str, status: str) -> None:
        """Attach results to the parent run and end it."""

    @abstractmethod
    def backlog(self) -> int:
        """Rows that MLflow does not show yet, and those of earlier sessions that nobody has looked after yet."""

    @abstractmethod
    def wait(self, seconds: float) -> bool:
        """Nothing more will be pushed; wait until everything is shown. False when it is not yet."""

    @abstractmethod
    def close(self, wait: float) -> int:
        """Stop after at most ``wait`` seconds; returns the backlog that is left."""

    def run_id(self, job_id: str) -> str | None:
        """The id of the run that will show a job, where that can be known beforehand."""
        return None

    @property
    def problem(self) -> str:
        """Why nothing moves, or an empty string."""
        return ""

    @property
    def stuck(self) -> bool:
        """Whether neither waiting nor another session helps before somebody mends what :attr:`problem` names."""
        return False

    @property
    def refused(self) -> str:
        """What MLflow will never show, and why; empty when there is nothing of that kind."""
        return ""

    @property
    def steps(self) -> int:
        """Grows with everything that is done, however little: whoever waits can tell slow from stopped."""
        return 0


class NullTracker(Tracker):
    """Tracks nothing."""

    def start(self, spec_text: str, params: Mapping[str, str], note: str = "") -> None:
        """Nothing to begin."""

    def push(self, rows: Iterable[Row]) -> None:
        """Rows stay in the ledger only."""

    def catch_up(self, table: pa.Table) -> None:
        """Rows stay in the ledger only."""

    def finish(self, artifacts: Iterable[Artifact], metrics: Mapping[str, float], note: str, status: str) -> None:
        """Nothing to end."""

    def backlog(self) -> int:
        return 0

    def wait(self, seconds: float) -> bool:
        return True

    def close(self, wait: float) -> int:
        return 0


class MlflowTracker(Tracker):
    """One experiment per sweep, a parent run for the sweep, a nested run per job.

    Args:
        uri: MLflow tracking URI.
        experiment: name; the sweep's.
        artifact_root: where a new experiment keeps artifacts; None leaves that to a tracking server.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: str | None = None) -> None:
        self._uri = uri
        self._shown = redacted(uri)  # a password may stand in it
        self._experiment = experiment
        self._artifact_root = artifact_root
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pending = 0
        self._count_lock = threading.Lock()
        self._closing = False
        self._stop = threading.Event()
        self._problem = ""
        self._stuck = False
        self._refusals: list[tuple[int, str]] = []  # rows (none for laws and the like), reason
        self._steps = 0
        self._reached = 0  # steps of getting ready, in the try that came furthest
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._projection: Any = None

    def start(self, spec_text: str, params: Mapping[str, str], note: str = "") -> None:
        self._queue.put(("start", spec_text, dict(params), note))
        self._thread.start()

    def describe(self, note: str) -> None:
        self._queue.put(("describe", note))

    def push(self, rows: Iterable[Row]) -> None:
        batch = list(rows)
        with self._count_lock:
            self._pending += len(batch)
        if batch:
            self._queue.put(("rows", batch))

    def catch_up(self, table: pa.Table) -> None:
        with self._count_lock:
            self._pending += table.num_rows
        self._queue.put(("catch_up", table))

    def finish(self, artifacts: Iterable[Artifact], metrics: Mapping[str, float], note: str, status: str) -> None:
        self._queue.put(("finish", list(artifacts), dict(metrics), note, status))

    def backlog(self) -> int:
        with self._count_lock:
            return self._pending

    def run_id(self, job_id: str) -> str | None:
        return run_id_of(self._experiment, job_id) if self._uri.startswith("sqlite:") else None

    @property
    def problem(self) -> str:
        return self._problem

    @property
    def stuck(self) -> bool:
        return self._stuck

    @property
    def refused(self) -> str:
        if not self._refusals:
            return ""
        rows = sum(count for count, _ in self._refusals)
        what = f"{rows} row{'s' if rows > 1 else ''}" if rows else "a part of the sweep's own run"
        return f"MLflow refuses {what}, which the ledger has ({self._refusals[-1][1]})"

    @property
    def steps(self) -> int:
        return self._steps

    def wait(self, seconds: float) -> bool:
        if not self._closing:
            self._closing = True
            self._queue.put(("close",))
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self, wait: float) -> int:
        self.wait(wait)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)
        return self.backlog()

    def _work(self) -> None:
        waiting: list[tuple[Any, ...]] = []
        while not (self._stop.is_set() or self._stuck):
            try:
                message = waiting.pop() if waiting else self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if message[0] == "close":
                return
            if message[0] == "rows":
                message, waiting = self._gather(message)
            self._insist(message)

    def _settle(self, message: tuple[Any, ...]) -> None:
        """MLflow shows these rows now, or never will."""
        if message[0] == "rows":
            self._settled(len(message[1]))

    def _settled(self, rows: int) -> None:
        with self._count_lock:
            self._pending -= rows
        self._steps += 1

    def _gather(self, first: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[tuple[Any, ...]]]:
        """What is pushed within a moment, as one batch; and the next message of another kind, which ends the waiting."""
        rows = list(first[1])
        deadline = time.monotonic() + _GATHER_SECONDS
        while len(rows) < _BATCH:
            try:
                message = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if message[0] != "rows":
                return ("rows", rows), [message]
            rows += message[1]
        return ("rows", rows), []

    def _insist(self, message: tuple[Any, ...]) -> None:
        """Handle one message, again and again while the server does not answer."""
        attempt = 0
        while not self._stop.is_set():
            try:
                self._handled(message)
                self._problem = ""
                self._settle(message)
                return
            except Unusable as error:
                self._problem, self._stuck = f"MLflow: {safe_line(error, 600)}", True
                log.error("%s", self._problem)
                return
            except Exception as error:
                self._problem = f"MLflow at {self._shown}: {safe_line(error, 200)}"
                if _hopeless(error) and attempt >= _REFUSALS:
                    if message[0] == "rows" and len(message[1]) > 1:
                        for row in message[1]:  # one of them is to blame
                            self._insist(("rows", [row]))
                        return
                    log.error("%s; left out, the ledger has it", self._problem)
                    self._refusals.append((1 if message[0] == "rows" else 0, safe_line(error, 200)))
                    self._problem = ""
                    self._settle(message)
                    return
                if attempt == 0:
                    log.warning("%s; trying again", self._problem)
                self._stop.wait(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
                attempt += 1

    def _handled(self, message: tuple[Any, ...]) -> None:
        """:meth:`_handle`, whose errors tell what can never come right."""
        try:
            self._handle(message)
        except Unusable:
            raise
        except Exception as error:
            check_damage(self._uri, error)
            raise

    def _handle(self, message: tuple[Any, ...]) -> None:
        if self._projection is None:
            # Heavy import, and the first use of a database runs its migrations: both belong to this thread.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # Trying again is ours: MLflow's own retries would sit out minutes after the server is back, say nothing
            # meanwhile, and create a run anew without looking whether the first request arrived.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
            self._projection = self._connected()
        kind = message[0]
        if kind == "start":
            self._projection.begin(*message[1:])
        elif kind == "describe":
            self._projection.describe(message[1])
        elif kind == "rows":
            self._projection.show([_run_data(row) for row in message[1]])
        elif kind == "catch_up":
            self._catch_up(message[1])
        else:
            self._projection.end(*message[1:])

    def _catch_up(self, table: pa.Table) -> None:
        """Portion by portion, each as if it had just been pushed: one row that MLflow refuses costs that row only."""
        missing = self._projection.missing(table)
        self._settled(table.num_rows - len(missing))
        for begin in range(
            0, len(missing), _PORTION
        ):  # rows hold per-example scores: not all at once as Python objects
            if self._stop.is_set() or self._stuck:
                return
            rows = table.take(pa.array(missing[begin : begin + _PORTION], pa.int64())).to_pylist()
            self._insist(("rows", rows))

    def _connected(self) -> Any:
        from isoflop.track.projection import Projection

        reached = 0

        def alive() -> None:
            nonlocal reached
            reached += 1
            if reached > self._reached:  # another try that gets as far as the last one is no progress
                self._reached, self._steps = reached, self._steps + 1

        try:
            return Projection(self._uri, self._experiment, self._artifact_root, alive=alive)
        except Exception as error:
            if _hopeless(error) or _OUTDATED in str(error):  # of the address, or of what lies there
                raise Unusable(f"{self._shown}: {safe_line(error)}") from error
            raise


def _run_data(row: Row) -> RunData:
    try:
        return RunData.of(row)
    except Exception as error:  # of a ledger that somebody else wrote, say
        raise ValueError(f"job {row.get('job_id')}: {type(error).__name__}: {error}") from error


def _hopeless(error: Exception) -> bool:
    """Whether the message itself is at fault, so that no server will ever take it."""
    if isinstance(error, OSError):  # of the network, though some of them are ValueErrors, too
        return False
    return getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE" or isinstance(
        error, (LookupError, TypeError, ValueError)
    )
