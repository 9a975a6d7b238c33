"""Profile likelihood: hold one parameter, refit the others, and see how far the data let it go.

All parameters and both sides are bracketed and bisected together, each step one batch of fits. The 95 % set is
{SSE <= SSE_min (1 + c F_{1,n-p}/(n-p))}; for Huber terms the likelihood that matches (Laplace when most residuals lie
beyond delta, Gaussian otherwise) with the chi-square threshold. The factor c of each parameter makes up for noise that is not
equal and independent: see :func:`isoflop.laws.wald.widening`.

An end that is never reached before the parameter's bound, or before it has moved by 1e6 standard errors, is open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from isoflop.core.expressions import Array
from isoflop.laws.base import LawForm
from isoflop.laws.engine import Box
from isoflop.laws.objective import Objective
from isoflop.laws.solver import Batch, Index, solve
from isoflop.laws.table import GroupData
from isoflop.laws.wald import degrees

_EXPAND, _BISECT = 14, 18


@dataclass(frozen=True)
class ProfileInterval:
    """Ends of the set and whether the likelihood really fell off on each side (False: open, the end is a bound or inf)."""

    low: float
    high: float
    low_closed: bool
    high_closed: bool

    @property
    def bounded(self) -> bool:
        """Both sides closed: the data determine the parameter."""
        return self.low_closed and self.high_closed


def threshold(
    loss: float, n: int, p: int, objective: Objective, r: Array, level: float, widen_P: Array, dof: int
) -> Array:
    """The largest loss that each parameter's confidence set admits (P,).

    Args:
        n, p: rows and free parameters; ``dof``: degrees of freedom of the noise, fewer where rows come in clusters.
        r: residuals.
        widen_P: factors on the likelihood ratio.
    """
    if not objective.robust:
        return np.asarray(loss * (1 + widen_P * float(stats.f.ppf(level, 1, dof)) / (n - p)))
    power = 2.0 if float(np.median(np.abs(r))) > objective.delta else 1.0
    return np.asarray(loss * np.exp(widen_P * stats.chi2.ppf(level, 1) / (power * n)))


def profile(
    form: LawForm,
    data: GroupData,
    p: Array,
    loss: float,
    box: Box,
    objective: Objective,
    steps: Array,
    level: float = 0.95,
    widen: Array | None = None,
) -> dict[str, ProfileInterval]:
    """Profile intervals of all free parameters.

    Args:
        p: natural parameters at the optimum; loss: their ``Objective.loss``.
        steps: a first step per parameter (P,), e.g. its standard error.
        widen: factor on each parameter's likelihood ratio (P,); 1 for noise that is equal and independent.
    """
    which = np.flatnonzero(box.free)
    if not len(which) or data.n <= len(which):
        return {}
    residual = objective.residual(form.evaluate(data.x, p), data.y)
    factor = np.ones(len(p)) if widen is None else widen
    dof = degrees(data, len(which))
    limit = threshold(loss, data.n, len(which), objective, residual, level, factor, dof)[np.repeat(which, 2)]
    walk = _Walk(form, data, p, box, objective, np.repeat(which, 2), np.tile([-1.0, 1.0], len(which)), limit)
    ends, closed = walk.ends(np.repeat(_first_steps(form, p, steps), 2)[np.repeat(which, 2) * 2])
    return {
        form.names[i]: ProfileInterval(
            float(ends[2 * k]), float(ends[2 * k + 1]), bool(closed[2 * k]), bool(closed[2 * k + 1])
        )
        for k, i in enumerate(which)
    }


def profile_at(
    form: LawForm, data: GroupData, p: Array, box: Box, objective: Objective, name: str, values: Array
) -> Array:
    """The profile's loss at given values of one parameter, (M,)."""
    i = form.position(name)
    size = len(values)
    walk = _Walk(form, data, p, box, objective, np.full(size, i), np.ones(size), np.inf)
    return walk.refit(np.asarray(values, dtype=np.float64), np.tile(p, (size, 1)))[0]


def _first_steps(form: LawForm, p: Array, steps: Array) -> Array:
    good = np.isfinite(steps) & (steps > 0)
    return np.where(good, steps, np.maximum(np.abs(p), 1e-3) * 0.05)


class _Walk:
    """Walks outward from the optimum for M (parameter, side) pairs at once."""

    def __init__(
        self,
        form: LawForm,
        data: GroupData,
        p: Array,
        box: Box,
        objective: Objective,
        which: Index,
        side: Array,
        limit: Array | float,
    ) -> None:
        self.form, self.data, self.p, self.box, self.objective = form, data, p, box, objective
        self.which, self.side, self.limit = which, side, limit
        zero = np.zeros(len(which), dtype=np.int64)
        x = {v: a[None] for v, a in data.x.items()}
        self.batch = Batch(form, x, data.y[None], data.w[None], zero, zero, zero)

    def refit(self, value: Array, start: Array) -> tuple[Array, Array]:
        """Loss and parameters with each pair's parameter held at ``value``; started from ``start`` and from the optimum."""
        m = len(value)
        rows = np.arange(m)
        low, high = np.tile(self.box.low, (m, 1)), np.tile(self.box.high, (m, 1))
        low[rows, self.which] = high[rows, self.which] = value
        best_loss, best_p = np.full(m, np.inf), start
        for first in (start, np.tile(self.p, (m, 1))):
            found = solve(self.batch, first, low, high, self.objective, max_iter=80)
            better = found.loss < best_loss
            best_loss, best_p = np.where(better, found.loss, best_loss), np.where(better[:, None], found.p, best_p)
        return best_loss, best_p

    def ends(self, step: Array) -> tuple[Array, np.ndarray]:
        """Where each side leaves the set, and whether it does before its bound."""
        m = len(self.which)
        centre = self.p[self.which]
        wall = np.where(self.side < 0, self.box.low[self.which], self.box.high[self.which])
        inside, outside = centre.copy(), np.full(m, np.nan)
        reached, warm = np.zeros(m, dtype=bool), np.tile(self.p, (m, 1))
        at_wall = np.zeros(m, dtype=bool)
        for k in range(_EXPAND):
            stretch = step * (1.5 * 2.8**k)
            target = centre + self.side * stretch
            beyond = np.where(self.side < 0, target <= wall, target >= wall)
            target = np.where(beyond, wall, target)
            asked = np.where(reached | at_wall, inside, target)
            loss, p = self.refit(asked, warm)
            out = loss > self.limit
            newly = out & ~reached & ~at_wall
            outside = np.where(newly, asked, outside)
            moved = ~out & ~reached & ~at_wall
            inside = np.where(moved, asked, inside)
            warm = np.where(moved[:, None], p, warm)
            reached |= newly
            at_wall |= moved & beyond
            if (reached | at_wall).all():
                break
        for _ in range(_BISECT):
            middle = 0.5 * (inside + np.where(reached, outside, inside))
            loss, p = self.refit(middle, warm)
            keep = loss <= self.limit
            inside = np.where(reached & keep, middle, inside)
            warm = np.where((reached & keep)[:, None], p, warm)
            outside = np.where(reached & ~keep, middle, outside)
        ends = np.where(reached, 0.5 * (inside + outside), np.where(at_wall, wall, self.side * np.inf))
        return ends, reached
