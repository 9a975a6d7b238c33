"""Batched Levenberg-Marquardt: thousands of small bounded fits (starts x resamples x groups) solved side by side.

Each iteration is a handful of numpy calls on a whole batch, so the price of Python is paid once per iteration and not
once per fit. For Huber terms the curvature moves from that of iteratively reweighted least squares (which never
overshoots) to the exact generalised second derivative (which converges in a few steps) as damping falls, and delta is
lowered in stages, so that nearly least-absolute-deviation problems are solved as fast as smooth ones.

All tests of convergence are relative to the objective: scaling it changes nothing, so neither means nor small deltas stop
a fit early.

Shapes: B problems, N points, P parameters, F free parameters; G data sets, Y targets and W weight rows that problems
refer to by index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from isoflop.core.expressions import Array, Mask
from isoflop.laws.base import LawForm
from isoflop.laws.objective import Objective
from isoflop.laws.varpro import constrained

Index = npt.NDArray[np.int64]

CONVERGED, ITERATION_LIMIT, STALLED = 0, 1, 2
STATUS_NAMES = {CONVERGED: "converged", ITERATION_LIMIT: "iteration limit", STALLED: "line-search failure"}
_CHUNK = 49_152  # numbers per array of a chunk: amortises the calls, stays in the cache
_TOLERANCE = 1e-14  # predicted relative decrease below which a fit is converged
_MAX_DAMPING = 1e12


Passes = Literal["all", "project", "polish", "last"]


@dataclass(frozen=True)
class Batch:
    """Problems that share a form and an objective.

    Attributes:
        x: per variable, positive or real values (G, N), already divided by the scales.
        y: targets (Y, N); w: weights (W, N), zero for padding and for points that a resample leaves out.
        g, t, v: which row of x, y and w each problem uses, (B,).
    """

    form: LawForm
    x: Mapping[str, Array]
    y: Array
    w: Array
    g: Index
    t: Index
    v: Index
    known: dict[int, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.known:
            self.known.update(self.form.bind(self.x))

    def __len__(self) -> int:
        return len(self.g)

    def take(self, rows: Index) -> Batch:
        """Some of the problems, on the same data."""
        return Batch(self.form, self.x, self.y, self.w, self.g[rows], self.t[rows], self.v[rows], self.known)

    @property
    def n(self) -> int:
        """Points per problem, padding included."""
        return int(self.y.shape[1])

    def pick(self, rows: Index) -> tuple[dict[int, Array], Array, Array]:
        """Bound data, targets and weights of some problems."""
        g = self.g[rows]
        if len(self.y) == 1 and next(iter(self.x.values())).shape[0] == 1:
            return self.known, self.y, self.w[self.v[rows]]
        known = {k: (a if np.ndim(a) < 2 or len(a) == 1 else a[g]) for k, a in self.known.items()}
        return known, self.y[self.t[rows]], self.w[self.v[rows]]


@dataclass
class Solution:
    """Where each problem ended: parameters (B, P), loss as ``Objective.loss`` (B,), status codes (B,), iterations (B,)."""

    p: Array
    loss: Array
    status: Index
    iterations: Index


@np.errstate(all="ignore")  # points outside a law's domain are nan or inf on purpose: see _finite
def solve(
    batch: Batch,
    start_BP: Array,
    low_BP: Array,
    high_BP: Array,
    objective: Objective,
    max_iter: int = 200,
    passes: Passes = "all",
    tolerance: float = _TOLERANCE,
) -> Solution:
    """Minimise the objective from every start within the bounds (natural units, broadcastable to (B, P)).

    Args:
        passes: ``all`` projects, then polishes everything, for Huber terms through larger deltas; ``project`` stops at the
            (relative) least-squares optimum of the start's basin; ``polish`` goes on from there; ``last`` minimises the
            objective alone, for starts that are close to the answer.
        tolerance: predicted relative decrease at which a problem is converged.
    """
    size, width = len(batch), len(batch.form.names)
    log = batch.form.logarithmic
    low = np.broadcast_to(np.asarray(low_BP, dtype=np.float64), (size, width))
    high = np.broadcast_to(np.asarray(high_BP, dtype=np.float64), (size, width))
    out = Solution(
        np.array(np.broadcast_to(start_BP, (size, width)), dtype=np.float64),
        np.full(size, np.inf),
        np.full(size, ITERATION_LIMIT, dtype=np.int64),
        np.zeros(size, dtype=np.int64),
    )
    step = max(1, _CHUNK // batch.n)
    for first in range(0, size, step):
        rows = np.arange(first, min(first + step, size))
        lo, hi = _inner(low[rows], log), _inner(high[rows], log)
        worker = _Chunk(batch, rows, lo, hi, objective)
        u = np.clip(_inner(out.p[rows], log), lo, hi)
        *early, last = worker.stages(u, passes)
        for stage in early:
            u, _, _, used = worker.minimise(u, stage, min(max_iter, 40), 1e-8 if stage.project else 1e-5)
            out.iterations[rows] += used
        u, loss, status, used = worker.minimise(u, last, max_iter, tolerance)
        out.iterations[rows] += used
        out.p[rows] = np.where(log, np.exp(np.where(log, u, 0.0)), u)
        out.loss[rows] = loss if objective.robust else 2.0 * loss
        out.status[rows] = status
    return out


def _inner(p: Array, log: Mask) -> Array:
    """Natural parameters to the solver's scale."""
    return np.where(log, np.log(np.where(log, np.maximum(p, 1e-300), 1.0)), p)


