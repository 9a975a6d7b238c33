"""IsoFLOP parabolas (approach 2): a picture and a cross-check, with a known bias.

Per budget a parabola is fitted to the loss over log10 of a size; the vertices are regressed on log10 of the budget. Unless
alpha = beta the vertex is shifted by an amount that grows with the grid's width and is equal at all budgets: the exponent
stays right, the intercept does not (arXiv 2603.22339). Take numbers from the joint fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array


class NoVertex(UserError):
    """A budget's curve has no minimum inside its grid: there is no number to give."""


@dataclass(frozen=True)
class Parabolas:
    """Vertices per budget and their power law size* = 10^intercept * C^slope.

    Attributes:
        budget, vertex: arrays (K,); vertex_se: standard error of log10 of each vertex (nan without residual degrees of freedom).
    """

    budget: Array
    vertex: Array
    vertex_se: Array
    slope: float
    intercept: float

    def at(self, budget: float) -> float:
        """The size at another budget."""
        return float(10 ** (self.intercept + self.slope * np.log10(budget)))


def fit_parabolas(budget: Array, size: Array, loss: Array) -> Parabolas:
    """Approach 2 on rows (budget, size, loss), three or more sizes per budget.

    Raises:
        NoVertex: when a parabola opens downward or its vertex lies outside the sizes sampled at that budget.
        UserError: for fewer than three sizes at a budget, or a single budget.
    """
    budget, size, loss = (np.asarray(a, dtype=np.float64) for a in (budget, size, loss))
    levels = np.unique(budget)
    if len(levels) < 2:
        raise UserError("parabolas: at least two budgets are needed")
    vertices, errors = [], []
    for c in levels:
        mine = budget == c
        x, y = np.log10(size[mine]), loss[mine]
        if len(np.unique(x)) < 3:
            raise UserError(f"parabolas: budget {c:g} has {len(np.unique(x))} distinct sizes; at least 3 are needed")
        centre = x.mean()
        design = np.stack([np.ones_like(x), x - centre, (x - centre) ** 2], axis=1)
        q, *_ = np.linalg.lstsq(design, y, rcond=None)
        if not q[2] > 0:
            raise NoVertex(f"parabolas: the curve at budget {c:g} opens downward: no optimum in its data")
        vertex = centre - q[1] / (2 * q[2])
        if not x.min() < vertex < x.max():
            raise NoVertex(
                f"parabolas: the optimum at budget {c:g} (size {10**vertex:.4g}) lies outside the sizes sampled there, "
                f"{10 ** x.min():.4g} … {10 ** x.max():.4g}"
            )
        vertices.append(vertex)
        errors.append(_vertex_error(design, y, q))
    z = np.log10(levels)
    slope, intercept = np.polyfit(z - z.mean(), vertices, 1)
    intercept -= slope * z.mean()
    return Parabolas(levels, 10 ** np.array(vertices), np.array(errors), float(slope), float(intercept))


def _vertex_error(design: Array, y: Array, q: Array) -> float:
    dof = len(y) - 3
    if dof <= 0:
        return float("nan")
    residual = y - design @ q
    cov = float(residual @ residual) / dof * np.linalg.inv(design.T @ design)
    gradient = np.array([0.0, -1 / (2 * q[2]), q[1] / (2 * q[2] ** 2)])
    return float(np.sqrt(gradient @ cov @ gradient))
