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
    except (TypeError, ValueError, OverflowError, AttributeError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"table: {reason}; allowed: Arrow table, DataFrame, dict of columns") from None
    twice = sorted({c for c in table.column_names if table.column_names.count(c) > 1})
    if twice:
        raise UserError(f"table: column {twice[0]!r} occurs more than once")
    return table


def query(sql: str, table: pa.Table, name: str = "results", what: str = "sql") -> pa.Table:
    """Run one SQL statement (DuckDB) on an Arrow table, without copying it; it sees that one table and no files.

    ``what``: what the text is, for the error's line.
    """
    import duckdb

    _check_text(sql, what)
    connection = duckdb.connect(config={"enable_external_access": "false"})
    try:
        connection.register(name, table)
        connection.execute("SET lock_configuration = true")
        statements = len(duckdb.extract_statements(sql))
        found = connection.sql(sql) if statements == 1 else None
        if found is None:
            raise UserError(f"{what}: {statements} statements in {sql!r}; allowed: one query that returns rows")
        return found.to_arrow_table()
    except (duckdb.Error, RuntimeError, ValueError, TypeError, pa.ArrowException) as error:
        # beside its own errors, it lets through what it meets in columns of types that it does not know
        raise UserError(f"{what}: {next(iter(str(error).splitlines()), type(error).__name__)}") from None
    finally:
        connection.close()


def where(table: pa.Table, condition: str | None) -> pa.Table:
    """The rows for which an SQL condition holds."""
    if not condition:
        return table
    import duckdb

    _check_text(condition, "where")
    try:
        duckdb.SQLExpression(condition)  # one expression: nothing that could end the condition and add rows
    except duckdb.Error as error:
        raise UserError(f"where: {str(error).splitlines()[0]}; allowed: one condition on a row") from None
    return query(f"select * from results where ({condition}\n)", table, what="where")


def _check_text(text: str, what: str) -> None:
    """Refuse text that no UTF-8 can hold: a command line of other bytes arrives as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode(errors="backslashreplace").decode()
        raise UserError(f"{what}: {shown!r} is not UTF-8 (character {error.start})") from None


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
    known = sorted({str(k) for row in rows for k in row})
    if key not in known:
        raise unknown(f"entry of {record}", key, known, where_)
    values = [row.get(key) for row in rows]
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, (bool, int, float)):
            raise UserError(f"{where_}: entry {name!r} is {_excerpt(value)} in row {index}; a number is needed")
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _numbers(table: pa.Table, name: str, where_: str) -> Array:
    if name not in table.column_names:
        return _entries(table, name, where_)
    values, kind = table[name], table.schema.field(name).type
    if pa.types.is_dictionary(kind):  # of a categorical: the values themselves
        kind = kind.value_type
        values = values.cast(kind)
    if pa.types.is_null(kind):
        raise UserError(f"{where_}: column {name!r} has no values; numbers are needed")
    if pa.types.is_boolean(kind):
        values = values.cast(pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise UserError(f"{where_}: column {name!r} is of type {kind}{_first_text(values)}; a number is needed")
    numbers = values.cast(
        pa.float64(), safe=False
    )  # whole numbers beyond 2^53 are rounded, as all numbers of a fit are
    return numbers.combine_chunks().to_numpy(zero_copy_only=False)


def _first_text(values: pa.ChunkedArray) -> str:
    """Where a column of text holds the first value that is no number; the first value, where all are numbers in quotes."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return ""
    first = None
    for index, text in enumerate(values.to_pylist()):
        if text is None:
            continue
        first = first or (index, text)
        try:
            float(text)
        except ValueError:
            comma = ", with a comma for a point" if _is_number(text.replace(",", ".")) else ""
            return f": row {index} (the first is 0) holds {_excerpt(text)}{comma}"
    return "" if first is None else f": its numbers are text, such as {_excerpt(first[1])} in row {first[0]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


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
    good = np.isfinite(y) & np.isfinite(w) & np.all([np.isfinite(a) for a in x.values()], axis=0)
    reasons = {"not finite": ~good}
    labels = None
    if mapping.cluster is not None:
        labels, names = label_rows(table, [mapping.cluster], "cluster")
        nameless = [k for k, name in enumerate(names) if name[mapping.cluster] is None]
        reasons[f"without a {mapping.cluster}"] = good & np.isin(labels, nameless)
        good = good & ~np.isin(labels, nameless)
    _check_domain(form, x, y, w, good, log_y, mapping)
    group_of, keys = label_rows(table, by, "by") if by else (np.zeros(len(y), dtype=np.int64), [{}])
    groups = []
    for key, members in zip(keys, split_labels(group_of, len(keys)), strict=True):
        rows = members[good[members]]
        dropped = {why: int(np.sum(bad[members])) for why, bad in reasons.items() if np.any(bad[members])}
        if not len(rows) and not by:
            raise UserError(f"table: no finite rows to fit (y = {mapping.y!r})")
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


def label_rows(table: pa.Table, names: Sequence[str], where_: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Integer labels (n,) and the distinct keys in order of first appearance.

    Rows without a value, null or NaN, are one group, whose key is None.
    """
    for name in names:
        if name not in table.column_names:
            raise unknown("column", name, table.column_names, where_)
        if pa.types.is_nested(table.schema.field(name).type):
            raise UserError(
                f"{where_}: column {name!r} is of type {table.schema.field(name).type}; a single value per row is needed"
            )
    lists = [[None if value != value else value for value in table[name].to_pylist()] for name in names]
    seen: dict[tuple[Any, ...], int] = {}
    labels = np.array([seen.setdefault(row, len(seen)) for row in zip(*lists, strict=True)], dtype=np.int64)
    return labels, [dict(zip(names, key, strict=True)) for key in seen]


def split_labels(labels: np.ndarray, count: int) -> list[np.ndarray]:
    """Positions of the rows of each label 0 … count - 1, in the order of the rows."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, count)))


def of_group(table: pa.Table, key: Mapping[str, Any]) -> np.ndarray:
    """Boolean (n,): rows of a group, by the key that :func:`label_rows` gave it; columns that the table lacks do not count."""
    names = [name for name in key if name in table.column_names]
    if not names:
        return np.ones(table.num_rows, dtype=bool)
    labels, keys = label_rows(table, names, "by")
    wanted = {name: key[name] for name in names}
    return np.isin(labels, [k for k, found in enumerate(keys) if found == wanted])