@dataclass(frozen=True)
class _Stage:
    """What one pass minimises.

    ``delta``: Huber terms with this delta, or squares (None). ``project``: squares of y's residuals (relative ones for a
    log objective) with the linear parameters solved exactly after every step.
    """

    delta: float | None
    project: bool = False


@dataclass
class _Point:
    """Where problems stand: parameters (B, P), half-loss (B,), gradient (B, P), curvature (B, P, P) and its scale (B, P)."""

    u: Array
    loss: Array
    gradient: Array
    curvature: Array
    diagonal: Array

    def rows(self, keep: Mask) -> _Point:
        """Some of the problems."""
        return _Point(self.u[keep], self.loss[keep], self.gradient[keep], self.curvature[keep], self.diagonal[keep])

    def take(self, other: _Point, better: Mask) -> None:
        """Move to ``other`` where it is better."""
        if better.all():
            self.u, self.loss, self.gradient = other.u, other.loss, other.gradient
            self.curvature, self.diagonal = other.curvature, other.diagonal
            return
        row = better[:, None]
        self.u, self.loss = np.where(row, other.u, self.u), np.where(better, other.loss, self.loss)
        self.gradient = np.where(row, other.gradient, self.gradient)
        self.diagonal = np.where(row, other.diagonal, self.diagonal)
        self.curvature = np.where(row[:, :, None], other.curvature, self.curvature)


