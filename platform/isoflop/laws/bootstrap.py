"""Bootstrap intervals: every resample of every group is a problem of one batch, warm-started and restarted elsewhere.

A warm start alone would hide jumps to another basin and give intervals that are too narrow, so each resample also starts from
other promising cells of the search. Resamples that fail or end on a bound are counted, never dropped.

Shapes: R resamples, S starts per resample, N points, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array
from isoflop.laws.base import LawForm
from isoflop.laws.engine import Box, Optimum, on_bound, scaled
from isoflop.laws.objective import Objective
from isoflop.laws.solver import CONVERGED, Batch, Index, Passes, solve
from isoflop.laws.table import GroupData

_TOLERANCE = 1e-11  # far below the spread of the resamples
_DOUBLES = 20_000_000  # weights or targets held at once
SCHEMES = ("cases", "cluster", "wild", "parametric")


@dataclass
class Resamples:
    """Parameters of every resample (R, P) in natural units, their losses (R,), and what went wrong how often."""

    p: Array
    loss: Array
    scheme: str
    failed: int
    at_bound: dict[str, int]

    def enough(self, level: float) -> bool:
        """Whether percentiles of so many resamples are an interval; see :func:`enough_resamples`."""
        return enough_resamples(len(self.p), level)

    def interval(self, values: Array, level: float) -> tuple[float, float]:
        """Percentile interval of a statistic (R,); half-infinite when resamples run off to infinity.

        Of ``enough`` resamples: fewer have no such percentiles.
        """
        tail = 50 * (1 - level)
        clean = np.where(np.isnan(values), np.inf, values)
        low, high = np.percentile(
            clean, [tail, 100 - tail], method="closest_observation" if not np.isfinite(clean).all() else "linear"
        )
        return float(low), float(high)


def fewest_resamples(level: float) -> int:
    """Resamples of which one lies beyond each end of an interval, on average: R + 1 = 2/(1 - level), 39 for 95 %.

    The rule for exact Monte Carlo tails (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 4.2.5).
    """
    return math.ceil(2 / (1 - level) - 1e-9) - 1


def enough_resamples(count: int, level: float) -> bool:
    """Whether percentiles of so many resamples are an interval of that level; of one they would be a point."""
    return count >= fewest_resamples(level)


def too_few(count: int, level: float) -> str:
    """The sentence for a number that is not enough."""
    drawn = "1 resample has" if count == 1 else f"{count} resamples have"
    return f"{drawn} no {100 * level:g}% interval; it takes at least {fewest_resamples(level)}"


def bootstrap(
    form: LawForm,
    groups: Sequence[GroupData],
    optima: Sequence[Optimum],
    box: Box,
    objective: Objective,
    resamples: int,
    scheme: str = "cases",
    starts: int = 3,
    seed: int = 0,
) -> list[Resamples]:
    """Refit resampled data.

    Args:
        scheme: ``cases`` resamples rows; ``cluster`` whole clusters (all checkpoints of a run, all rows of a model);
            ``wild`` flips the signs of residuals in place (keeps the design, allows unequal variance); ``parametric`` simulates
            normal noise of the estimated size around the law.
        starts: starts per resample: the full-data optimum and ``starts - 1`` cells of the search.
    """
    if scheme not in SCHEMES:
        raise unknown("bootstrap scheme", scheme, SCHEMES)
    out = []
    for g, (data, best) in enumerate(zip(groups, optima, strict=True)):
        rng = np.random.default_rng([seed, g])
        x = {v: a[None] for v, a in scaled(data).items()}
        parts = []
        step = max(1, _DOUBLES // data.n)
        for first in range(0, resamples, step):
            count = min(step, resamples - first)
            y_YN, w_WN = _draw(form, data, best, box, objective, count, scheme, rng)
            rows, zero = np.arange(count), np.zeros(count, dtype=np.int64)
            batch = Batch(form, x, y_YN, w_WN, zero, rows if len(y_YN) > 1 else zero, rows if len(w_WN) > 1 else zero)
            picks = rng.integers(len(best.spare), size=(count, starts - 1))
            parts.append(_refit(batch, best.p_scaled, best.spare[picks], box, objective))
        p, loss, status = (np.concatenate(column) for column in zip(*parts, strict=True))
        p = form.canonical(p)
        edge = on_bound(box, p)
        counts = {n: int(edge[:, i].sum()) for i, n in enumerate(form.names) if box.free[i] and edge[:, i].any()}
        failed = int(np.sum((status != CONVERGED) | ~np.isfinite(loss)))
        out.append(Resamples(form.to_natural(p, data.scales), loss, scheme, failed, counts))
    return out


def _refit(batch: Batch, warm_P: Array, cells_RSP: Array, box: Box, objective: Objective) -> tuple[Array, Array, Index]:
    """Best of the warm start and the other cells for every resample: parameters (R, P), losses (R,), status (R,).

    Under a robust objective the cells are first brought to the least-squares optimum of their basin; cells that arrive at the
    same point go on as one.
    """
    count, starts, width = cells_RSP.shape
    found = solve(
        batch,
        np.broadcast_to(warm_P, (count, width)),
        box.low,
        box.high,
        objective,
        max_iter=100,
        passes="last",
        tolerance=_TOLERANCE,
    )
    p, loss, status = found.p, found.loss, found.status
    cold = np.flatnonzero(status != CONVERGED)
    owner, first = np.repeat(np.arange(count), starts), cells_RSP.reshape(-1, width)
    if objective.robust and starts:
        squares = solve(
            batch.take(owner), first, box.low, box.high, objective, max_iter=60, passes="project", tolerance=1e-6
        )
        near = squares.p.reshape(count, starts, width)
        keep = np.ones((count, starts), dtype=bool)
        for s in range(1, starts):
            gap = np.max(np.abs(near[:, :s] - near[:, s : s + 1]) / (np.abs(near[:, s : s + 1]) + 1e-3), axis=2)
            keep[:, s] = np.all((gap > 1e-3) | ~keep[:, :s], axis=1)
        owner, first = owner[keep.ravel()], squares.p[keep.ravel()]
    owner = np.concatenate([owner, cold])
    first = np.concatenate([first, p[cold]])
    if not len(owner):
        return p, loss, status
    passes: Passes = "polish" if objective.robust else "all"
    others = solve(
        batch.take(owner), first, box.low, box.high, objective, max_iter=100, passes=passes, tolerance=_TOLERANCE
    )
    order = np.lexsort((others.loss, owner))
    top = order[np.unique(owner[order], return_index=True)[1]]
    where = owner[top]
    better = others.loss[top] < loss[where]
    p[where[better]], loss[where[better]], status[where[better]] = (
        others.p[top[better]],
        others.loss[top[better]],
        others.status[top[better]],
    )
    return p, loss, status


def _draw(
    form: LawForm,
    data: GroupData,
    best: Optimum,
    box: Box,
    objective: Objective,
    count: int,
    scheme: str,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Targets (1 or R, N) and weights (1 or R, N) of the resamples."""
    n = data.n
    if scheme == "cases":
        return data.y[None], rng.multinomial(n, np.full(n, 1 / n), size=count) * data.w
    if scheme == "cluster":
        if data.cluster is None:
            raise UserError("bootstrap scheme 'cluster' needs cluster=<column> that names the runs or models")
        _, label = np.unique(data.cluster, return_inverse=True)
        k = int(label.max()) + 1
        return data.y[None], rng.multinomial(k, np.full(k, 1 / k), size=count)[:, label] * data.w
    f = form.evaluate(scaled(data), best.p_scaled)
    r = objective.residual(data.y, f) if objective.log else data.y - f
    dof = max(1, n - int(box.free.sum()))
    if scheme == "wild":
        noise = r * np.sqrt(n / dof) * rng.choice([-1.0, 1.0], size=(count, n))
    else:
        sigma = np.sqrt(np.sum(data.w * r**2) / dof)
        with np.errstate(divide="ignore"):
            spread = np.where(data.w > 0, sigma / np.sqrt(data.w), 0.0)
        noise = spread * rng.standard_normal((count, n))
    return (f * np.exp(noise) if objective.log else f + noise), data.w[None]
