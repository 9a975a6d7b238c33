"""Measured costs as formulas: latency, energy or money of the rows, turned into an expression that a frontier can spend.

A cost model is a sum of non-negative terms (a fixed part, a part per parameter, a part per token …) fitted to the measured column by
relative error, so that cheap and dear configurations count alike. It says how far off it is; use it inside the measured range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from isoflop.core.errors import UserError
from isoflop.core.expressions import parse
from isoflop.laws.table import Tabular, as_table, column

DEFAULT_TERMS = ("1", "N", "N*V", "V")


@dataclass(frozen=True)
class MeasuredCost:
    """A fitted cost formula.

    Attributes:
        formula: an expression in the variables, for ``frontier(cost=…)``.
        coefficients: per term; zero terms are left out of the formula.
        typical_error, worst_error: median and largest relative error over the rows.
        n: rows used.
    """

    formula: str
    coefficients: dict[str, float]
    typical_error: float
    worst_error: float
    n: int


def measured_cost(
    table: Tabular, measured: str, map: Mapping[str, str] | None = None, terms: Sequence[str] = DEFAULT_TERMS
) -> MeasuredCost:
    """Fit ``measured`` (a column, e.g. ``"latency_s"``) as a sum of non-negative multiples of ``terms``.

    Args:
        map: variable -> column or expression, as in ``fit``; a variable that is not listed is the column of its name.
        terms: expressions in the variables; ``"1"`` is the fixed part.
    """
    source, mapping = as_table(table), dict(map or {})
    y = column(source, measured, "measured")
    parsed = [parse(t, "terms") for t in terms]
    names = sorted(frozenset().union(*(p.names for p in parsed)))
    x = {v: column(source, mapping.get(v, v), f"map {v}") for v in names}
    design = np.stack([np.broadcast_to(p(x), y.shape) for p in parsed], axis=1)
    good = np.isfinite(y) & (y > 0) & np.isfinite(design).all(axis=1)
    if good.sum() <= len(terms):
        raise UserError(f"measured: {measured!r} has {good.sum()} usable rows for {len(terms)} terms")
    relative = design[good] / y[good, None]
    norm = np.maximum(np.linalg.norm(relative, axis=0), 1e-300)
    c = nnls(relative / norm, np.ones(int(good.sum())))[0] / norm
    error = np.abs(relative @ c - 1)
    kept = [f"{float(v)!r}*({t})" for v, t in zip(c, terms, strict=True) if v > 0]
    return MeasuredCost(
        formula=" + ".join(kept),
        coefficients=dict(zip(terms, (float(v) for v in c), strict=True)),
        typical_error=float(np.median(error)),
        worst_error=float(np.max(error)),
        n=int(good.sum()),
    )
