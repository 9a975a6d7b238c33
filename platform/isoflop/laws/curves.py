"""A fit's curves as arrays: what a figure of it would draw. Arrays in, arrays out; dashboards draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from isoflop.core.errors import UserError
from isoflop.core.expressions import Array

if TYPE_CHECKING:
    from isoflop.laws.result import Fit

MOST_CURVES, POINTS = 8, 80


@dataclass(frozen=True)
class Curve:
    """The law along its first variable, at one level of the others.

    Attributes:
        level: values of the other variables.
        x, y: the first variable and the law there, (P,).
        low, high: ends of the bootstrap interval of the mean, (P,), or None for a fit without a bootstrap.
        measured_x, measured_y: the rows of this level.
    """

    level: dict[str, float]
    x: Array
    y: Array
    low: Array | None
    high: Array | None
    measured_x: Array
    measured_y: Array


def curves(fit: Fit, most: int = MOST_CURVES, points: int = POINTS) -> list[Curve]:
    """One curve per level of the variables after the first; of many levels ``most``, evenly chosen.

    Raises:
        UserError: the fit was reloaded, and its rows were not.
    """
    if fit.data is None:
        raise UserError("this fit was reloaded without its rows, so there is nothing to draw it against: fit again")
    first, *others = fit.form.variable_names
    x = fit.data.x
    levels, label = np.zeros((1, 0)), np.zeros(fit.data.n, dtype=np.int64)
    if others:
        levels, label = np.unique(np.stack([x[v] for v in others], axis=1), axis=0, return_inverse=True)
        label = label.ravel()
    low, high = x[first].min(), x[first].max()
    grid = np.geomspace(low, high, points) if low > 0 else np.linspace(low, high, points)
    found = []
    for i in np.unique(np.linspace(0, len(levels) - 1, min(len(levels), most)).round().astype(int)):
        level = dict(zip(others, levels[i].tolist(), strict=True))
        at = {first: grid, **{v: np.full_like(grid, a) for v, a in level.items()}}
        below, above = fit.predict_interval(at) if fit.resampled else (None, None)
        mine = label == i
        found.append(Curve(level, grid, fit.predict(**at), below, above, x[first][mine], fit.data.y[mine]))
    return found
