"""Wald covariance: the quick interval, good when the likelihood is nearly quadratic. Use logarithms of amplitudes.

Least squares: Sigma = sigma^2 (J^T J)^-1 with sigma^2 = SSE/(n - p). Huber: the sandwich H^-1 (sum g g^T) H^-1.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from isoflop.core.expressions import Array, Mask
from isoflop.laws.base import LawForm
from isoflop.laws.objective import Objective
from isoflop.laws.table import GroupData


def covariance(form: LawForm, data: GroupData, p: Array, objective: Objective, free: np.ndarray) -> Array:
    """Covariance (P, P) of natural parameters; zero for held ones, inf where the data do not determine them."""
    out = np.zeros((len(p), len(p)))
    k = int(free.sum())
    if k == 0:
        return out
    f = form.evaluate(data.x, p)
    j = form.jacobian(data.x, p)[:, free]
    with np.errstate(all="ignore"):
        if objective.log:
            j = j / f[:, None]
    r = objective.residual(f, data.y)
    dof = data.n - k
    if dof <= 0 or not np.isfinite(j).all() or not np.isfinite(r).all():
        out[np.ix_(free, free)] = np.inf
        return out
    if objective.robust:
        inside = np.abs(r) <= objective.delta
        inverse = _inverse_gram(j * np.sqrt(data.w * _slope(r, inside, objective.delta))[:, None])
        scores = j * (data.w * np.clip(r, -objective.delta, objective.delta))[:, None]
        small = inverse @ (scores.T @ scores) @ inverse * data.n / dof
    else:
        sigma2 = float(np.sum(data.w * r**2)) / dof
        small = sigma2 * _inverse_gram(j * np.sqrt(data.w)[:, None])
    out[np.ix_(free, free)] = small
    return out


def _slope(r: Array, inside: Mask, delta: float) -> Array:
    """Expected derivative of psi per point: the share of residuals inside delta, or a density estimate when that is thin."""
    share = float(np.mean(inside))
    if share < 0.2:  # nearly least absolute deviations: 2 delta f(0), by a kernel at the residuals' robust width
        width = 1.06 * max(1.4826 * float(np.median(np.abs(r))), 1e-300) * len(r) ** -0.2
        share = 2 * delta * float(np.mean(stats.norm.pdf(r / width))) / width
    return np.full_like(r, max(share, 1e-12))


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
