"""From a table to the arrays of a fit: mapped columns, filters, groups, weights, and errors in one line each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, parse
from isoflop.laws.base import LawForm

Tabular = Any  # pyarrow.Table, pandas.DataFrame, a mapping of columns, or anything with __arrow_c_stream__


def as_table(data: Tabular) -> pa.Table:
    """``data`` as an Arrow table; raises UserError for something that is no table or has duplicate columns."""
    try:
        if isinstance(data, pa.Table):
            table = data
        elif isinstance(data, Mapping):
            table = pa.table({str(k): v for k, v in data.items()})
        elif type(data).__module__.split(".")[0] == "pandas":
            table = pa.Table.from_pandas(data, preserve_index=False)
        else:
            table = pa.table(data)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"table: {str(error).splitlines()[0]}; allowed: Arrow table, DataFrame, dict of columns"
        ) from None
    twice = sorted({c for c in table.column_names if table.column_names.count(c) > 1})
    if twice:
        raise UserError(f"table: column {twice[0]!r} occurs more than once")
    return table


def query(sql: str, table: pa.Table, name: str = "results") -> pa.Table:
    """Run one SQL statement (DuckDB) on an Arrow table, without copying it; it sees that one table and no files."""
    import duckdb

    connection = duckdb.connect(config={"enable_external_access": "false"})
    try:
        connection.register(name, table)
        connection.execute("SET lock_configuration = true")
        statements = len(duckdb.extract_statements(sql))
        found = connection.sql(sql) if statements == 1 else None
        if found is None:
            raise UserError(f"sql: {statements} statements in {sql!r}; allowed: one query that returns rows")
        return found.to_arrow_table()
    except duckdb.Error as error:
        raise UserError(f"sql: {str(error).splitlines()[0]}") from None
    finally:
        connection.close()


def where(table: pa.Table, condition: str | None) -> pa.Table:
    """The rows for which an SQL condition holds."""
    if not condition:
        return table
    import duckdb

    try:
        duckdb.SQLExpression(condition)  # one expression: nothing that could end the condition and add rows
    except duckdb.Error as error:
        raise UserError(f"where: {str(error).splitlines()[0]}; allowed: one condition on a row") from None
    return query(f"select * from results where ({condition}\n)", table)


def column(table: pa.Table, text: str, where_: str) -> Array:
    """A column, or an expression of columns, as float64 with nan for nulls.

    ``metrics.nll`` and ``footprint.train_tokens`` are entries of a ledger's map columns, nan in rows without them.
    """
    if text in table.column_names:
        return _numbers(table, text, where_)
    parsed = parse(text, where_)
    for name in sorted(parsed.names):
        if name not in table.column_names and not _is_entry(table, name):
            raise unknown("column", name, table.column_names, where_)
    if not parsed.names:
        raise UserError(f"{where_}: {text!r} names no column; allowed: {', '.join(table.column_names)}")
    return parsed({n: _numbers(table, n, where_) for n in parsed.names})


def _is_entry(table: pa.Table, name: str) -> bool:
    record, dot, _ = name.partition(".")
    return bool(dot) and record in table.column_names and pa.types.is_map(table.schema.field(record).type)


def _entries(table: pa.Table, name: str, where_: str) -> Array:
    """One key of a map column."""
    record, _, key = name.partition(".")
    rows = [dict(row or ()) for row in table[record].to_pylist()]
    known = sorted({k for row in rows for k in row})
    if key not in known:
        raise unknown(f"entry of {record}", key, known, where_)
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _numbers(table: pa.Table, name: str, where_: str) -> Array:
    if name not in table.column_names:
        return _entries(table, name, where_)
    kind = table.schema.field(name).type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        raise UserError(f"{where_}: column {name!r} is of type {kind}; a number is needed")
    values = (
        table[name].cast(pa.float64())
        if not pa.types.is_boolean(kind)
        else table[name].cast(pa.int8()).cast(pa.float64())
    )
    return values.combine_chunks().to_numpy(zero_copy_only=False)


@dataclass
class GroupData:
    """The rows of one group, cleaned.

    Attributes:
        key: group columns and their values.
        x: variables (n,); y: target (n,); w: weights (n,), 1 unless given.
        cluster: integer labels (n,) for cluster resampling, or None.
        dropped: how many rows were left out, by reason.
        data_hash: SHA-256 of the numbers above, independent of the rows' order.
    """

    key: dict[str, Any]
    x: dict[str, Array]
    y: Array
    w: Array
    cluster: np.ndarray | None
    dropped: dict[str, int]
    data_hash: str = ""
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Rows used."""
        return len(self.y)

    def take(self, rows: np.ndarray) -> GroupData:
        """A subset of the rows (mask or positions)."""
        part = GroupData(
            self.key,
            {v: a[rows] for v, a in self.x.items()},
            self.y[rows],
            self.w[rows],
            None if self.cluster is None else self.cluster[rows],
            self.dropped,
        )
        part.data_hash = hash_rows(part)
        return part


