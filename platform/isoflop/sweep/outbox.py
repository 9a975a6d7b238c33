"""Rows on their way to the ledger: written a few at a time, kept until they are durable."""

from __future__ import annotations

import time
from typing import Any

from isoflop.ledger import Ledger

_COMMIT_SECONDS = 0.25
_COMMIT_ROWS = 200
_FOLD_FILES = 512  # of a long session; fewer wait for the next one


class Outbox:
    """Rows that the ledger does not have yet."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._rows: list[dict[str, Any]] = []
        self._last_commit = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """A job has ended."""
        self._rows.append(row)

    @property
    def due(self) -> bool:
        """Whether the rows have waited long enough, or are many."""
        # real seconds, also in simulated time: this paces writes to a disk
        return time.monotonic() - self._last_commit >= _COMMIT_SECONDS or len(self._rows) >= _COMMIT_ROWS

    def commit(self) -> list[dict[str, Any]]:
        """Write all rows; returns them as the ledger has them."""
        # Kept until the ledger has them: whatever interrupts this, they are written (again) at the end.
        rows = self._rows
        self._ledger.append(rows)
        self._rows = []
        self._ledger.fold(_FOLD_FILES)
        self._last_commit = time.monotonic()
        first = self._ledger.sequence - len(rows) + 1
        for offset, row in enumerate(rows):
            row["sequence"] = first + offset
        return rows
