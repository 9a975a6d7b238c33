"""Maximum a posteriori fits of one block: a global search, then damped Gauss-Newton steps on all starts together.

Minimises |W (y - f(x; u))|^2 + sum_k ((u_k - m_k)/s_k)^2 within bounds, W^T W being the inverse covariance of the cells.
The prior (m, s) is weak; it decides only what the rows leave open.

Shapes: B starts, C cells, P parameters.
"""

from __future__ import annotations

import numpy as np

from isoflop.core.expressions import Array
from isoflop.laws.varpro import candidates, rank, spread_best
from isoflop.search.law.contenders import Block

_SEARCHED = 160  # cells that the global search looks at
_CLOSE = 0.05  # relative distance of predictions below which two minima are one


def search_starts(block: Block, x_CK: Array, group_C: np.ndarray, y_C: Array, w_C: Array, count: int) -> Array:
    """Promising parameters (B, P) by variable projection over the form's search design."""
    if len(y_C) > _SEARCHED:
        keep = np.linspace(0, len(y_C) - 1, _SEARCHED).astype(np.int64)
        x_CK, group_C, y_C, w_C = x_CK[keep], group_C[keep], y_C[keep], w_C[keep]
    form = block.form
    low = np.array([p.low for p in form.parameters])
    high = np.array([p.high for p in form.parameters])
    theta, cube = candidates(form, low, high, form.search_points, 0)
    score, p = rank(form, block.inputs(x_CK, group_C), y_C, w_C / np.mean(w_C), theta, low, high)
    cells = spread_best(score, cube, count)
    return block.coordinates(p[cells]) if cells else np.empty((0, len(form.names)))


@np.errstate(all="ignore")
def map_fit(
    block: Block,
    x_CK: Array,
    group_C: np.ndarray,
    y_C: Array,
    white_CC: Array,
    start_BP: Array,
    steps: int = 40,
    tolerance: float = 1e-7,
) -> tuple[Array, Array]:
    """Minima (B, P) and their objective (B,), from every start; ``white_CC`` is W, or its diagonal (C,)."""
    form, low, high, log = block.form, block.low, block.high, block.log
    inputs = {name: a[None] for name, a in block.inputs(x_CK, group_C).items()}
    known = form.bind(inputs)
    mean, precision = block.prior_mean, block.prior_sd**-2.0
    plain = white_CC.ndim == 1  # a diagonal
    eye = np.eye(len(mean))

    def evaluate(u: Array) -> tuple[Array, Array, Array]:
        p = block.scaled(u)
        f, j = form.value_and_jacobian(known, p, len(y_C))
        j = j * np.where(log, p, 1.0)[:, :, None]
        r = (f - y_C) * white_CC if plain else (f - y_C) @ white_CC.T
        j = j * white_CC if plain else j @ white_CC.T
        shift = u - mean
        loss = np.sum(r**2, axis=1) + shift**2 @ precision
        gradient = np.matmul(j, r[:, :, None])[..., 0] + shift * precision
        curvature = np.matmul(j, j.transpose(0, 2, 1)) + eye * precision
        bad = ~np.isfinite(loss + gradient.sum(1) + curvature.sum((1, 2)))
        if bad.any():
            loss, gradient = np.where(bad, np.inf, loss), np.where(bad[:, None], 0.0, gradient)
            curvature = np.where(bad[:, None, None], eye, curvature)
        return loss, gradient, curvature

    u = np.clip(start_BP, low, high)
    loss, gradient, curvature = evaluate(u)
    damping = np.full(len(u), 1e-3)
    for _ in range(steps):
        held = ((u <= low) & (gradient > 0)) | ((u >= high) & (gradient < 0))
        h = np.where(held[:, :, None] | held[:, None, :], eye, curvature)
        diagonal = np.einsum("bpp->bp", h)
        move = -np.linalg.solve(
            h + (damping[:, None] * diagonal)[:, :, None] * eye, np.where(held, 0.0, gradient)[..., None]
        )[..., 0]
        move = np.clip(move, -3.0, 3.0) if log.any() else move
        trial = np.clip(u + move, low, high)
        new = evaluate(trial)
        better = new[0] <= loss
        gain = np.where(better, loss - new[0], np.inf)
        row = better[:, None]
        u, gradient = np.where(row, trial, u), np.where(row, new[1], gradient)
        curvature = np.where(row[:, :, None], new[2], curvature)
        loss = np.where(better, new[0], loss)
        damping = np.clip(np.where(better, damping * 0.2, damping * 8.0), 1e-9, 1e9)
        hopeless = loss > 4.0 * np.min(loss) + 50.0
        if np.all((gain <= tolerance * (1.0 + loss)) | (damping >= 1e9) | hopeless):
            break
    return u, loss


def distinct(u_BP: Array, loss_B: Array, predictions_BM: Array, noise: float, limit: float, most: int) -> list[int]:
    """Positions of different minima, best first: within ``limit`` of the best objective, predicting differently somewhere."""
    chosen: list[int] = []
    for i in np.argsort(loss_B, kind="stable"):
        if not np.isfinite(loss_B[i]) or loss_B[i] > limit or len(chosen) >= most:
            break
        new = all(np.max(np.abs(predictions_BM[i] - predictions_BM[k])) > noise for k in chosen)
        if new:
            chosen.append(int(i))
    return chosen
