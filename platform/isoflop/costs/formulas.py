"""Costs as formulas on tables: the usual ones by name, anything else as a safe expression of columns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, parse
from isoflop.laws.table import Tabular, as_table, column

FORMULAS: dict[str, str] = {
    "inference": "2*N*(Q + V)",
    "inference-with-decode": "2*N*(Q + V + T)",
    "training": "6*N*D",
    "training+inference": "6*N*D + 2*N*D_inf",
    "kv-cache": "2*L*H_kv*d*(Q + V)*bits/8",
}


def cost_of(table: Tabular, formula: str, constants: Mapping[str, float] | None = None) -> Array:
    """The cost of every row.

    Args:
        formula: a name in ``FORMULAS`` or an expression of columns and ``constants``.

    Raises:
        UserError: for an unknown name, and for a row whose cost is not a positive number.
    """
    source, fixed = as_table(table), dict(constants or {})
    parsed = parse(FORMULAS.get(formula, formula), "cost")
    values: dict[str, Array | float] = {}
    for name in sorted(parsed.names):
        if name in fixed:
            values[name] = float(fixed[name])
        elif name in source.column_names:
            values[name] = column(source, name, "cost")
        else:
            raise unknown("column in cost", name, [*source.column_names, *fixed])
    cost = np.broadcast_to(parsed(values), (source.num_rows,))
    bad = np.isfinite(cost) & (cost <= 0)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(f"cost: {formula!r} is {cost[row]:g} in row {row}; a cost must be > 0")
    return cost


def add_cost(
    table: Tabular, formula: str, name: str = "cost", constants: Mapping[str, float] | None = None
) -> pa.Table:
    """The table with a cost column appended (or replaced)."""
    source = as_table(table)
    values = pa.array(cost_of(source, formula, constants))
    if name in source.column_names:
        return source.set_column(source.column_names.index(name), name, values)
    return source.append_column(name, values)
