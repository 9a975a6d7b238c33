"""SQL on results: DuckDB reads the Arrow table ``results`` in place."""

from __future__ import annotations

import pyarrow as pa

from isoflop.laws.table import Tabular, as_table, query


def sql(text: str, table: Tabular) -> pa.Table:
    """Run a query in which the table is called ``results``; no copy is made, and the query sees no files.

    Raises:
        UserError: with DuckDB's first line when the query is wrong.
    """
    return query(text, as_table(table))
