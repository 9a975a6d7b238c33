"""Append-only ledger of one sweep.

Each commit is one Parquet file, written aside, flushed and renamed (or uploaded) in one step: a reader sees all of a
commit or nothing. A file that cannot be read is set aside, and its jobs run again. Many small files are folded into one
when a driver opens the ledger; the folded file lists what it replaces, so that a kill between writing it and deleting
the others doubles nothing.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from isoflop.core.errors import UserError
from isoflop.core.text import safe_line
from isoflop.ledger.schema import SCHEMA, VERSION, check, completed, empty, latest, to_table
from isoflop.ledger.store import Store, StoreError

log = logging.getLogger(__name__)
_REPLACES = b"isoflop.replaces"
_FOLD_AT = 64  # files
_FOLD = "-fold-"  # in the name of a file that replaces others
_LEASE_SECONDS = 120.0


class LedgerBusy(UserError):
    """Another driver writes this sweep."""


class Ledger:
    """Reads and appends rows. Any number of readers; one writer at a time (:meth:`lock`).

    Args:
        store: where sweeps are kept.
        sweep: name.
    """

    def __init__(self, store: Store, sweep: str) -> None:
        self.store = store
        self.sweep = sweep
        self.folder = store.path("sweeps", sweep, "ledger")
        self.set_aside: list[str] = []
        self._lock_file: IO[str] | None = None
        self._lease: str | None = None
        self._lease_time = 0.0
        self._sequence = 0
        self._commits = 0  # files that no fold has taken in yet

    # reading

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """The row that counts for each job.

        Args:
            columns: read only these (fast on large ledgers); ``job_id`` and ``sequence`` are used to choose rows.
        """
        wanted = None if columns is None else list(dict.fromkeys([*columns, "job_id", "sequence"]))
        table = latest(self.history(wanted))
        return table if columns is None else table.select(columns)

    def history(self, columns: list[str] | None = None) -> pa.Table:
        """Every row ever committed, repeated attempts of a job included."""
        for _ in range(20):
            try:
                return self._read_once(columns)
            except FileNotFoundError:  # a writer folded files between our listing and our reading
                time.sleep(0.05)
        raise UserError(f"{self.folder}: files keep vanishing while they are read")

    def _read_once(self, columns: list[str] | None) -> pa.Table:
        tables, replaced = self._load(self.store.names(self.folder, ".parquet"), columns)
        kept = [t for name, t in tables.items() if name not in replaced]
        if not kept:
            return empty() if columns is None else empty().select(columns)
        return pa.concat_tables(kept)

    def _load(self, names: Iterable[str], columns: list[str] | None) -> tuple[dict[str, pa.Table], set[str]]:
        """File name -> rows, and the names of the files that some of these replace."""
        tables: dict[str, pa.Table] = {}
        replaced: set[str] = set()
        for name in names:
            loaded = self._read_file(name, columns)
            if loaded is None:
                continue
            tables[name], named = loaded
            replaced |= named
        return tables, replaced

    def _read_file(self, name: str, columns: list[str] | None) -> tuple[pa.Table, set[str]] | None:
        """A file's rows, and the names of the files that it replaces; None for one that is not what a ledger wrote."""
        path = f"{self.folder}/{name}"
        with self.store.input(path) as source:
            try:
                parquet = pq.ParquetFile(source, page_checksum_verification=True)
                metadata = parquet.schema_arrow.metadata or {}
                version = metadata.get(b"isoflop.ledger", b"").decode()
                if not version:
                    raise pa.ArrowInvalid("not a file of a ledger")
                if version != VERSION:
                    raise UserError(f"{path}: ledger version {version}; this isoflop reads version {VERSION}")
                names = parquet.schema_arrow.names
                if len(set(names)) < len(names):
                    raise pa.ArrowInvalid("a column stands twice in it")
                unknown = [name for name in names if name not in SCHEMA.names]
                if unknown:  # folding would lose them
                    raise UserError(
                        f"{path}: columns {', '.join(unknown)} were added by a later isoflop; update this one"
                    )
                table = parquet.read(columns=columns)
                table.validate(full=True)  # texts that are no UTF-8, maps without keys
                found = completed(table, columns)
                check(found)
                return found, _replaced(metadata)
            except (MemoryError, UserError):  # also Arrow's own: says nothing about the file
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                self._set_aside(name, error)
                return None

    def _set_aside(self, name: str, error: Exception) -> None:
        """A torn or foreign file: keep it for inspection, out of the way. Only the writer moves files."""
        if name not in self.set_aside:
            log.warning("%s", safe_line(f"{self.folder}/{name} cannot be read ({error}); its jobs will run again"))
            self.set_aside.append(name)
        if self.locked:
            self.store.move(f"{self.folder}/{name}", self.store.path("sweeps", self.sweep, "torn"))

    # writing

    @property
    def sequence(self) -> int:
        """Number of the last row written."""
        return self._sequence

    def append(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Commit rows; they are durable when this returns. Returns how many.

        Raises:
            StoreError: nothing of these rows was kept; earlier commits are untouched.
        """
        self._need_lock()
        numbered = []
        for row in rows:
            self._sequence += 1
            numbered.append({**row, "sequence": self._sequence})
        if numbered:
            self._write(to_table(numbered), f"{self._sequence:012d}-{uuid.uuid4().hex[:8]}.parquet")
            self._commits += 1
        return len(numbered)

    def fold(self, at_least: int = _FOLD_AT) -> bool:
        """Fold commits into one file once there are ``at_least`` of them; True when it did.

        Folded files are folded again when there are many, so that rows are rewritten a few times at most, however long
        a sweep runs.
        """
        self._need_lock()
        if self._commits < at_least:
            return False
        names = self.store.names(self.folder, ".parquet")
        folds = [n for n in names if _FOLD in n]
        chosen = names if len(folds) >= _FOLD_AT else [n for n in names if _FOLD not in n]
        tables, _ = self._load(chosen, None)
        if tables:
            metadata = {**(SCHEMA.metadata or {}), _REPLACES: json.dumps(chosen).encode()}
            table = pa.concat_tables(tables.values()).replace_schema_metadata(metadata)
            self._write(table, f"{self._sequence:012d}{_FOLD}{uuid.uuid4().hex[:8]}.parquet")
            self._delete(chosen)
        self._commits = 0
        return True

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.store.delete(f"{self.folder}/{name}")

    def _write(self, table: pa.Table, name: str) -> None:
        buffer = io.BytesIO()
        # Without dictionaries a commit of a few rows takes half the time; in a folded file they save space.
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, use_dictionary=_FOLD in name)
        self.keep_lease()
        self.store.write(f"{self.folder}/{name}", buffer.getvalue())

    # one writer

    @property
    def locked(self) -> bool:
        """Whether this object holds the writer's lock."""
        return self._lock_file is not None or self._lease is not None

    def lock(self) -> Ledger:
        """Become the sweep's writer.

        On a local store the kernel releases the lock when the process dies, however it dies. On a remote store it is a
        lease that a dead driver leaves behind for at most two minutes.

        Raises:
            LedgerBusy: another driver holds it; says which process on which host.
        """
        if self.locked:
            return self
        path = self.store.path("sweeps", self.sweep, "lock")
        me = f"process {os.getpid()} on {socket.gethostname()}"
        if self.store.local is not None:
            self.store.no_links("sweeps", self.sweep, "ledger")
            file = os.fdopen(self.store.open_plain(path, os.O_RDWR | os.O_CREAT), "r+", errors="replace")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = safe_line(file.read(), 200) or "another process"
                file.close()
                raise LedgerBusy(
                    f"sweep {self.sweep!r} is being written by {holder}; wait for it, stop it, or give this run another name"
                ) from None
            try:
                file.truncate(0)
                os.write(file.fileno(), me.encode())  # not buffered: closing must not try once more on a full disk
            except OSError as error:
                file.close()
                raise StoreError(f"store {self.store.shown} cannot be written: {error.strerror}: {path}") from None
            self._lock_file = file
        else:
            self._take_lease(path, me)
        self._take_stock()
        return self

    def _take_stock(self) -> None:
        """Find the last row's number; finish a fold that was killed before it deleted what it replaced."""
        tables, replaced = self._load(self.store.names(self.folder, ".parquet"), ["sequence"])
        self._delete(replaced & set(tables))
        self._sequence = max((s for t in tables.values() for s in t["sequence"].to_pylist()), default=0)
        self._commits = sum(1 for name in tables if name not in replaced and _FOLD not in name)

    def keep_lease(self) -> None:
        """Keep a lease on a remote store alive; call it every few seconds. Nothing to do on a local store.

        Raises:
            LedgerBusy: another driver has taken over, because this one could not renew for two minutes.
        """
        if self._lease is None or time.monotonic() - self._lease_time < _LEASE_SECONDS / 4:
            return
        path = self.store.path("sweeps", self.sweep, "lock")
        holder = _lease_of(self.store.read(path)).get("holder")
        if holder not in (None, self._lease):
            self._lease = None
            raise LedgerBusy(f"sweep {self.sweep!r} was taken over by {holder}; this driver stops")
        self._renew(path)

    def _renew(self, path: str) -> None:
        self.store.write(path, json.dumps({"holder": self._lease, "time": time.time()}).encode())
        self._lease_time = time.monotonic()

    def unlock(self) -> None:
        """Let another driver write."""
        if self._lock_file is not None:
            self._lock_file.truncate(0)
            self._lock_file.close()
            self._lock_file = None
        if self._lease is not None:
            path = self.store.path("sweeps", self.sweep, "lock")
            if _lease_of(self.store.read(path)).get("holder") == self._lease:
                self.store.delete(path)
            self._lease = None

    def _take_lease(self, path: str, me: str) -> None:
        held = _lease_of(self.store.read(path))
        age = time.time() - held.get("time", 0)
        if abs(age) < _LEASE_SECONDS:  # one from the future is of a wrong clock, and would bar the way for ever
            raise LedgerBusy(
                f"sweep {self.sweep!r} is being written by {safe_line(held.get('holder'), 200)} (seen {age:.0f} s ago); wait for it or stop it"
            )
        self._lease = f"{me} {uuid.uuid4().hex[:6]}"
        self._renew(path)
        time.sleep(0.2)
        now = _lease_of(self.store.read(path))
        if now.get("holder") != self._lease:
            self._lease = None
            raise LedgerBusy(f"sweep {self.sweep!r} is being written by {now.get('holder')}; wait for it or stop it")

    def _need_lock(self) -> None:
        if not self.locked:
            raise RuntimeError("a ledger is written only under its lock")


def _lease_of(content: bytes | None) -> dict[str, Any]:
    """What a lock file says; nothing when there is none or it is damaged."""
    try:
        found = json.loads(content or b"{}")
        return {**found, "time": float(found.get("time", 0))}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return {}


def _replaced(metadata: Mapping[bytes, bytes]) -> set[str]:
    """The names of the files that a fold took in. ValueError for what no fold wrote."""
    names = json.loads(metadata.get(_REPLACES, b"[]"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("what it replaces is no list of names")
    return set(names)