def hash_rows(data: GroupData) -> str:
    """Hexadecimal SHA-256 of variables, target and weights; the order of the rows does not matter."""
    names = sorted(data.x)
    stacked = np.stack([*(data.x[v] for v in names), data.y, data.w], axis=1)
    stacked = stacked[np.lexsort(stacked.T[::-1])]
    head = ",".join([*names, "y", "w"]).encode()
    return hashlib.sha256(head + np.ascontiguousarray(stacked, dtype="<f8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Columns:
    """How a table's columns become the law's variables (kept in every result)."""

    y: str
    variables: dict[str, str]
    weights: str | None = None
    cluster: str | None = None
    condition: str | None = None


def load_groups(table: pa.Table, form: LawForm, mapping: Columns, by: Sequence[str], log_y: bool) -> list[GroupData]:
    """Split, check and clean a table.

    Raises:
        UserError: for a missing column, sizes that are not positive, no rows, or a target <= 0 under a log objective.
    """
    table = where(table, mapping.condition)
    for name in by:
        if name not in table.column_names:
            raise unknown("column", name, table.column_names, "by")
    if table.num_rows == 0:
        raise UserError("table: no rows to fit" + (f" after where {mapping.condition!r}" if mapping.condition else ""))
    x = {v: column(table, mapping.variables[v], f"map {v}") for v in form.variable_names}
    y = column(table, mapping.y, "y")
    w = np.ones_like(y) if mapping.weights is None else column(table, mapping.weights, "weights")
    labels = None if mapping.cluster is None else _labels(table, [mapping.cluster])[0]
    good = np.isfinite(y) & np.isfinite(w) & np.all([np.isfinite(a) for a in x.values()], axis=0)
    _check_domain(form, x, y, w, good, log_y, mapping)
    group_of, keys = _labels(table, list(by)) if by else (np.zeros(len(y), dtype=np.int64), [{}])
    groups = []
    for g, key in enumerate(keys):
        mine = group_of == g
        rows = np.flatnonzero(mine & good)
        dropped = {"not finite": int(np.sum(mine & ~good))} if np.any(mine & ~good) else {}
        if not len(rows):
            raise UserError(f"table: no finite rows to fit{describe_key(key)} (y = {mapping.y!r})")
        data = GroupData(
            key, {v: a[rows] for v, a in x.items()}, y[rows], w[rows], None if labels is None else labels[rows], dropped
        )
        data.data_hash = hash_rows(data)
        groups.append(data)
    return groups


def describe_key(key: Mapping[str, Any]) -> str:
    """`` [method=quecc, task=reading]``, or nothing."""
    return f" [{', '.join(f'{k}={v}' for k, v in key.items())}]" if key else ""


def _check_domain(
    form: LawForm, x: dict[str, Array], y: Array, w: Array, good: np.ndarray, log_y: bool, mapping: Columns
) -> None:
    for variable in form.variables:
        bad = good & (x[variable.name] <= 0)
        if variable.positive and bad.any():
            row = int(np.flatnonzero(bad)[0])
            value, source = x[variable.name][row], mapping.variables[variable.name]
            raise UserError(f"map {variable.name}: {source!r} is {value:g} in row {row}; a size must be > 0")
    if log_y and np.any(good & (y <= 0)):
        row = int(np.flatnonzero(good & (y <= 0))[0])
        raise UserError(f"y: {mapping.y!r} is {y[row]:g} in row {row}; a log objective needs y > 0")
    if np.any(good & (w < 0)):
        row = int(np.flatnonzero(good & (w < 0))[0])
        raise UserError(f"weights: {mapping.weights!r} is {w[row]:g} in row {row}; weights must be >= 0")


def _labels(table: pa.Table, names: list[str]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Integer labels (n,) and the distinct keys in order of first appearance."""
    for name in names:
        if name not in table.column_names:
            raise unknown("column", name, table.column_names, "cluster" if len(names) == 1 else "by")
    lists = [table[name].to_pylist() for name in names]
    seen: dict[tuple[Any, ...], int] = {}
    labels = np.array([seen.setdefault(row, len(seen)) for row in zip(*lists, strict=True)], dtype=np.int64)
    return labels, [dict(zip(names, key, strict=True)) for key in seen]
