"""Rows on their way to the ledger: written a few at a time, kept until they are durable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from isoflop.ledger import Ledger, to_table
from isoflop.sweep.rows import spoilt_row

_COMMIT_SECONDS = 0.25
_COMMIT_ROWS = 200
_FOLD_FILES = 512  # of a long session; fewer wait for the next one
_SPOILT = (ValueError, TypeError, OverflowError)  # what Arrow raises for a value that its column cannot hold
Row = dict[str, Any]


class Outbox:
    """Rows that the ledger does not have yet.

    Args:
        on_spoilt: told of a row that no ledger can take, as it was and as it is kept.
        clock: monotonic seconds; another one in simulated time, whose commits would else depend on how busy the host is.
    """

    def __init__(
        self,
        ledger: Ledger,
        on_spoilt: Callable[[Row, Row], None] = lambda was, kept: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_spoilt = on_spoilt
        self._clock = clock
        self._ledger = ledger
        self._rows: list[Row] = []
        self._last_commit = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        """A job has ended."""
        self._rows.append(row)

    @property
    def due(self) -> bool:
        """Whether the rows have waited long enough, or are many."""
        return self._clock() - self._last_commit >= _COMMIT_SECONDS or len(self._rows) >= _COMMIT_ROWS

    def commit(self) -> list[Row]:
        """Write all rows; returns them as the ledger has them."""
        # Kept until the ledger has them: whatever interrupts this, they are written (again) at the end.
        try:
            self._ledger.append(self._rows)
        except _SPOILT:  # one of them: the others must not be lost with it
            self._rows = [self._kept(row) for row in self._rows]
            self._ledger.append(self._rows)
        rows, self._rows = self._rows, []
        self._ledger.fold(_FOLD_FILES)
        self._last_commit = self._clock()
        first = self._ledger.sequence - len(rows) + 1
        for offset, row in enumerate(rows):
            row["sequence"] = first + offset
        return rows

    def _kept(self, row: Row) -> Row:
        try:
            to_table([row])
        except _SPOILT as error:
            kept = spoilt_row(row, error)
            self._on_spoilt(row, kept)
            return kept
        return row
