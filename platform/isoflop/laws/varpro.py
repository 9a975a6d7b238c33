"""Variable projection: the linear parameters are solved exactly, only the nonlinear ones are searched.

For fixed theta a separable law is y ~ offset + sum_k c_k phi_k(x; theta); c follows by (sign-constrained) least squares,
and by the envelope theorem the reduced objective R(theta) has the gradient -2 r^T (d phi / d theta) c.

Shapes: M candidate thetas, K linear and Q nonlinear parameters, N points, W weight rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from scipy.optimize import nnls
from scipy.stats import qmc

from isoflop.core.expressions import Array
from isoflop.laws.base import LawForm

_RANKED = 4000  # rows that the search looks at
_CHUNK = 150_000  # doubles of basis functions at once: stays in the cache


def candidates(form: LawForm, low: Array, high: Array, points: int, seed: int) -> tuple[Array, Array]:
    """Nonlinear parameters to try (M, Q) and their places in the unit cube (M, Q).

    A full grid for up to two of them, a scrambled Sobol design beyond. A positive search range is covered on a log scale and
    mirrored where negative values are allowed.
    """
    chosen = [form.parameters[i] for i in form.nonlinear]
    if not chosen:
        return np.zeros((1, 0)), np.zeros((1, 0))
    cube = _cube(len(chosen), points, seed)
    columns = [
        _spread(cube[:, k], parameter.search, float(low[i]), float(high[i]))
        for k, (parameter, i) in enumerate(zip(chosen, form.nonlinear, strict=True))
    ]
    return np.stack(columns, axis=1), cube


@lru_cache(maxsize=64)
def _cube(dimensions: int, points: int, seed: int) -> Array:
    if dimensions <= 2:
        side = max(8, round(points ** (1 / dimensions)))
        return np.array(list(itertools.product(np.linspace(0, 1, side), repeat=dimensions)))
    return np.asarray(qmc.Sobol(dimensions, seed=seed).random_base2(max(6, math.ceil(math.log2(points)))))


def _spread(unit: Array, search: tuple[float, float], low: float, high: float) -> Array:
    first, last = max(search[0], low), min(search[1], high)
    if first >= last:
        return np.full_like(unit, min(max(search[0], low), high))
    if first > 0:
        out = first * (last / first) ** unit
        if low < 0:  # both signs: the lower half of the unit interval is the mirror image
            folded = first * (last / first) ** np.abs(2 * unit - 1)
            out = np.maximum(np.where(unit < 0.5, -folded, folded), low)
        return out
    return first + (last - first) * unit


def basis(form: LawForm, x: Mapping[str, Array], theta_MQ: Array) -> tuple[Array, Array]:
    """Basis functions (M, K, N) and the offset (M, N) that no linear parameter multiplies."""
    n = next(iter(x.values())).shape[-1]
    p = np.zeros((len(theta_MQ), len(form.names)))
    p[:, list(form.nonlinear)] = theta_MQ
    _, phi, offset = form.separate(form.bind({v: np.atleast_2d(a) for v, a in x.items()}), p, n)
    return phi, offset


def rank(
    form: LawForm, x: Mapping[str, Array], y_N: Array, w_N: Array, theta_MQ: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """Weighted SSE (M,) and full parameter vectors (M, P) of every candidate, linear parameters solved within signs.

    Works on Gram matrices of unit-norm columns, and on an even sample of very many rows: good for choosing cells, never used for
    a reported number.
    """
    n = len(y_N)
    if n > _RANKED:
        rows = np.linspace(0, n - 1, _RANKED).astype(np.int64)
        return rank(form, {v: a[rows] for v, a in x.items()}, y_N[rows], w_N[rows], theta_MQ, low, high)
    step = max(1, _CHUNK // (n * len(form.names)))
    if len(theta_MQ) > step:
        parts = [rank(form, x, y_N, w_N, theta_MQ[i : i + step], low, high) for i in range(0, len(theta_MQ), step)]
        return np.concatenate([s for s, _ in parts]), np.concatenate([p for _, p in parts])
    with np.errstate(all="ignore"):
        return _rank(form, x, y_N, w_N, theta_MQ, low, high)


def _rank(
    form: LawForm, x: Mapping[str, Array], y_N: Array, w_N: Array, theta_MQ: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    m, k = len(theta_MQ), len(form.linear)
    p = np.zeros((m, len(form.names)))
    p[:, list(form.nonlinear)] = theta_MQ
    phi, offset = basis(form, x, theta_MQ)
    target = y_N - offset
    if k == 0:
        return _nan_last(np.einsum("mn,n->m", target**2, w_N)), p
    weighted = phi * w_N
    gram = np.matmul(weighted, phi.transpose(0, 2, 1))
    right = np.matmul(weighted, target[:, :, None])[..., 0]
    total = np.einsum("mn,n->m", target**2, w_N)
    lo, hi = low[list(form.linear)], high[list(form.linear)]
    c, gain = constrained(gram, right, lo, hi)
    p[:, list(form.linear)] = np.clip(c, lo, hi)
    return _nan_last(total - gain), p


def constrained(gram_MKK: Array, right_MK: Array, lo_K: Array, hi_K: Array) -> tuple[Array, Array]:
    """Sign-constrained least squares from normal equations of unit-norm columns: c (M, K) and the decrease of the SSE (M,).

    Solved without constraints first; where a sign is violated, the best of all allowed supports.
    """
    k = right_MK.shape[1]
    norm = np.sqrt(np.maximum(np.einsum("mkk->mk", gram_MKK), 1e-300))
    gram, right = gram_MKK / (norm[:, :, None] * norm[:, None, :]), right_MK / norm
    bad = ~np.isfinite(gram.sum((1, 2)) + right.sum(1))
    if bad.any():
        gram[bad], right[bad] = np.eye(k), 0.0
    c = np.linalg.solve(gram + 1e-13 * np.eye(k), right[:, :, None])[..., 0]
    floor, ceiling = np.where(lo_K >= 0, 0.0, -np.inf), np.where(hi_K <= 0, 0.0, np.inf)
    wrong = np.flatnonzero(((c < floor) | (c > ceiling)).any(axis=1))
    if len(wrong):
        c[wrong] = _best_support(gram[wrong], right[wrong], lo_K, hi_K, floor, ceiling)
    gain = 2 * np.sum(c * right, axis=1) - np.sum(c * np.matmul(gram, c[:, :, None])[..., 0], axis=1)
    return c / norm, np.where(bad, -np.inf, gain)


def _best_support(gram: Array, right: Array, lo: Array, hi: Array, floor: Array, ceiling: Array) -> Array:
    """The feasible subset of columns with the largest decrease."""
    best, coefficients = np.full(len(right), -np.inf), np.zeros_like(right)
    for kept in _supports(lo, hi)[1:]:  # the first is all of them, which was infeasible
        c = np.zeros_like(right)
        if kept:
            sub = gram[:, kept][:, :, kept] + 1e-13 * np.eye(len(kept))
            c[:, kept] = np.linalg.solve(sub, right[:, kept, None])[..., 0]
        gain = np.sum(c * right, axis=1)
        take = np.all((c >= floor) & (c <= ceiling), axis=1) & (gain > best)
        best, coefficients = np.where(take, gain, best), np.where(take[:, None], c, coefficients)
    return coefficients


def _supports(lo: Array, hi: Array) -> list[list[int]]:
    """Which linear parameters may be non-zero together: all subsets of the sign-constrained ones."""
    signed = [i for i in range(len(lo)) if lo[i] >= 0 or hi[i] <= 0]
    free = [i for i in range(len(lo)) if i not in signed]
    if len(signed) > 5:
        return [sorted(free + signed), free]
    subsets = itertools.chain.from_iterable(itertools.combinations(signed, r) for r in range(len(signed), -1, -1))
    return [sorted(free + list(s)) for s in subsets]


def _nan_last(a: Array) -> Array:
    return np.where(np.isfinite(a), a, np.inf)


def spread_best(score_M: Array, cube_MQ: Array, count: int, distance: float = 0.12) -> list[int]:
    """Positions of the best candidates that lie apart: no two within ``distance`` of the unit cube in all axes."""
    order = np.argsort(score_M, kind="stable")[: max(400, 40 * count)]
    order = order[np.isfinite(score_M[order])]
    if cube_MQ.shape[1] == 0:
        return [int(i) for i in order[:1]]
    chosen: list[int] = []
    while len(order) and len(chosen) < count:
        chosen.append(int(order[0]))
        order = order[np.max(np.abs(cube_MQ[order] - cube_MQ[order[0]]), axis=1) > distance]
    return chosen


def project(
    form: LawForm, x: Mapping[str, Array], y_N: Array, w_N: Array, theta_Q: Array, signs: bool = True
) -> tuple[Array, float, Array]:
    """Linear parameters (K,), reduced objective R(theta) and its envelope gradient (Q,) at one theta.

    Columns are scaled to unit norm and solved by QR (NNLS when ``signs`` and every linear parameter is bounded below by 0).
    """
    phi, offset = basis(form, x, np.asarray(theta_Q, dtype=np.float64)[None])
    root = np.sqrt(w_N)
    matrix, target = phi[0].T * root[:, None], (y_N - offset[0]) * root
    norm = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    if signs and all(form.parameters[i].low >= 0 for i in form.linear):
        c = nnls(matrix / norm, target)[0] / norm
    else:
        c = np.linalg.lstsq(matrix / norm, target, rcond=None)[0] / norm
    residual = target - matrix @ c
    p = np.zeros(len(form.names))
    p[list(form.linear)], p[list(form.nonlinear)] = c, theta_Q
    known = form.bind({v: np.atleast_2d(a) for v, a in x.items()})
    _, j = form.value_and_jacobian(known, p[None], len(y_N))
    gradient = -2.0 * (j[0, list(form.nonlinear)] * root) @ residual
    return c, float(residual @ residual), gradient
