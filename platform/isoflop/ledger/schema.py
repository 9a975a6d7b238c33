"""The schema of a ledger row, in the order: identity, axes, quality, footprint, provenance.

Footprint columns and where their numbers come from:

* ``flops`` (per answer) is counted by ``torch.utils.flop_counter`` on one example, as are its parts ``flops_llm``,
  ``flops_vision`` and ``flops_method``; element-wise operations are not counted.
* ``seconds`` (per answer), ``weight_bytes``, ``kv_bytes`` and ``peak_bytes`` are measured on the live model.
* everything else that a task or method reports is in ``footprint``.

``traces`` holds what methods report of their inner steps (``Method.trace``): by name a list of (step, value). A long
series keeps an even selection of at most 200 points, its first and last among them, so steps are written down and not
implied by the position. In a composition names are prefixed with the method's (``evopress.fitness``).

Columns are only ever added, and a file without one reads as if it were null there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from isoflop.core.text import STORED, safe_text

VERSION = "1"
STATUSES = ("ok", "failed", "infeasible", "pruned")
_REQUIRED = ("job_id", "sequence", "status", "started", "finished", "trial_id", "model", "method", "task")

_IDENTITY = [
    ("job_id", pa.string()),
    ("trial_id", pa.string()),
    ("trial_number", pa.int64()),
    ("sweep", pa.string()),
    ("model", pa.string()),
    ("method", pa.string()),
    ("family", pa.string()),
    ("knobs", pa.string()),
    ("task", pa.string()),
    ("repeat", pa.int32()),
    ("seed", pa.int64()),
    ("status", pa.string()),
]
_AXES = [("N", pa.int64()), ("V", pa.float64()), ("Q", pa.float64()), ("ratio", pa.float64()), ("bits", pa.float64())]
_QUALITY = [
    ("error", pa.float64()),
    ("error_se", pa.float64()),
    ("n_examples", pa.int32()),
    ("metrics", pa.map_(pa.string(), pa.float64())),
    ("scores", pa.list_(pa.float32())),
    ("shard_sizes", pa.list_(pa.int32())),
]
_POINT = pa.struct([("step", pa.int64()), ("value", pa.float64())])
_TRACES = [("traces", pa.map_(pa.string(), pa.list_(_POINT)))]
FOOTPRINT_COLUMNS = (
    "flops",
    "flops_llm",
    "flops_vision",
    "flops_method",
    "seconds",
    "peak_bytes",
    "weight_bytes",
    "kv_bytes",
)
_FOOTPRINT = [(name, pa.float64()) for name in FOOTPRINT_COLUMNS] + [("footprint", pa.map_(pa.string(), pa.float64()))]
_PROVENANCE = [
    ("spec", pa.string()),
    ("versions", pa.map_(pa.string(), pa.string())),
    ("host", pa.string()),
    ("device", pa.string()),
    ("worker", pa.string()),
    ("attempt", pa.int32()),
    ("started", pa.timestamp("us", tz="UTC")),
    ("finished", pa.timestamp("us", tz="UTC")),
    ("wall_seconds", pa.float64()),
    ("model_was_warm", pa.bool_()),
    ("mlflow_run_id", pa.string()),
    ("error_type", pa.string()),
    ("error_text", pa.string()),
    ("sequence", pa.int64()),
]

SCHEMA = pa.schema(
    _IDENTITY + _AXES + _QUALITY + _FOOTPRINT + _PROVENANCE + _TRACES, metadata={"isoflop.ledger": VERSION}
)


def to_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table; absent columns are null."""
    return pa.Table.from_pylist([dict(r) for r in rows], schema=SCHEMA)


def completed(table: pa.Table, columns: Iterable[str] | None = None) -> pa.Table:
    """Rows read from a file in the schema's order and types; a column that the file did not know yet is null.

    Args:
        columns: only these.
    """
    wanted = set(SCHEMA.names if columns is None else columns)
    fields = [field for field in SCHEMA if field.name in wanted]
    known = set(table.column_names)
    arrays = [
        _safe(table[field.name].cast(field.type)) if field.name in known else pa.nulls(table.num_rows, field.type)
        for field in fields
    ]
    return pa.table(arrays, schema=pa.schema(fields))


def check(table: pa.Table) -> None:
    """Raise ValueError for rows that no ledger wrote: another program's, or another's idea of them.

    Args:
        table: some or all columns, as :func:`completed` gives them.
    """
    for name in _REQUIRED:
        if name in table.column_names and table[name].null_count:
            raise ValueError(f"column {name} is null in some rows")
    if "status" in table.column_names:
        wrong = pc.filter(table["status"], pc.invert(pc.is_in(table["status"], pa.array(STATUSES))))
        if len(wrong):
            raise ValueError(f"status {wrong[0].as_py()!r} is none of {', '.join(STATUSES)}")
    for name in ("spec", "knobs"):
        if name in table.column_names:
            for text in table[name].to_pylist():
                if text is not None and not isinstance(json.loads(text), dict):
                    raise ValueError(f"column {name} holds what is no block of JSON: {text[:40]!r}")


def _safe(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column whose texts, names in maps among them, are safe to show: another program may have written the file."""
    if not any(_unsafe(chunk) for chunk in column.chunks):
        return column
    values: list[Any]
    if pa.types.is_map(column.type):
        values = [
            None
            if v is None
            else [(safe_text(k, None), x if not isinstance(x, str) else safe_text(x, None)) for k, x in v]
            for v in column.to_pylist()
        ]
    else:
        values = [None if v is None else safe_text(v, None) for v in column.to_pylist()]
    return pa.chunked_array([pa.array(values, column.type)])


def _unsafe(array: pa.Array) -> bool:
    if pa.types.is_map(array.type):
        return _unsafe(array.keys) or _unsafe(array.items)
    return pa.types.is_string(array.type) and bool(pc.any(pc.match_substring_regex(array, STORED)).as_py())


def empty() -> pa.Table:
    """A table without rows."""
    return SCHEMA.empty_table()


def latest(table: pa.Table) -> pa.Table:
    """The row that counts for each job: the last one written. Order of first appearance is kept."""
    if table.num_rows == 0:
        return table
    indexed = table.append_column("_row", pa.array(range(table.num_rows), pa.int64()))
    newest = indexed.sort_by([("sequence", "ascending"), ("_row", "ascending")])
    grouped = newest.group_by("job_id", use_threads=False).aggregate(
        [("_row", "last"), ("sequence", "min"), ("_row", "min")]
    )
    order = pc.sort_indices(grouped, sort_keys=[("sequence_min", "ascending"), ("_row_min", "ascending")])
    return table.take(grouped["_row_last"].take(order))
