"""Observations as the laws see them: sizes, group, value, standard error and cost, with repeats of a cell pooled.

Shapes: n rows, C cells (distinct places), K axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from isoflop.core.expressions import Array


@dataclass(frozen=True)
class Row:
    """One observation.

    Attributes:
        x: value per axis; group: position of the law (method, task …) that it informs.
        y: what was observed; se: its standard error from the number of examples, nan when unknown.
        cost: what it took, in the unit of the budget.
        trial: number of the trial it came from; role: ``pilot``, ``gain``, ``disagreement``, ``check`` or ``given``.
    """

    x: tuple[float, ...]
    group: int
    y: float
    se: float
    cost: float
    trial: int = -1
    role: str = "given"


@dataclass(frozen=True)
class Cells:
    """Rows pooled by place.

    Attributes:
        x: (C, K); group, count: (C,).
        y: weighted means (C,); q: relative variance of each mean (C,), so that var = sigma^2 q.
        pure: weighted sum of squares within cells; pure_dof: its degrees of freedom; n: rows.
        log_cost: mean ln cost per cell (C,).
    """

    x: Array
    group: np.ndarray
    count: Array
    y: Array
    q: Array
    pure: float
    pure_dof: int
    n: int
    log_cost: Array


@dataclass
class RowTable:
    """Growing arrays of rows."""

    rows: list[Row] = field(default_factory=list)

    def extend(self, rows: Sequence[Row]) -> None:
        """Append."""
        self.rows.extend(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self) -> tuple[Array, np.ndarray, Array, Array, Array]:
        """x (n, K), group (n,), y (n,), se (n,), cost (n,)."""
        x = np.array([r.x for r in self.rows], dtype=np.float64)
        group = np.array([r.group for r in self.rows], dtype=np.int64)
        rest = np.array([(r.y, r.se, r.cost) for r in self.rows], dtype=np.float64).reshape(-1, 3)
        return x, group, rest[:, 0], rest[:, 1], rest[:, 2]


def places(x_nK: Array, group_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of every distinct place (C,) and the place of every row (n,), in order of first appearance."""
    keyed = np.column_stack([group_n.astype(np.float64), x_nK])
    _, first, label = np.unique(keyed, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[label.ravel()]


def pool(x_nK: Array, group_n: np.ndarray, y_n: Array, q_n: Array, log_cost_n: Array) -> Cells:
    """Inverse-variance means per place; ``q_n`` are the rows' relative variances."""
    first, label = places(x_nK, group_n)
    w = 1.0 / q_n
    total = np.bincount(label, w)
    mean = np.bincount(label, w * y_n) / total
    count = np.bincount(label).astype(np.float64)
    pure = float(np.sum(w * (y_n - mean[label]) ** 2))
    cost = np.bincount(label, log_cost_n) / count
    return Cells(x_nK[first], group_n[first], count, mean, 1.0 / total, pure, len(y_n) - len(first), len(y_n), cost)


def thin(cells: Cells, most: int) -> Cells:
    """Neighbouring places pooled until there are at most ``most``: cubes of ln x, ever larger."""
    if len(cells.y) <= most:
        return cells
    z = np.log(np.maximum(cells.x, 1e-300))
    span = np.maximum(np.ptp(z, axis=0), 1e-12)
    for side in range(math.ceil(1.5 * most ** (1 / z.shape[1])), 0, -1):
        cube = np.floor((z - z.min(axis=0)) / span * side * (1 - 1e-12))
        first, label = places(cube, cells.group)
        if len(first) <= most:
            break
    w = 1.0 / cells.q
    total, count = np.bincount(label, w), np.bincount(label, cells.count).astype(np.float64)
    mean = np.bincount(label, w * cells.y) / total
    x = np.exp(np.stack([np.bincount(label, w * column) / total for column in z.T], axis=1))
    cost = np.bincount(label, cells.count * cells.log_cost) / count
    return Cells(
        x,
        cells.group[first],
        np.asarray(count, dtype=np.float64),
        mean,
        1.0 / total,
        cells.pure,
        cells.pure_dof,
        cells.n,
        cost,
    )
