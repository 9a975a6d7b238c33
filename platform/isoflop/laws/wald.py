"""Wald covariance: the quick interval, good when the likelihood is nearly quadratic. Use logarithms of amplitudes.

Least squares: Sigma = sigma^2 (J^T J)^-1 with sigma^2 = SSE/(n - p), which holds where all residuals are draws of one size. On real
tables a few rows far out have much leverage and scatter more, and Sigma is several times too small. Where the data show that, where
rows come in clusters, and for Huber terms it is the sandwich A^-1 (sum d d^T) A^-1: the jackknife one, in which a row's residual
counts 1/(1 - h) times, with h its leverage (HC3 of MacKinnon and White, 1985), and rows of one cluster count as one (CR3 of Bell
and McCaffrey, 2002).
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from isoflop.core.expressions import Array, Mask
from isoflop.laws.base import LawForm
from isoflop.laws.objective import Objective
from isoflop.laws.table import GroupData

_UNEVEN = 1.5  # standard errors by the sandwich over those of equal noise, from which it is not chance
_FEWEST_FAR = 3  # rows with much leverage, to be looked at apart
_LEAST_SLACK = 1e-2  # 1 - h of a row that pins a parameter alone: its residual says nothing, whatever it is divided by


def covariance(form: LawForm, data: GroupData, p: Array, objective: Objective, free: np.ndarray) -> Array:
    """Covariance (P, P) of natural parameters; zero for held ones, inf where the data do not determine them."""
    robust, plain = _covariances(form, data, p, objective, free)
    uneven = data.cluster is not None or objective.robust or np.any(_widening(robust, plain, data) > 1)
    return robust if uneven else plain


def widening(form: LawForm, data: GroupData, p: Array, objective: Objective, free: np.ndarray) -> Array:
    """How many times the variance of each parameter (P,) exceeds that of a likelihood with equal, independent noise.

    By so much a likelihood ratio of one parameter falls too fast (Kent, Biometrika 69, 1982): its interval is taken at a threshold
    as many times higher. 1 where the standard error is less than half as large again, which equal noise of few rows brings about
    by chance; of named clusters it is what it is.
    """
    return _widening(*_covariances(form, data, p, objective, free), data)


def _widening(robust: Array, plain: Array, data: GroupData) -> Array:
    with np.errstate(all="ignore"):
        ratio = np.diag(robust) / np.diag(plain)
    least = 0.0 if data.cluster is not None else _UNEVEN**2
    return np.where(np.isfinite(ratio) & (ratio > least), ratio, 1.0)


def far_scatter(form: LawForm, data: GroupData, p: Array, objective: Objective, free: np.ndarray) -> float:
    """Median residual of the rows with much leverage over that of the others; 1 where there are too few of them."""
    j = form.jacobian(data.x, p)[:, free]
    r = np.abs(objective.residual(form.evaluate(data.x, p), data.y))
    if not free.any() or not np.isfinite(j).all() or not np.isfinite(r).all():
        return 1.0
    far = far_rows(j / form.evaluate(data.x, p)[:, None] if objective.log else j, data.w)
    rest = float(np.median(r[~far])) if not far.all() else 0.0
    return float(np.median(r[far])) / rest if far.any() and rest > 0 else 1.0


def degrees(data: GroupData, free: int) -> int:
    """Degrees of freedom of an interval: rows less free parameters, and no more than clusters less one."""
    spare = data.n - free
    return max(1, spare if data.cluster is None else min(spare, len(np.unique(data.cluster)) - 1))


def _covariances(
    form: LawForm, data: GroupData, p: Array, objective: Objective, free: np.ndarray
) -> tuple[Array, Array]:
    """The sandwich and the covariance that the likelihood has on its own, both (P, P)."""
    robust, plain = np.zeros((len(p), len(p))), np.zeros((len(p), len(p)))
    k = int(free.sum())
    if k == 0:
        return robust, plain
    f = form.evaluate(data.x, p)
    j = form.jacobian(data.x, p)[:, free]
    with np.errstate(all="ignore"):
        if objective.log:
            j = j / f[:, None]
    r = objective.residual(f, data.y)
    dof = data.n - k
    if dof <= 0 or not np.isfinite(j).all() or not np.isfinite(r).all():
        robust[np.ix_(free, free)] = plain[np.ix_(free, free)] = np.inf
        return robust, plain
    if objective.robust:
        bend = data.w * _slopes(j, data.w, r, objective.delta)
        pull = data.w * np.clip(r, -objective.delta, objective.delta)
        power = 2.0 if float(np.median(np.abs(r))) > objective.delta else 1.0  # as the profile's likelihood has it
        noise = 2 * float(objective.loss(r, data.w)) / (power * data.n)
    else:
        bend, pull = data.w, data.w * r
        noise = float(np.sum(data.w * r**2)) / dof
    inverse = _inverse_gram(j * np.sqrt(bend)[:, None])
    plain[np.ix_(free, free)] = noise * inverse
    robust[np.ix_(free, free)] = _sandwich(j, bend, pull, inverse, data.cluster)
    return robust, plain


def _sandwich(j: Array, bend: Array, pull: Array, inverse: Array, cluster: np.ndarray | None) -> Array:
    """The jackknife sandwich (k, k) of scores ``pull * j`` and curvatures ``bend * j j^T``, by row or by cluster."""
    if not np.isfinite(inverse).all():
        return inverse
    scores = j * pull[:, None]
    if cluster is None:
        leverage = np.einsum("ni,ij,nj->n", j, inverse, j) * bend
        moves = (scores @ inverse) / np.maximum(1 - leverage, _LEAST_SLACK)[:, None]
        return np.asarray(moves.T @ moves) * (len(j) - 1) / len(j)
    norm = np.maximum(np.linalg.norm(j * np.sqrt(bend)[:, None], axis=0), 1e-300)
    _, label = np.unique(cluster, return_inverse=True)
    count = int(label.max()) + 1
    if count < 2:
        return np.full_like(inverse, np.inf)
    order = np.argsort(label, kind="stable")
    first = np.searchsorted(label[order], np.arange(count))
    unit = (j * np.sqrt(bend)[:, None] / norm)[order]
    grams = np.add.reduceat(unit[:, :, None] * unit[:, None, :], first, axis=0)
    sums = np.add.reduceat(scores[order] / norm, first, axis=0)
    rest = np.linalg.pinv(unit.T @ unit - grams, rcond=1e-10, hermitian=True)
    moves = np.einsum("gij,gj->gi", rest, sums)
    return np.asarray(moves.T @ moves) * (count - 1) / count / np.outer(norm, norm)


def far_rows(j: Array, w: Array) -> Mask:
    """Rows with more than twice the mean leverage (n,): what they say of the law, few others do. None where they are under three."""
    inverse = _inverse_gram(j * np.sqrt(w)[:, None])
    if not np.isfinite(inverse).all():
        return np.zeros(len(j), dtype=bool)
    far = np.einsum("ni,ij,nj->n", j, inverse, j) * w > 2 * j.shape[1] / len(j)
    return far if far.sum() >= _FEWEST_FAR else np.zeros(len(j), dtype=bool)


def _slopes(j: Array, w: Array, r: Array, delta: float) -> Array:
    """Expected derivative of psi per point, apart for the rows with much leverage, which may scatter otherwise."""
    out = np.empty(len(r))
    far = far_rows(j, w)
    for rows in (far, ~far):
        if rows.any():
            out[rows] = _slope(r[rows], delta)
    return out


def _slope(r: Array, delta: float) -> float:
    """The share of residuals inside delta, or a density estimate when that is thin."""
    share = float(np.mean(np.abs(r) <= delta))
    if share < 0.2:  # nearly least absolute deviations: 2 delta f(0), by a kernel at the residuals' robust width
        width = 1.06 * max(1.4826 * float(np.median(np.abs(r))), 1e-300) * len(r) ** -0.2
        share = 2 * delta * float(np.mean(stats.norm.pdf(r / width))) / width
    return max(share, 1e-12)


def _inverse_gram(j: Array) -> Array:
    """(J^T J)^-1 by QR of unit-norm columns; inf when a direction is not determined."""
    norm = np.maximum(np.linalg.norm(j, axis=0), 1e-300)
    _, s, vt = np.linalg.svd(j / norm, full_matrices=False)
    if s[-1] < 1e-12 * s[0]:
        return np.full((j.shape[1], j.shape[1]), np.inf)
    return np.asarray((vt.T / s**2) @ vt / np.outer(norm, norm))


def interval(
    form: LawForm, i: int, p: Array, cov: Array, dof: int, level: float, scale: str = "auto"
) -> tuple[float, float]:
    """Wald interval of parameter i with Student's t.

    ``scale``: ``linear``, ``log``, or ``auto`` (logarithm for parameters that must be positive).
    """
    parameter = form.parameters[i]
    se = float(np.sqrt(cov[i, i])) if cov[i, i] >= 0 else np.inf
    t = float(special.stdtrit(max(1, dof), 0.5 + level / 2))
    log = scale == "log" or (
        scale == "auto" and p[i] > 0 and parameter.low >= 0 and (parameter.linear or parameter.scale == "log")
    )
    if not np.isfinite(se):
        return -np.inf, np.inf
    if log and p[i] > 0:
        return float(p[i] * np.exp(-t * se / p[i])), float(p[i] * np.exp(t * se / p[i]))
    return float(p[i] - t * se), float(p[i] + t * se)
