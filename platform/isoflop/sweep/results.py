"""What a finished (or half finished) sweep says: usable rows, fitted laws, frontiers, and the files that record them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def usable(table: pa.Table) -> pa.Table:
    """Rows that laws may use: jobs that ran to their end. A pruned job saw only some examples and is left out."""
    return table.filter(pc.equal(table["status"], "ok"))


class Findings:
    def save(self, store, name): ...
    def artifacts(self): return []
    def metrics(self): return {}
    def markdown(self): return ""
def find(spec, table): return Findings()
