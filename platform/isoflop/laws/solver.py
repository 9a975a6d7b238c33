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

import numpy as np
import numpy.typing as npt

from isoflop.core.expressions import Array, Mask
from isoflop.laws.base import LawForm
from isoflop.laws.objective import Objective

Index = npt.NDArray[np.int64]

CONVERGED, ITERATION_LIMIT, STALLED = 0, 1, 2
STATUS_NAMES = {CONVERGED: "converged", ITERATION_LIMIT: "iteration limit", STALLED: "line-search failure"}
_CHUNK = 120_000  # doubles of Jacobian per chunk: stays in the second-level cache
_TOLERANCE = 1e-14  # predicted relative decrease below which a fit is converged
_MAX_DAMPING = 1e12


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


def solve(
    batch: Batch, start_BP: Array, low_BP: Array, high_BP: Array, objective: Objective, max_iter: int = 200
) -> Solution:
    """Minimise the objective from every start within the bounds (natural units, broadcastable to (B, P))."""
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
    step = max(1, _CHUNK // max(1, batch.n * width))
    for first in range(0, size, step):
        rows = np.arange(first, min(first + step, size))
        lo, hi = _inner(low[rows], log), _inner(high[rows], log)
        worker = _Chunk(batch, rows, lo, hi, objective)
        u = np.clip(_inner(out.p[rows], log), lo, hi)
        for stage, delta in enumerate(worker.stages(u)):
            limit = max_iter if stage == worker.last_stage else min(max_iter, 25)
            u, loss, status, used = worker.minimise(u, delta, limit)
            out.iterations[rows] += used
        out.p[rows] = np.where(log, np.exp(np.where(log, u, 0.0)), u)
        out.loss[rows] = loss if objective.robust else 2.0 * loss
        out.status[rows] = status
    return out


def _inner(p: Array, log: Mask) -> Array:
    """Natural parameters to the solver's scale."""
    with np.errstate(all="ignore"):
        return np.where(log, np.log(np.where(log, np.maximum(p, 1e-300), 1.0)), p)


class _Chunk:
    """A cache-sized part of a batch."""

    def __init__(self, batch: Batch, rows: Index, low: Array, high: Array, objective: Objective) -> None:
        self.batch, self.rows, self.low, self.high, self.objective = batch, rows, low, high, objective
        self.log = batch.form.logarithmic
        self.any_log = bool(self.log.any())
        self.last_stage = 0

    def stages(self, u: Array) -> list[float | None]:
        """The deltas to pass through: least squares first, then geometric steps from the residuals' spread down."""
        if not self.objective.robust:
            return [None]
        known, y, w = self.batch.pick(self.rows)
        f, _ = self._model(u, known)
        r = np.abs(self.objective.residual(f, y))
        seen = r[(w > 0) & np.isfinite(r)]
        top = float(np.median(seen)) if seen.size else 1.0
        deltas: list[float | None] = [None]
        while top > 8 * self.objective.delta and len(deltas) < 3:
            deltas.append(top)
            top /= 8
        deltas.append(self.objective.delta)
        self.last_stage = len(deltas) - 1
        return deltas

    def _model(self, u: Array, known: Mapping[int, Array]) -> tuple[Array, Array]:
        p = np.where(self.log, np.exp(np.where(self.log, u, 0.0)), u) if self.any_log else u
        f, j = self.batch.form.value_and_jacobian(known, p, self.batch.n)
        if self.any_log:
            with np.errstate(all="ignore"):
                j[:, self.log] *= p[:, self.log, None]
        return f, j

    def _evaluate(
        self, u: Array, known: Mapping[int, Array], y: Array, w: Array, delta: float | None
    ) -> tuple[Array, Array, Array, Array]:
        """Half-loss (B,), gradient (B, P), exact curvature (B, P, P) and majorising curvature (B, P, P)."""
        f, j = self._model(u, known)
        with np.errstate(all="ignore"):
            if self.objective.log:
                r = np.where(f > 0, np.log(f / y), np.inf)
                j = j / f[:, None, :]
            else:
                r = f - y
            if delta is None:
                wr = w * r
                loss = 0.5 * np.einsum("bn,bn->b", wr, r)
                gradient = np.matmul(j, wr[:, :, None])[..., 0]
                curvature = np.matmul(j * w[:, None, :], j.transpose(0, 2, 1))
                return _finite(loss, gradient, curvature, curvature)
            size = np.abs(r)
            inside = size <= delta
            psi = np.clip(r, -delta, delta)
            loss = np.einsum("bn,bn->b", w, np.where(inside, 0.5 * r * r, delta * (size - 0.5 * delta)))
            gradient = np.matmul(j, (w * psi)[:, :, None])[..., 0]
            jt = j.transpose(0, 2, 1)
            exact = np.matmul(j * (w * inside)[:, None, :], jt)
            major = np.matmul(j * (w * np.where(inside, 1.0, delta / size))[:, None, :], jt)
        return _finite(loss, gradient, exact, major)

    def minimise(self, u: Array, delta: float | None, max_iter: int) -> tuple[Array, Array, Index, Index]:
        """Damped Newton steps until every problem of the chunk has converged, stalled or run out of iterations."""
        batch_size, width = u.shape
        final_u, final_loss = u.copy(), np.full(batch_size, np.inf)
        status, used = np.full(batch_size, ITERATION_LIMIT, dtype=np.int64), np.zeros(batch_size, dtype=np.int64)
        active = np.arange(batch_size)
        known, y, w = self.batch.pick(self.rows)
        with np.errstate(all="ignore"):
            scale = np.einsum(
                "bn,bn->b", w, np.broadcast_to((np.ones_like(y) if self.objective.log else y) ** 2, w.shape)
            )
        negligible = 1e-29 * scale
        loss, gradient, exact, major = self._evaluate(u, known, y, w, delta)
        damping = np.full(batch_size, 1e-2)
        low, high = self.low, self.high
        eye = np.eye(width)
        for iteration in range(1, max_iter + 1):
            held = ((u <= low) & (gradient >= 0)) | ((u >= high) & (gradient <= 0))
            g = np.where(held, 0.0, gradient)
            mix = np.minimum(1.0, damping)[:, None, None] if delta is not None else 0.0
            h = exact + mix * (major - exact)
            diagonal = np.einsum("bpp->bp", major)
            h = h + (damping[:, None] * diagonal + 1e-300)[:, :, None] * eye
            move = _bounded_step(h, g, held, low - u, high - u)
            trial = np.clip(u + move, low, high)
            new_loss, new_gradient, new_exact, new_major = self._evaluate(trial, known, y, w, delta)
            gain = -np.einsum("bp,bp->b", g, move) - 0.5 * np.einsum("bp,bpq,bq->b", move, h, move)
            better = new_loss <= loss
            tiny = np.abs(gain) <= _TOLERANCE * np.abs(loss) + negligible
            done = (tiny & (damping < 1.0)) | (loss <= negligible)
            trusted = loss - new_loss > 0.5 * gain
            damping = np.where(better, damping * np.where(trusted, 0.1, 0.5), damping * 6.0)
            damping = np.maximum(damping, 1e-13)
            stuck = (damping > _MAX_DAMPING) & ~done
            u = np.where(better[:, None], trial, u)
            loss = np.where(better, new_loss, loss)
            gradient = np.where(better[:, None], new_gradient, gradient)
            exact = np.where(better[:, None, None], new_exact, exact)
            major = np.where(better[:, None, None], new_major, major)
            leaving = done | stuck
            if leaving.any() or iteration == max_iter:
                out = leaving if iteration < max_iter else np.ones(len(active), dtype=bool)
                where = active[out]
                final_u[where], final_loss[where], used[where] = u[out], loss[out], iteration
                flat = _flat(loss, gradient, major, held)
                status[where] = np.where(
                    done[out] | (stuck & flat)[out], CONVERGED, np.where(stuck[out], STALLED, ITERATION_LIMIT)
                )
                stay = ~out
                if not stay.any():
                    break
                active = active[stay]
                u, loss, gradient, exact, major, damping = (a[stay] for a in (u, loss, gradient, exact, major, damping))
                low, high, negligible = low[stay], high[stay], negligible[stay]
                known, y, w = self.batch.pick(self.rows[active])
        return final_u, final_loss, status, used


def _finite(loss: Array, gradient: Array, exact: Array, major: Array) -> tuple[Array, Array, Array, Array]:
    """Points outside the law's domain cost infinity and pull nowhere."""
    bad = ~(np.isfinite(loss) & np.isfinite(gradient).all(1) & np.isfinite(major).all((1, 2)))
    if bad.any():
        loss = np.where(bad, np.inf, loss)
        gradient = np.where(bad[:, None], 0.0, gradient)
        same = exact is major
        major = np.where(bad[:, None, None], np.eye(gradient.shape[1]), major)
        exact = major if same else np.where(bad[:, None, None], np.eye(gradient.shape[1]), exact)
    return loss, gradient, exact, major


def _bounded_step(h: Array, g: Array, held: Mask, low: Array, high: Array) -> Array:
    """The Newton step within the box: a coordinate that would leave it goes to the wall, the others are solved again."""
    eye = np.eye(g.shape[1])
    fixed, wall = held, np.zeros_like(g)
    move = wall
    for _ in range(3):
        reduced = np.where(fixed[:, :, None] | fixed[:, None, :], eye, h)
        right = np.where(fixed, -wall, g + np.einsum("bpq,bq->bp", h, wall)) if wall.any() else np.where(fixed, 0.0, g)
        move = _newton_step(reduced, right)
        out = ~fixed & ((move < low) | (move > high))
        if not out.any():
            break
        wall = np.where(out, np.clip(move, low, high), wall)
        fixed = fixed | out
    return np.clip(move, low, high)


def _newton_step(h: Array, g: Array) -> Array:
    """-h^-1 g with the diagonal scaled to one; falls back to the pseudo-inverse for singular matrices."""
    scale = 1.0 / np.sqrt(np.maximum(np.einsum("bpp->bp", h), 1e-300))
    scaled = h * scale[:, :, None] * scale[:, None, :]
    right = -(g * scale)
    try:
        move = np.linalg.solve(scaled, right[:, :, None])[..., 0]
    except np.linalg.LinAlgError:
        move = np.einsum("bpq,bq->bp", np.linalg.pinv(scaled, rcond=1e-14, hermitian=True), right)
    return np.nan_to_num(move * scale, nan=0.0, posinf=0.0, neginf=0.0)


def _flat(loss: Array, gradient: Array, curvature: Array, held: Mask) -> Mask:
    """The gradient is at rounding level: its cosine with every column of the Jacobian is below 1e-6."""
    columns = np.sqrt(np.maximum(np.einsum("bpp->bp", curvature), 1e-300))
    cosine = np.where(held, 0.0, np.abs(gradient) / (columns * np.sqrt(np.maximum(2 * loss, 1e-300))[:, None]))
    return np.max(cosine, axis=1) < 1e-6