class _Chunk:
    """A cache-sized part of a batch."""

    def __init__(self, batch: Batch, rows: Index, low: Array, high: Array, objective: Objective) -> None:
        self.batch, self.rows, self.low, self.high, self.objective = batch, rows, low, high, objective
        self.log = batch.form.logarithmic
        self.any_log = bool(self.log.any())
        shape = (len(rows), low.shape[1], batch.n)
        self.jacobian, self.scratch = np.empty(shape), np.empty(shape)
        self.flat = list(batch.form.linear)
        ends = low[:, self.flat], high[:, self.flat]
        signs = np.isin(ends[0], (0.0, -np.inf)).all() and np.isin(ends[1], (0.0, np.inf)).all()
        self.projects = bool(self.flat) and bool(signs)

    def stages(self, u: Array, passes: Passes) -> list[_Stage]:
        """Variable projection, then everything together; for Huber terms delta falls geometrically from the residuals' spread."""
        if passes == "last":
            return [_Stage(self.objective.delta if self.objective.robust else None)]
        first = [_Stage(None, project=True)] if self.projects else []
        if passes == "project":
            return first or [_Stage(None)]
        if not self.objective.robust:
            return [*first, _Stage(None)] if passes == "all" else [_Stage(None)]
        first = [*first, _Stage(None)] if passes == "all" else []
        known, y, w = self.batch.pick(self.rows)
        f, _ = self._model(u, known)
        r = np.abs(self.objective.residual(f, y))
        seen = r[(w > 0) & np.isfinite(r)]
        top = float(np.median(seen)) if seen.size else 1.0
        later: list[_Stage] = []
        while top > 8 * self.objective.delta and len(later) < 2:
            later.append(_Stage(top))
            top /= 8
        return [*first, *later, _Stage(self.objective.delta)]

    def _model(self, u: Array, known: Mapping[int, Array]) -> tuple[Array, Array]:
        p = np.where(self.log, np.exp(np.where(self.log, u, 0.0)), u) if self.any_log else u
        f, j = self.batch.form.value_and_jacobian(known, p, self.batch.n, self.jacobian[: len(u)])
        if self.any_log:
            j[:, self.log] *= p[:, self.log, None]
        return f, j

    def _evaluate(self, u: Array, data: tuple[dict[int, Array], Array, Array], stage: _Stage, mix_B: Array) -> _Point:
        """Loss, gradient and curvature; ``mix_B`` moves Huber curvature from exact (0) to majorising (1)."""
        known, y, w = data
        delta, log = stage.delta, self.objective.log and not stage.project
        if stage.project:
            w = w / (y * y) if self.objective.log else w
            known, u = self._project(u, known, y, w)
        f, j = self._model(u, known)
        if log:
            r = np.log(f / y)  # nan, so infinitely bad, where the law is not positive
            slope = 1.0 / f
        else:
            r, slope = f - y, None
        if delta is None:
            pull, bend = w * r, w
            loss = 0.5 * np.einsum("bn,bn->b", pull, r)
            diagonal = None
        else:
            size = np.abs(r)
            weight = np.minimum(1.0, delta / np.maximum(size, 1e-300))  # that of iteratively reweighted least squares
            pull = w * weight * r
            loss = np.einsum("bn,bn->b", w, np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)))
            bend = w * np.where(size <= delta, 1.0, mix_B[:, None] * weight)
            major = w * weight if slope is None else w * weight * slope * slope
            diagonal = np.einsum("bpn,bpn,bn->bp", j, j, major)
        if slope is not None:
            pull, bend = pull * slope, bend * slope * slope
        gradient = np.matmul(j, pull[:, :, None])[..., 0]
        scaled = np.multiply(j, bend[:, None, :], out=self.scratch[: len(u)])
        curvature = np.matmul(scaled, j.transpose(0, 2, 1))
        if diagonal is None:
            diagonal = np.einsum("bpp->bp", curvature)
        return _finite(_Point(u, loss, gradient, curvature, diagonal))

    def _project(self, u: Array, known: dict[int, Array], y: Array, w: Array) -> tuple[dict[int, Array], Array]:
        """Variable projection: the linear parameters at their least-squares optimum for the nonlinear ones."""
        p = np.where(self.log, np.exp(np.where(self.log, u, 0.0)), u) if self.any_log else u
        bound, basis, offset = self.batch.form.separate(known, p, self.batch.n)
        weighted = basis * w[:, None, :]
        gram = np.matmul(weighted, basis.transpose(0, 2, 1))
        right = np.matmul(weighted, (y - offset)[:, :, None])[..., 0]
        u = u.copy()
        u[:, self.flat] = constrained(gram, right, self.low[0, self.flat], self.high[0, self.flat])[0]
        return bound, u

    def minimise(self, u: Array, stage: _Stage, max_iter: int, tolerance: float) -> tuple[Array, Array, Index, Index]:
        """Damped Newton steps until every problem of the chunk has converged, stalled or run out of iterations."""
        size = len(u)
        final_u, final_loss = u.copy(), np.full(size, np.inf)
        status, used = np.full(size, ITERATION_LIMIT, dtype=np.int64), np.full(size, max_iter, dtype=np.int64)
        active = np.arange(size)
        data = self.batch.pick(self.rows)
        negligible = self._negligible(data) * (1e7 if stage.project else 1.0)
        damping = np.full(size, 1e-2)
        low, high = self.low, self.high
        point = self._evaluate(u, data, stage, np.ones(size))
        eye = np.eye(u.shape[1])
        lucky = np.ones(size, dtype=bool)  # the step before was accepted
        for iteration in range(1, max_iter + 1):
            held = ((point.u <= low) & (point.gradient >= 0)) | ((point.u >= high) & (point.gradient <= 0))
            g = np.where(held, 0.0, point.gradient)
            h = point.curvature + (damping[:, None] * point.diagonal + 1e-300)[:, :, None] * eye
            move = _bounded_step(h, g, held, low - point.u, high - point.u)
            trial = self._evaluate(np.clip(point.u + move, low, high), data, stage, np.clip(damping, 1e-7, 1.0))
            gain = -np.sum(move * (g + 0.5 * np.matmul(h, move[:, :, None])[..., 0]), axis=1)
            better = trial.loss <= point.loss
            done = (np.abs(gain) <= tolerance * np.abs(point.loss) + negligible) & (damping < 1.0)
            done |= point.loss <= negligible
            trusted = point.loss - trial.loss > 0.5 * gain
            ease = np.where(trusted, np.where(lucky, 0.1, 0.4), 0.7)
            damping = np.maximum(np.where(better, damping * ease, damping * 6.0), 1e-13)
            lucky = better
            point.take(trial, better)
            stuck = (damping > _MAX_DAMPING) & ~done
            leaving = done | stuck
            if not leaving.any():
                continue
            rows = active[leaving]
            final_u[rows], final_loss[rows], used[rows] = point.u[leaving], point.loss[leaving], iteration
            status[rows] = np.where((done | (stuck & _flat(point, held)))[leaving], CONVERGED, STALLED)
            stay = ~leaving
            active = active[stay]
            if not len(active):
                break
            point, low, high = point.rows(stay), low[stay], high[stay]
            damping, lucky, negligible = damping[stay], lucky[stay], negligible[stay]
            data = self.batch.pick(self.rows[active])
        final_u[active], final_loss[active] = (
            (point.u, point.loss) if len(active) else (final_u[active], final_loss[active])
        )
        return final_u, final_loss, status, used

    def _negligible(self, data: tuple[dict[int, Array], Array, Array]) -> Array:
        """A loss at rounding level of the data: nothing left to gain."""
        _, y, w = data
        square = np.ones_like(y) if self.objective.log else y * y
        return 1e-29 * np.einsum("bn,bn->b", w, np.broadcast_to(square, w.shape))


