r"""The worth of a run: how much it narrows the target, and how much it settles between hypotheses.

With C = J Sigma (the covariance of target and parameters) and a candidate of sensitivities H (O observations):

    V-gain_k(x) = sum_t w_t [ C H^T (H Sigma H^T + R)^-1 H C^T ]_tt                       (variance taken off the target)
    between(x)  = sum_{k<l} p_k p_l |t_k - t_l|^2_w (1 - BC_kl(x))                        (disagreement taken off)
    score(x)    = ( sum_k p_k V-gain_k(x) + between(x) ) / (cost(x)/total)^gamma

BC is Bhattacharyya's coefficient of the two predictive densities at x: after the observation E[p_k' p_l'] is at most about
p_k p_l BC. The variance reduction does not depend on the outcome, so a batch is chosen by fantasies: Sigma and C are
updated as if the chosen run had been seen, R being its noise.

J is the statistical linearisation of the target: the least-squares slope over draws from N(u, Sigma), exact for linear
targets and still informative where the derivative at the mode is zero (an optimum on a limit).

Shapes: M candidates, O observations per candidate, P parameters, T quantities, S draws.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from isoflop.core.expressions import Array


@lru_cache(maxsize=16)
def normal_draws(dimensions: int, count: int) -> Array:
    """Standard normal points (S, P), fixed, antithetic and whitened: mean 0 and covariance 1 to rounding."""
    half = max(count // 2, dimensions + 1)
    points = qmc.Sobol(dimensions, seed=0).random_base2(int(np.ceil(np.log2(half))))[:half]
    z = ndtri(np.clip(points, 1e-6, 1 - 1e-6))
    z = np.concatenate([z, -z])
    root = np.linalg.cholesky(z.T @ z / len(z))
    return np.asarray(np.linalg.solve(root, z.T).T, dtype=np.float64)


def root_of(cov_PP: Array) -> Array:
    """A matrix whose product with its transpose is the covariance."""
    d = np.sqrt(np.diag(cov_PP))
    unit = cov_PP / np.outer(d, d) + 1e-12 * np.eye(len(d))
    return np.asarray(d[:, None] * np.linalg.cholesky(unit), dtype=np.float64)


def linearise(draws_ST: Array, z_SP: Array, root_PP: Array) -> Array:
    """C = J Sigma (T, P) from target values at u = mode + z root^T, with root root^T = Sigma."""
    centred = draws_ST - draws_ST.mean(axis=0)
    slope_TP = centred.T @ z_SP / len(z_SP)  # J root
    return slope_TP @ root_PP.T


def v_gains(cov_PP: Array, cross_TP: Array, h_MOP: Array, noise_MO: Array, weight_T: Array) -> Array:
    """Weighted variance taken off the target by each candidate (M,)."""
    moved_MOP = h_MOP @ cov_PP
    shared_MOT = h_MOP @ cross_TP.T
    if h_MOP.shape[1] == 1:
        spread = np.einsum("mp,mp->m", moved_MOP[:, 0], h_MOP[:, 0]) + noise_MO[:, 0]
        return (shared_MOT[:, 0] ** 2 @ weight_T) / spread
    spread_MOO = np.einsum("mop,mqp->moq", moved_MOP, h_MOP)
    spread_MOO = spread_MOO + noise_MO[:, :, None] * np.eye(h_MOP.shape[1])
    solved = np.linalg.solve(spread_MOO, shared_MOT)
    return np.einsum("mot,mot,t->m", solved, shared_MOT, weight_T)


def d_gains(cov_PP: Array, h_MOP: Array, noise_MO: Array) -> Array:
    """Information on all parameters, ln det(I + R^-1 H Sigma H^T), per candidate (M,)."""
    spread = np.einsum("mop,mqp->moq", h_MOP @ cov_PP, h_MOP) / noise_MO[:, :, None]
    return np.linalg.slogdet(spread + np.eye(h_MOP.shape[1]))[1]


def fantasise(cov_PP: Array, cross_TP: Array, h_OP: Array, noise_O: Array) -> tuple[Array, Array]:
    """Sigma and C after one more run, whatever its outcome."""
    for h, noise in zip(h_OP, noise_O, strict=True):
        moved = cov_PP @ h
        spread = float(h @ moved + noise)
        cross_TP = cross_TP - np.outer(cross_TP @ h, moved) / spread
        cov_PP = cov_PP - np.outer(moved, moved) / spread
    return cov_PP, cross_TP


def overlap(mean_k: Array, var_k: Array, mean_l: Array, var_l: Array) -> Array:
    """Bhattacharyya's coefficient of independent normals, over the last axis."""
    total = var_k + var_l
    log = -((mean_k - mean_l) ** 2) / (4 * total) + 0.5 * np.log(2 * np.sqrt(var_k * var_l) / total)
    return np.exp(np.sum(log, axis=-1))


def disagreement(weight_K: Array, target_KT: Array, importance_T: Array, mean_KMO: Array, var_KMO: Array) -> Array:
    """Between-hypothesis variance that each candidate is expected to settle (M,)."""
    out = np.zeros(mean_KMO.shape[1])
    for k in range(len(weight_K)):
        for other in range(k):
            gap = (target_KT[k] - target_KT[other]) ** 2
            worth = weight_K[k] * weight_K[other] * float(np.nan_to_num(gap) @ importance_T)
            if worth > 0:
                out += worth * (1 - overlap(mean_KMO[k], var_KMO[k], mean_KMO[other], var_KMO[other]))
    return out