def _finite(point: _Point) -> _Point:
    """Points outside the law's domain cost infinity and pull nowhere."""
    bad = ~np.isfinite(point.loss + point.gradient.sum(1) + point.curvature.sum((1, 2)))
    if bad.any():
        point.loss = np.where(bad, np.inf, point.loss)
        point.gradient = np.where(bad[:, None], 0.0, point.gradient)
        point.curvature = np.where(bad[:, None, None], np.eye(point.gradient.shape[1]), point.curvature)
        point.diagonal = np.where(bad[:, None], 1.0, point.diagonal)
    return point


def _bounded_step(h: Array, g: Array, held: Mask, low: Array, high: Array) -> Array:
    """The Newton step within the box: a coordinate that would leave it goes to the wall, the others are solved again."""
    fixed, wall = held, np.zeros_like(g)
    move = wall
    for attempt in range(3):
        reduced, right = h, g
        if fixed.any():
            reduced = np.where(fixed[:, :, None] | fixed[:, None, :], np.eye(g.shape[1]), h)
            pulled = g if attempt == 0 else g + np.matmul(h, wall[:, :, None])[..., 0]
            right = np.where(fixed, -wall, pulled)
        move = _newton_step(reduced, right)
        out = ((move < low) | (move > high)) & ~fixed
        if not out.any():
            return move
        wall = np.where(out, np.clip(move, low, high), wall)
        fixed = fixed | out
    return np.clip(move, low, high)


def _newton_step(h: Array, g: Array) -> Array:
    """-h^-1 g with the diagonal scaled to one; falls back to the pseudo-inverse for singular matrices."""
    scale = np.maximum(np.einsum("bpp->bp", h), 1e-300) ** -0.5
    scaled = h * scale[:, :, None] * scale[:, None, :]
    right = -(g * scale)
    try:
        move = np.linalg.solve(scaled, right[:, :, None])[..., 0] * scale
    except np.linalg.LinAlgError:
        move = np.matmul(np.linalg.pinv(scaled, rcond=1e-14, hermitian=True), right[:, :, None])[..., 0] * scale
    return move if np.isfinite(move).all() else np.nan_to_num(move, nan=0.0, posinf=0.0, neginf=0.0)


def _flat(point: _Point, held: Mask) -> Mask:
    """The gradient is at rounding level: its cosine with every column of the Jacobian is below 1e-6."""
    columns = np.sqrt(np.maximum(point.diagonal, 1e-300)) * np.sqrt(np.maximum(2 * point.loss, 1e-300))[:, None]
    return np.max(np.where(held, 0.0, np.abs(point.gradient) / columns), axis=1) < 1e-6
